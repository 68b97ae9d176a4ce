"""The plain loop: ``run_plain.py JOB OUT THREADS DTYPE``. One process, one client after the other."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext

import torch
from plain_model import Job, lora_model, read, report, train_client, write


def main() -> None:
    folder, out, threads, dtype = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    job = Job.open(folder)
    model = lora_model(job)
    shared = read(model)
    seconds, losses = [], [0.0]
    for round in range(job.regime["rounds"]):
        start = time.perf_counter()
        total, weight, losses = torch.zeros(shared.shape, dtype=torch.float64), 0, []
        for position in range(len(job.cohort(round))):
            ids, labels = job.texts(round, position)
            write(model, shared)
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                losses.append(train_client(model, ids, labels, job.regime["batch"]))
            total += len(ids) * read(model).double()
            weight += len(ids)
        shared = (total / weight).float()
        seconds.append(time.perf_counter() - start)
    report(out, seconds, shared.numpy(), sum(losses) / len(losses))


if __name__ == "__main__":
    main()
