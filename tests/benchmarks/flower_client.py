"""Flower's client. A module of its own, so that an actor imports it once and keeps its model between messages."""

from __future__ import annotations

import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from plain_model import Job, lora_model, read, train_client, write
from torch import nn

app = ClientApp()


@cache
def resident() -> tuple[Job, nn.Module]:
    """The job and its model, loaded once per actor."""
    torch.set_num_threads(1)
    job = Job.open(os.environ["BENCH_JOB"])
    return job, lora_model(job)


@app.train()
def train(message: Message, context: Context) -> Message:
    position, round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]) - 1
    if os.environ["BENCH_JOB"].startswith("null:"):
        metrics = MetricRecord({"train_loss": 1.0, "num-examples": 1})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content=content, reply_to=message)
    job, model = resident()
    write(model, message.content["arrays"].to_torch_state_dict()["flat"])
    ids, labels = job.texts(round, position)
    loss = train_client(model, ids, labels, job.regime["batch"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(ids)})
    content = RecordDict({"arrays": ArrayRecord({"flat": read(model)}), "metrics": metrics})
    return Message(content=content, reply_to=message)
