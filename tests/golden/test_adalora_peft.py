"""AdaLoRA here is AdaLoRA in a plain script of peft: same masks, same weights, and its export is plain LoRA."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from toy import toy_context, toy_lanes, toy_net, write_adapter

from fedtailor.adapters.svd_lora import SvdLora
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method

R = 2


def plain(net: LaneNet) -> nn.Module:
    """A copy of the base model without lanes."""
    model = copy.deepcopy(net.model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LaneLinear":
                setattr(module, name, child.base)
    return model


@dataclass
class Script:
    """What the plain script ends with: per layer which ranks are kept, A, E, B, and the factor s."""

    keep: dict[str, Tensor]
    a: dict[str, Tensor]
    e: dict[str, Tensor]
    b: dict[str, Tensor]
    loss: float


def script(net: LaneNet, batches: list[LaneBatch], init: int, how: dict[str, Any]) -> Script:
    steps, allocates = len(batches), init > R
    config = AdaLoraConfig(
        init_r=init, target_r=R, lora_alpha=how.get("alpha", 2 * init), target_modules=list(net.modules),
        total_step=steps, tinit=int(0.1 * steps), tfinal=int(0.3 * steps), deltaT=how.get("delta_t", 1),
        orth_reg_weight=how.get("orth", 0.1), lora_dropout=0.0,
    )  # fmt: skip
    model = get_peft_model(plain(net), config, autocast_adapter_dtype=False).double().eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_E")}
    assert list(layers) == list(net.modules)
    initial = SvdLora(init, 1.0).initial(net, 3)
    for name, layer in layers.items():
        with torch.no_grad():
            layer.lora_A["default"].copy_(initial[f"lora_A.{name}"])
            layer.lora_B["default"].copy_(initial[f"lora_B.{name}"])
    # Not what requires a gradient: peft 0.21 marks ranknum, the denominator of s, as trainable.
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "lora_" in name], lr=how["lr"])
    losses = []
    for step, batch in enumerate(batches):
        inputs = {"input_ids": batch.input_ids[0], "attention_mask": batch.attention_mask[0]}
        # A PeftModel without a task type passes AdaLoraModel.forward by, and the penalty with it.
        out = model.base_model(**inputs, labels=batch.labels[0])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if allocates:
            model.base_model.update_and_allocate(step)
        losses.append(nn.functional.cross_entropy(out.logits.detach(), batch.labels[0]).item())
    pattern = model.peft_config["default"].rank_pattern if allocates else {}
    keep = {name: torch.tensor(pattern[f"{name}.lora_E.default"] if allocates else [True] * init) for name in layers}
    parts = [{n: getattr(m, f"lora_{x}")["default"].detach() for n, m in layers.items()} for x in "AEB"]
    return Script(keep, *parts, loss=sum(losses) / steps)


CASES = {
    "8 steps": (13, {}),
    "14 steps": (26, {}),
    "a mask every third step": (26, {"delta_t": 3}),
    "no mask before the final one": (26, {"delta_t": 100}),
    "no penalty": (13, {"orth": 0.0}),
    "peft's alpha": (13, {"alpha": 8.0}),
    "all ranks, no allocator": (13, {"init_mul": 1.0}),
}


def settings(how: dict[str, Any]) -> dict[str, Any]:
    return {"lr": 1e-2, "batch_size": 4, "epochs": 2} | how


def context(net: LaneNet, size: int, budgets: tuple[int, ...] = (R,)) -> ClientContext:
    return toy_context(net, toy_lanes([size]), r_max=R, budgets=budgets)


@pytest.mark.parametrize("case", CASES)
def test_one_client_is_a_plain_peft_script(case: str) -> None:
    size, how = CASES[case]
    init = R if "init_mul" in how else 3
    net = toy_net()
    ctx = context(net, size)
    batches = list(ctx.batches(ctx.training_order(2, 4, "personalise")))
    theirs = script(net, batches, init, settings(how))
    made = build_method("adalora", settings(how), R).personaliser(ctx)
    assert made.ranks is not None
    assert made.ranks[0].tolist() == [int(kept.sum()) for kept in theirs.keep.values()]
    assert made.metrics["train_loss"][0].item() == pytest.approx(theirs.loss, rel=1e-7)
    scale = how.get("alpha", 2 * init) / (init + 1e-5)
    for name, layer in zip(net.modules, net.layers, strict=True):
        kept = theirs.keep[name]
        if not kept.any():
            assert layer.a is None
            continue
        torch.testing.assert_close(layer.a[0], theirs.a[name][kept], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.b[0], theirs.b[name][:, kept], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.lam[0], theirs.e[name][kept, 0] * scale, rtol=1e-5, atol=1e-8)


def test_the_cases_do_prune_unevenly() -> None:
    made = build_method("adalora", settings({}), R).personaliser(context(toy_net(), 13))
    assert made.ranks is not None
    assert len(set(made.ranks[0].tolist())) > 1


def test_the_exported_adapters_in_plain_peft_give_the_same_logits(tmp_path: Path) -> None:
    net = toy_net(torch.float32)
    bare = plain(net)
    ctx = context(net, 13, (1, 2))
    made = build_method("adalora", settings({}), R).personaliser(ctx)
    batch = next(iter(ctx.batches(ctx.training_order(1, 4, "test"))))
    both = LaneBatch(*(x.repeat(2, *[1] * (x.dim() - 1)) for x in _tensors(batch)), shapes=batch.shapes * 2)
    with torch.no_grad():
        ours = made.logits(both)
    assert (ours[0] - ours[1]).abs().max() > 1e-4
    assert made.export is not None
    for lane in range(2):
        folder = tmp_path / str(lane)
        write_adapter(made.export(lane, "base"), folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(bare), str(folder)).eval()
        with torch.no_grad():
            theirs = loaded(input_ids=batch.input_ids[0], attention_mask=batch.attention_mask[0]).logits
        torch.testing.assert_close(ours[lane], theirs, rtol=1e-4, atol=1e-5)


def _tensors(batch: LaneBatch) -> tuple[Tensor, ...]:
    return batch.input_ids, batch.attention_mask, batch.labels, batch.valid
