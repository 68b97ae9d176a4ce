"""Toy surroundings for tests: a tiny BERT or LLaMA, clients with ragged random texts, a context over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtailor.core.files import staged_folder
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.context import ClientContext, Federation, Lane, Received, open_params
from fedtailor.federated.method import LaidOut, Method
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import Adapter, Parameters

CLASSES, VOCAB = 4, 120


@dataclass(frozen=True)
class ToyClient:
    id: str
    pool: str
    language: str
    n_train: int
    n_test: int


def toy_examples(name: str, count: int, longest: int = 9) -> Examples:
    rng = numpy_rng("toy", name)
    lengths = rng.integers(3, longest + 1, count)
    ids = np.zeros((count, int(lengths.max())), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(5, VOCAB, length)
    return Examples(ids, lengths.astype(np.int64), rng.integers(0, CLASSES, count).astype(np.int64))


def toy_lanes(sizes: Sequence[int]) -> list[Lane]:
    lanes = []
    for number, size in enumerate(sorted(sizes, reverse=True)):
        client = ToyClient(f"seen/xx/{number:02d}", "seen", "xx", size, 5)
        lanes.append(Lane(client, toy_examples(client.id, size, 6 + number)))  # type: ignore[arg-type]
    return lanes


def with_prompts(lanes: Sequence[Lane]) -> list[Lane]:
    """The same lanes, their texts read as instructions with responses."""
    return [replace(lane, train=as_talk(lane.train, lane.client.id)) for lane in lanes]  # type: ignore[arg-type]


def as_talk(examples: Examples, name: str) -> Examples:
    prompt = numpy_rng("toy", name, "prompt").integers(1, examples.lengths)
    return replace(examples, prompt_length=prompt.astype(np.int64))


def toy_llama(
    dtype: torch.dtype = torch.float64, checkpointing: bool = False, compute: str = "float32", head: bool = False
) -> LaneNet:
    """With ``head`` the output embedding is adapted, too, beside a few layers."""
    from fedtailor.models.families import adapted_linears

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        if dtype is torch.float64:
            _exact_norms(model)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.3)
    linears = adapted_linears(model, ("q_proj", "down_proj", "lm_head") if head else "all-linear")
    return LaneNet(model.to(dtype), linears, compute, checkpointing=checkpointing)


def _exact_norms(model: torch.nn.Module) -> None:
    """LLaMA's own norm computes in float32, whatever its input: float64 identities would drown in its rounding."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            model.set_submodule(name, norm)


def toy_extractor(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> LaneNet:
    """A tiny BERT that marks spans."""
    return toy_net(dtype, dropout, BertForQuestionAnswering)


def with_spans(lanes: Sequence[Lane]) -> list[Lane]:
    """The same lanes, a span to be found in each text, every fourth time none."""
    return [replace(lane, train=as_spans(lane.train, lane.client.id)) for lane in lanes]


def as_spans(examples: Examples, name: str) -> Examples:
    rng = numpy_rng("toy spans", name)
    start = rng.integers(0, examples.lengths)
    spans = np.stack([start, rng.integers(start, examples.lengths)], 1)
    spans[rng.integers(0, 4, len(spans)) == 0] = 0
    return replace(examples, spans=spans)


def toy_net(
    dtype: torch.dtype = torch.float64, dropout: float = 0.1, make: Any = BertForSequenceClassification, **sizes: int
) -> LaneNet:
    from fedtailor.models.families import adapted_linears

    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    } | sizes
    config = BertConfig(
        vocab_size=VOCAB, max_position_embeddings=32,
        num_labels=2 if make is BertForQuestionAnswering else CLASSES,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = make(config)
        for parameter in model.parameters():
            # Larger than BERT's 0.02: the toy must not be nearly linear.
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.3)
    model = model.to(dtype)
    return LaneNet(model, adapted_linears(model, "all-linear"))


class Warnings(list[tuple[str, str]]):
    """Takes what a context warns of: client and sentence."""

    def __call__(self, lane: Lane, sentence: str) -> None:
        self.append((lane.client.id, sentence))


def warnings_of(ctx: ClientContext) -> Warnings:
    assert isinstance(ctx.warn, Warnings)
    return ctx.warn


def toy_context(
    net: LaneNet,
    lanes: Sequence[Lane],
    adapter: Adapter | None = None,
    modules: Sequence[Parameters] = (),
    **more: object,
) -> ClientContext:
    params = open_params(net, len(lanes), adapter, modules, 3)
    sent = params.flat(Scope.SHARED)[:1].detach().clone()
    return ClientContext(
        net=net,
        lanes=tuple(lanes),
        params=params,
        received=Received(params.of_scope(Scope.SHARED), sent, [0] * len(lanes)),
        fresh=torch.ones(len(lanes), dtype=torch.bool),
        seed=3,
        stage="strategy",
        round=0,
        num_labels=CLASSES,
        pad_id=0,
        feature_source=lambda group, pad_to: [client_features(net, lane.train, 0, pad_to) for lane in group],
        warn=Warnings(),
        federation=Federation(tuple(f"seen/xx/{k:02d}" for k in range(4)), (5, 3, 1, 1), 4),
        **more,  # type: ignore[arg-type]
    )


def play_rounds(
    method: Method, rounds: int = 2, sizes: Sequence[int] = (9, 8, 3), net: LaneNet | None = None, **more: Any
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """SHARED rows that the server has before and after each round, (P,) float32, and the clients' PRIVATE ones."""
    net = net or toy_net()
    lanes = toy_lanes(sizes) if net.heads else with_prompts(toy_lanes(sizes))
    assert method.local_update is not None
    served, state, private = list[np.ndarray](), dict[str, Any](), dict[str, np.ndarray]()
    for number in range(rounds):
        ctx = toy_context(net, lanes, method.adapter, method.modules, rounds=rounds, **more)
        shared, own = ctx.params.flat(Scope.SHARED), ctx.params.flat(Scope.PRIVATE)
        if not served:
            served.append(shared[0].detach().numpy().astype(np.float32))
            state = method.server.init(served[0])
        with torch.no_grad():
            shared.copy_(torch.from_numpy(served[-1]))
            for k, lane in enumerate(lanes):
                if lane.client.id in private:
                    own[k] = torch.from_numpy(private[lane.client.id])
        specs, fresh = ctx.params.of_scope(Scope.SHARED), torch.tensor([x.client.id not in private for x in lanes])
        ctx = replace(ctx, round=number, fresh=fresh, received=Received(specs, shared[:1].clone(), [0] * len(lanes)))
        if method.downlink is not None:
            with torch.no_grad():
                method.downlink(ctx)
            ctx = replace(ctx, received=Received(specs, shared.clone(), range(len(lanes))))
        method.local_update(ctx)
        found = method.aggregator
        found = found.laid_out(specs) if isinstance(found, LaidOut) else found
        total = found.zero(shared.shape[1])
        for k, lane in enumerate(lanes):
            total = found.add(total, shared[k].detach().numpy().astype(np.float32), float(lane.size))
            private[lane.client.id] = own[k].detach().numpy().astype(np.float32)
        new, state = method.server.step(served[-1], found.result(total) - served[-1], state)
        served.append(new)
    return served, private


def write_adapter(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes the files of ``export_adapter`` to ``folder``, replacing it as a whole or not at all."""
    with staged_folder(folder) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)
