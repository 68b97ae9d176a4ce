"""Eq. 6: the strategy generator's sizes, start and lanes; features are means and SDs over real tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import toy_context, toy_lanes, toy_net

from fedtailor.core.scope import Scope
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import overrides_of, stored_experiment, to_json
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.features import client_features
from fedtailor.methods import build_method
from fedtailor.methods.fedp2eft import PsgConfig, StrategyGenerator

SHORT = {"lr": 5e-3, "lambda_lr": 5e-2, "batch_size": 4, "epochs": 2}


def test_lambda_starts_at_the_bias_everywhere() -> None:
    net, psg = toy_net(), StrategyGenerator(8, PsgConfig())
    ctx = toy_context(net, toy_lanes([5, 4]), None, [psg])
    lam = psg(ctx.params, ctx.client_features(PsgConfig().features_pad_to))
    assert lam.shape == (2, 14, 8)
    np.testing.assert_allclose(lam.detach().numpy(), 1e-4, rtol=1e-2)


def test_one_lane_is_a_torch_mlp() -> None:
    net, psg = toy_net(), StrategyGenerator(8, PsgConfig(gain=1.0, bias=0.05))
    ctx = toy_context(net, toy_lanes([5]), None, [psg])
    mlp = torch.nn.Sequential(torch.nn.Linear(28, 56), torch.nn.PReLU(), torch.nn.Linear(56, 112)).double()
    names = ["psg.hidden.weight", "psg.hidden.bias", "psg.prelu", "psg.out.weight", "psg.out.bias"]
    with torch.no_grad():
        for parameter, name in zip(mlp.parameters(), names, strict=True):
            parameter.copy_(ctx.params[name][0])
    features = torch.randn(1, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        psg(ctx.params, features).flatten(), mlp(features)[0].clamp(1e-4, 1e3), rtol=1e-12, atol=0
    )


def test_only_the_generator_travels() -> None:
    method = build_method("fedp2eft", {"stage1": SHORT}, 4)
    ctx = toy_context(toy_net(), toy_lanes([5]), method.adapter, method.modules)
    assert {s.name.split(".")[0] for s in ctx.params.of_scope(Scope.SHARED)} == {"psg"}
    assert not ctx.params.of_scope(Scope.PRIVATE)


def test_stage_2_moves_the_generator_towards_the_lambda_found() -> None:
    method = build_method("fedp2eft", {"stage1": SHORT, "psg": {"lr": 5e-3}}, 4)
    ctx = toy_context(toy_net(), toy_lanes([12, 9]), method.adapter, method.modules, r_max=4)
    report = method.local_update(ctx)
    assert bool((report.metrics["psg_loss_after"] < report.metrics["psg_loss"]).all())
    assert bool((report.metrics["lambda_target_median"] > 1e-3).all())


def test_features_are_moments_of_real_tokens_only() -> None:
    net = toy_net()
    examples = toy_lanes([7])[0].train
    seen: list[torch.Tensor] = []
    handle = net.layers[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
    features = client_features(net, examples, 0)
    handle.remove()
    lengths = examples.lengths
    tokens = torch.cat([seen[0][row, : lengths[row]] for row in range(7)])
    assert float(features[0]) == pytest.approx(float(tokens.mean()), rel=1e-5)
    assert float(features[1]) == pytest.approx(float(tokens.std()), rel=1e-5)
    assert features.shape == (28,)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_the_generator_s_sd_is_the_root_of_variance_and_eps(eps: float) -> None:
    lanes = toy_lanes([6, 4])
    psg = StrategyGenerator(8, PsgConfig(features_eps=eps))
    plain = torch.stack([client_features(toy_net(), lane.train, 0) for lane in lanes]).double()
    features = psg.features(toy_context(toy_net(), lanes, None, [psg]))
    assert torch.equal(features[:, ::2], plain[:, ::2])
    assert torch.equal(features[:, 1::2], (plain[:, 1::2] ** 2 + eps) ** 0.5)
    assert torch.equal(features, plain) == (eps == 0.0)


def test_more_padding_changes_no_feature_unless_the_reference_is_asked_for() -> None:
    net = toy_net()
    e = toy_lanes([6])[0].train
    wider = Examples(np.pad(e.input_ids, ((0, 0), (0, 5))), e.lengths, e.labels)
    torch.testing.assert_close(client_features(net, wider, 0), client_features(net, e, 0), rtol=0, atol=0)
    assert not torch.allclose(client_features(net, e, 0, pad_to=30), client_features(net, e, 0))


def test_bound_adapters_do_not_leak_into_features() -> None:
    method = build_method("fedavg", {"adapter": "lora", "lr": 1e-2, "batch_size": 2}, 4)
    net, lanes = toy_net(), toy_lanes([6])
    before = client_features(net, lanes[0].train, 0)
    ctx = toy_context(net, lanes, method.adapter)
    method.local_update(ctx)
    torch.testing.assert_close(client_features(net, lanes[0].train, 0), before, rtol=0, atol=0)


def test_reference_switches_all_deviations_at_once_and_single_ones_win() -> None:
    from fedtailor.methods.fedp2eft import FedP2EFTConfig

    cfg = FedP2EFTConfig.model_validate({"reference": True, "stage1": {"forward": "clamped"}})
    assert (cfg.stage1.forward, cfg.stage1.target, cfg.stage1.accumulate_lambda_grad) == (
        "clamped",
        "raw",
        True,
    )
    assert (cfg.stage1.max_grad_norm, cfg.psg.weights) == (1.0, "bfloat16")
    assert (cfg.finetune.max_grad_norm, cfg.rank_bits) == (1.0, 24)
    own = FedP2EFTConfig.model_validate({"reference": True, "rank_bits": 8, "finetune": {"max_grad_norm": None}})
    assert (own.finetune.max_grad_norm, own.rank_bits) == (None, 8)
    plain = FedP2EFTConfig()
    assert (plain.finetune.max_grad_norm, plain.rank_bits, plain.psg.features_pad_to) == (None, 10, None)


@pytest.mark.parametrize(
    ("words", "length"),
    [
        (["task=xnli"], 128),
        (["task=masakhanews"], 256),
        (["task=masakhanews", "task.max_length=64"], 64),
        (["task=masakhanews", "fedp2eft.psg.features_pad_to=null"], None),
        (["task=masakhanews", "fedp2eft.psg.features_pad_to=32"], 32),
        (["task=masakhanews", "fedp2eft.reference=false"], None),
        (["task=cldr_instruct"], None),
    ],
)
def test_the_reference_pads_features_to_the_task_s_length(words: list[str], length: int | None) -> None:
    exp = compose([], ["fedp2eft.reference=true", *words])
    assert exp.fedp2eft.psg.features_pad_to == length  # type: ignore[attr-defined]
    changed = {entry["key"]: entry["value"] for entry in overrides_of(exp)}
    assert changed.get("fedp2eft.psg.features_pad_to") == length


def test_a_run_of_the_reference_as_it_was_before_is_resumed_as_it_was() -> None:
    stored = to_json(compose([], ["fedp2eft.reference=true"]))
    stored["fedp2eft"]["rank_bits"] = 10
    stored["fedp2eft"]["finetune"]["max_grad_norm"] = stored["fedp2eft"]["psg"]["features_pad_to"] = None
    assert to_json(stored_experiment(stored)) == stored
