"""FedProx: FedAvg at mu = 0, and nearer to what was received the larger mu is."""

from __future__ import annotations

import torch
from toy import toy_context, toy_lanes, toy_net

from fedtailor.core.scope import Scope
from fedtailor.methods import build_method

HOW = {"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "dropout": 0.1, "max_grad_norm": 0.5}


def trained(name: str, **config: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """SHARED rows (K, P) and metrics after a local update of three clients, float64."""
    method = build_method(name, HOW | config, 4)
    ctx = toy_context(toy_net(), toy_lanes([9, 8, 3]), method.adapter, method.modules)
    report = method.local_update(ctx)
    return ctx.params.flat(Scope.SHARED).clone(), dict(report.metrics)


def test_without_the_proximal_term_it_is_fedavg() -> None:
    own, metrics = trained("fedprox", mu=0.0)
    fedavg, expected = trained("fedavg", adapter="lora")
    assert torch.equal(own, fedavg)
    assert torch.equal(metrics["train_loss"], expected["train_loss"])


def test_a_larger_mu_keeps_every_client_nearer() -> None:
    drifts = [trained("fedprox", mu=mu)[1]["drift"] for mu in (0.0, 1.0, 100.0)]
    assert (drifts[0] > drifts[1]).all()
    assert (drifts[1] > drifts[2]).all()
