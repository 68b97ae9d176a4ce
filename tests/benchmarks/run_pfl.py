"""Apple's pfl: ``run_pfl.py JOB OUT``, as one process or under torchrun; trains nothing with JOB = null:CLIENTS."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)

from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from plain_model import LEARNING_RATE, Job, first_step, lora_model, loss_of, read, report
from torch import Tensor, nn


class Client(nn.Module):
    """What pfl asks of a torch model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        found = loss_of(self.model, ids, labels)
        self.losses.append(found.item())
        return found

    def metrics(self, ids: Tensor, labels: Tensor) -> dict[str, Any]:
        return {}


class Averaging(FederatedAveraging):
    """FedAvg without the evaluation that pfl forces at iteration 0."""

    def get_next_central_contexts(self, *args: Any, **options: Any) -> Any:
        contexts, model, metrics = super().get_next_central_contexts(*args, **options)
        if contexts is not None:
            contexts = tuple(replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics


class Null(Averaging):
    """Trains nothing: the difference of two equal models, and one metric."""

    def train_one_user(self, initial: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        metrics = Metrics([("train_loss", Weighted(1.0, 1.0))])
        return model.get_model_difference(initial), metrics


class Stamps(TrainingProcessCallback):
    """Notes when an iteration ends."""

    def __init__(self, model: Client) -> None:
        self.times, self.model, self.loss = [time.perf_counter()], model, 0.0

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.times.append(time.perf_counter())
        # Of this process's clients only: parameters are what systems are compared by.
        self.loss = float(np.mean(self.model.losses)) if self.model.losses else 0.0
        self.model.losses.clear()
        return False, Metrics()


class Adam(torch.optim.Adam):
    """Adam over what is trained, with the stamp of the first step."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        first_step()
        return found


def local_optimizer(parameters: Any, lr: float, **more: Any) -> torch.optim.Optimizer:
    return Adam([p for p in parameters if p.requires_grad], lr=lr)


def run(model: Client, algorithm: FederatedAveraging, data: FederatedDataset, cohort: int, rounds: int, batch: int):  # type: ignore[no-untyped-def]
    wrapped = PyTorchModel(
        model, local_optimizer, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    )
    stamps = Stamps(model)
    algorithm.run(
        NNAlgorithmParams(rounds, rounds + 1, cohort, 0),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        wrapped,
        NNTrainHyperParams(local_batch_size=batch, local_num_epochs=1, local_learning_rate=LEARNING_RATE),
        callbacks=[stamps],
        send_metrics_to_platform=False,
    )
    return stamps


def sampler(ids: list[tuple[int, int]]):  # type: ignore[no-untyped-def]
    """Users in a given order; beyond it pfl's look-ahead draws what is never used."""
    position = iter(range(10**9))
    return lambda: ids[next(position) % len(ids)]


def job_run(folder: str, out: str) -> None:
    job = Job.open(folder)
    model = Client(lora_model(job))
    rounds, cohort = job.regime["rounds"], job.regime["cohort"]
    ids = [(r, p) for r in range(rounds) for p in range(cohort)]
    sizes = {(r, p): int(job.clients["sizes"][job.cohort(r)[p]]) for r, p in ids}
    data = FederatedDataset(lambda user: Dataset(job.texts(*user), user_id=str(user)), sampler(ids), sizes)
    stamps = run(model, Averaging(), data, cohort, rounds, job.regime["batch"])
    finish(out, stamps, read(model.model).numpy())


def null_run(clients: int, out: str, rounds: int = 12) -> None:
    model = Client(nn.Linear(100, 100, bias=False))
    empty = torch.zeros(1, dtype=torch.int64)
    ids = [(0, p) for p in range(clients)]
    data = FederatedDataset(
        lambda user: Dataset((empty, empty), user_id=str(user)), sampler(ids), dict.fromkeys(ids, 1)
    )
    stamps = run(model, Null(), data, clients, rounds, 1)
    finish(out, stamps, np.zeros(1))


def finish(out: str, stamps: Stamps, final: np.ndarray) -> None:
    if pytorch_ops.distributed.global_rank == 0:
        report(out, np.diff(stamps.times).tolist(), final, stamps.loss)


def main() -> None:
    what, out = sys.argv[1:3]
    np.random.seed(0)
    if what.startswith("null:"):
        null_run(int(what.partition(":")[2]), out)
    else:
        job_run(what, out)


if __name__ == "__main__":
    main()
