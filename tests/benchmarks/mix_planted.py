"""pFedGPT's search where the optimum is known, and what its candidates cost as lanes.

``python -m mix_planted optimum [seeds [case [first]]]``: a tiny LLaMA answers as it would with the client's own LoRA in
one cluster of layers and the common one in the rest; its answers are the validation rows. The excess of a mix is its
loss above that of the planted one, as a share of that of w = 0; below 0 it fits the drawn answers better than what drew
them. ``python -m mix_planted lanes``: seconds of one client's 20 candidates, four lanes at a time and one after
another, at rows of 8, 60 and 256 tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from toy import ToyClient, toy_context
from transformers import LlamaConfig, LlamaForCausalLM

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import numpy_rng, torch_rng
from fedtailor.federated.context import Lane
from fedtailor.lanes.batches import Examples, make_batch
from fedtailor.lanes.net import LaneNet
from fedtailor.models.families import adapted_linears
from fedtailor.training.mix_trials import Spread, Trials, by_group
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import BayesianSearch, DesignSearch, Known, Points, Search, ends, sobol

ROWS, PROMPT, ANSWER, VOCAB = 160, 3, 6, 60
REPEATS = 3


def net_of(blocks: int, width: int, vocab: int = VOCAB) -> LaneNet:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.15)
    return LaneNet(model, adapted_linears(model, "all-linear"))


def rows_of(count: int, tokens: int, prompt: int, *where: int | str, vocab: int = VOCAB) -> Examples:
    rng = numpy_rng(*where)
    ids = rng.integers(5, vocab, (count, tokens))
    full = np.full(count, tokens)
    return Examples(ids, full, np.zeros(count, np.int64), prompt_length=np.full(count, prompt))


def mixtures_of(net: LaneNet, targets: tuple[str, ...], seed: int, size: float) -> Mixtures:
    adapter = LoraAdapter(4, 2.0, Scope.SHARED, targets=targets)
    lane = Lane(ToyClient("seen/xx/00", "seen", "xx", 2, 1), rows_of(2, 8, 2, seed))  # type: ignore[arg-type]
    ctx = toy_context(net, [lane], adapter)
    rng = torch_rng("planted", seed)
    own, received = (
        {name: size * torch.randn(ctx.params[name].shape, generator=rng) for name in adapter.names(net)} for _ in "lg"
    )
    return Mixtures(ctx, adapter, own, received)


@torch.no_grad()
def answered(mixtures: Mixtures, shares: Points, seed: int) -> Examples:
    """Prompts with answers that are drawn from the model of a mix."""
    texts, rng = rows_of(ROWS, PROMPT + ANSWER, PROMPT, "answers", seed), torch_rng("answers", seed)
    net = mixtures.ctx.net
    mixtures.bound([0], shares, trained=False)
    for column in range(PROMPT, PROMPT + ANSWER):
        batch = make_batch([texts], [np.arange(ROWS)], 0)
        logits = net.scores(net.hidden(batch)[:, column - 1].unsqueeze(0))[0]
        texts.input_ids[:, column] = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0].numpy()
    return texts


CASES = ((("query", "value"), 64), (("query", "value"), 20), (("query", "key", "value"), 20))
"""Projections, of two clusters each, and evaluations."""


def optimum(seeds: int = 20, case: int | None = None, first: int = 0) -> None:
    """Prints, of each case, how near the search came and what it left of the excess."""
    net = net_of(4, 32)
    print("dims  evaluations  within .1  excess left, median: HBO  random  (seconds)")
    for targets, count in CASES if case is None else CASES[case : case + 1]:
        near, left, chance, began = 0, [], [], time.perf_counter()
        dims = 2 * len(targets)
        for seed in range(first, first + seeds):
            mixtures = mixtures_of(net, targets, seed, 0.5)
            # Per projection the first two blocks and the last two: layers come block by block.
            groups = np.array([2 * kind + (block > 1) for block in range(4) for kind in range(len(targets))])
            spread, target = by_group(groups), np.zeros((1, dims))
            target[0, int(numpy_rng("cluster", seed).integers(dims))] = 1.0
            texts = answered(mixtures, spread(target), seed)
            least, most = played(mixtures, spread, texts, DesignSearch(np.concatenate([target, ends(dims)[:1]])), 2).y
            design = np.concatenate([ends(dims), sobol(dims, 3, seed)])
            search = BayesianSearch(Known.none(dims), design, (seed,))
            drawn = np.concatenate([ends(dims), numpy_rng("random", seed).random((count - 2, dims))])
            found = played(mixtures, spread, texts, search, count)
            other = played(mixtures, spread, texts, DesignSearch(drawn), count)
            best = found.best(1)[0]
            near += bool(np.abs(best - target).max() <= 0.1)
            if np.abs(best - target).max() > 0.1:
                print(f"  seed {seed}: {best} for {target[0]}, excess {(found.y.min() - least) / (most - least):.4f}")
            left.append((found.y.min() - least) / (most - least))
            chance.append((other.y.min() - least) / (most - least))
        print(
            f"{dims:4} {count:12} {near:6} of {seeds} {median(left):24.3f} {median(chance):8.3f}  "
            f"({time.perf_counter() - began:.0f})"
        )


def played(mixtures: Mixtures, spread: Spread, texts: Examples, search: Search, count: int) -> Known:
    Trials(mixtures, [0]).run([search], [spread], [texts], count, 4)
    known: Known = search.known  # type: ignore[attr-defined]
    return known


def lanes(lengths: Sequence[int] = (8, 60, 256), rows: int = 10) -> None:
    """Prints seconds of 20 candidates on ten rows: four lanes a pass, and one."""
    net = net_of(4, 128, 4000)
    for tokens in lengths:
        mixtures = mixtures_of(net, ("query", "value"), 0, 0.1)
        mixtures = replace(mixtures, ctx=replace(mixtures.ctx, token_budget=4096))
        texts = rows_of(rows, tokens, tokens // 2, "lanes", tokens, vocab=4000)
        points = numpy_rng("lanes").random((20, len(mixtures.layers)))
        shares, taken = by_group(np.arange(len(mixtures.layers)))(points), dict[int, list[float]]()
        for _ in range(REPEATS):
            for width in (4, 1):
                began = time.perf_counter()
                for start in range(0, 20, width):
                    mixtures.losses([0] * width, shares[start : start + width], [texts] * width)
                taken.setdefault(width, []).append(time.perf_counter() - began)
        side, alone = (median(taken[width]) for width in (4, 1))
        print(f"{tokens:4} tokens: {side:.3f} s as lanes, {alone:.3f} s one after another, {alone / side:.2f}x")


if __name__ == "__main__":
    torch.set_num_threads(1)
    optimum(*map(int, sys.argv[2:])) if sys.argv[1] == "optimum" else lanes()
