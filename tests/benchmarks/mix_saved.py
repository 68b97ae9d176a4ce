"""pFedGPT's search alone, on the LoRAs that the clients of a finished run have: ablations without training again.

``python tests/benchmarks/mix_saved.py STORAGE RUN_ID [--clients N] [--seed 42] [--out FILE.json] [VARIANT ...]`` opens
what a run of ``pfedgpt`` committed last, in the run's own configuration and in this process, as its personalising stage
does, and has every client with a LoRA of its own (whatever its slow start says) look for a mix with the common one.
Variants (default: all): rows of Table 4 and rivals with as many evaluations, ``whole``, ``stage 1, low``, ..., ``always
high``, ``random``, ``grid``; sample weights of Figure 3, ``weight 1/8``, ``1/4``, ``1/2``, ``1``. Table 4's row without
slow start is not among them: slow start decides what is trained.

Losses of V are means over tokens, as the search sees them; test losses means over a client's test rows, those that the
run scored. V differs between sample weights, so only test losses compare them. Seconds are those of one client's
search; embeddings and clusters of rows, which a run makes once, are made before. p: paired t over clients.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.gaussian_process  # noqa: F401  # else the first search would load it
import torch
from scipy.stats import ttest_rel

from fedtailor.core.config import validate
from fedtailor.core.errors import ConfigError, TailorError, did_you_mean
from fedtailor.evaluation.generation import response_losses
from fedtailor.experiment.config import base_seed
from fedtailor.experiment.prepare import model_artifact
from fedtailor.experiment.stage_results import EarlierStages
from fedtailor.experiment.tokenising import tokens_artifact
from fedtailor.federated.context import ClientContext
from fedtailor.methods import METHODS
from fedtailor.methods.pfedgpt import PFedGptConfig, Space, SpaceConfig
from fedtailor.personalise.trained import TrainedMethod, open_method, personal_stage
from fedtailor.storage.artifacts import artifact_path, fetch
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.store import TaskData
from fedtailor.training.mixed_start import MixConfig, MixedStart
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import DECIMALS, Points
from fedtailor.worker.open_stage import OpenStage

METHOD, WHOLE, RECEIVED, OWN = "pfedgpt", "whole", "w = 0", "w = 1"
COLUMNS = {
    "evaluations": 1, "tokens": 0, "wall s": 3, "CPU s": 3, "V: w = 0": 4, "V: w = 1": 4, "V: mix": 4, "w": 2,
    "clusters": 1, "test": 4,
}  # fmt: skip
"""What is measured of a client, and its digits."""
Rows = dict[str, dict[str, float]]
"""Of each client."""


def variants(run: PFedGptConfig) -> dict[str, tuple[str, MixConfig]]:
    """Method and configuration by name; what none names is the run's."""
    given = {**run.model_dump(), "stages": "both", "fidelity": "low_to_high"}

    def of(method: str = METHOD, **keys: Any) -> tuple[str, Any]:
        kind, tree = METHODS[method].config, {**given, **keys}
        return method, validate(kind, {key: tree[key] for key in kind.model_fields if key in tree})

    count = sum(of(fidelity="high")[1].budget)
    known = {
        f"stage {number}, {fidelity}": of(stages=stages, fidelity=fidelity)
        for number, stages in enumerate(("one", "two"), start=1)
        for fidelity in ("low", "high")
    }
    known |= {WHOLE: of(), "always high": of(fidelity="high")}
    known["random"] = of("mix_random", evaluations=sum(run.evaluations))
    known["grid"] = of("mix_grid", weights=tuple(np.linspace(0, 1, count).round(DECIMALS).tolist()))
    if run.validation == "global_pool":  # rows of a client's own are no share of a pool
        known |= {f"weight {share}": of(sample_weight=float(Fraction(share))) for share in ("1/8", "1/4", "1/2", "1")}
    return known


@dataclass(frozen=True)
class Pairs:
    """A group of clients with all mixes of their two LoRAs.

    Args:
        stage: the personalising stage.
        ctx: the clients.
        start: how the run mixes; embeddings and clusters of all variants are kept in its ``rows``.
        mixtures: of all clients.
        ends: shares of w = 0 and of w = 1, (L, 2) each.
    """

    stage: OpenStage
    ctx: ClientContext
    start: MixedStart
    mixtures: Mixtures
    ends: tuple[Points, Points]

    @classmethod
    def of(cls, stage: OpenStage, ctx: ClientContext) -> Pairs:
        start: Any = stage.method.local_update
        sent, own = start.pair.first.names(ctx.net), start.pair.second.names(ctx.net)
        ours = {name: ctx.params[mine].detach() for name, mine in zip(sent, own, strict=True)}
        received = {name: ctx.received[name].clone() for name in sent}
        mixtures = Mixtures(ctx, start.pair.first, ours, received, start.cfg.mix)
        common = np.tile([0.0, 1.0], (len(mixtures.layers), 1))
        return cls(stage, ctx, start, mixtures, (common, 1 - common))

    def tests(self, shares: Sequence[Points]) -> dict[str, float]:
        """Test loss of a mix of each client, as the stage scores its models."""
        stage, ids = self.stage, [lane.client.id for lane in self.ctx.lanes]
        texts = [stage.data.examples(client, "test").rows(slice(stage.spec.decoding.max_test)) for client in ids]
        self.mixtures.bound(range(len(ids)), np.stack(shares), trained=False)
        found = response_losses(stage.net, texts, self.ctx.pad_id, self.ctx.token_budget)
        stage.net.unbind()
        return {client: float(losses.mean()) for client, losses in zip(ids, found, strict=True)}

    def searched(self, method: str, cfg: MixConfig) -> Rows:
        """What a variant finds for each client, and what that takes."""
        ctx, found, chosen = self.ctx, Rows(), list[Points]()
        update: Any = METHODS[method].build(cfg, ctx.r_max).local_update
        rows = replace(self.start.rows, cfg=cfg).of(ctx, range(len(ctx.lanes)))
        for k, (lane, scored) in enumerate(zip(ctx.lanes, rows, strict=True)):
            wall, cpu = time.perf_counter(), time.process_time()
            choice = update.choose(ctx)(self.mixtures, [k], [scored])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            [shares] = choice.shares
            on_v = self.mixtures.losses([k] * 3, np.stack([*self.ends, shares]), [scored.high] * 3)
            values = [*choice.evaluations, *choice.tokens, wall, cpu, *on_v, shares[:, 0].mean()]
            if isinstance(cfg, SpaceConfig) and getattr(cfg, "stages", "two") != "one":
                values.append(Space.of(ctx, update.memory, update.pair.second, [k], cfg).personal[0].max() + 1)
            found[lane.client.id] = dict(zip(COLUMNS, map(float, values), strict=False))
            chosen.append(shares)
        return {client: found[client] | {"test": loss} for client, loss in self.tests(chosen).items()}


def opened(trained: TrainedMethod, seed: int, most: int | None) -> Iterator[Pairs]:
    """The clients that have a LoRA of their own, in the groups of lanes of the personalising stage."""
    run, exp = trained.run, trained.exp
    data = personal_stage(run, METHOD, seed, None)["data"]
    model = model_artifact(exp, base_seed(exp, seed), TaskData.open(fetch(run.storage, artifact_path(data))))
    tokens = fetch(run.storage, artifact_path(tokens_artifact(exp, data, model)))
    stage = OpenStage.open(trained.spec(METHOD, tokens, exp.engine.device))
    earlier, info = EarlierStages(run.storage, exp), stage.info()
    own = earlier.private(trained.stage, info)([client.id for client in stage.data.pool("seen")])
    clients, shared = list(own)[:most], torch.from_numpy(trained.shared(info)).to(stage.net.device)
    if not clients:
        raise ConfigError(f"run '{run.run_id}': no client has a LoRA of its own")
    for group in stage.groups(clients):
        ids = [clients[i] for i in group]
        overlay = earlier.overlay(trained.stage)(ids)
        yield Pairs.of(stage, stage.context(ids, 0, shared, own, lambda lane, what: None, overlay))


def committed(trained: TrainedMethod, seed: int) -> dict[str, float]:
    """Test losses that the run noted of its clients' own LoRAs; none where its models are something else."""
    rows = trained.run.metrics("personalise")
    rows = rows[(rows.method == METHOD) & (rows.seed == seed) & (rows.metric == "loss")]
    sums = rows.assign(value=rows.value * rows.weight).groupby("client")[["value", "weight"]].sum()
    return dict(sums.value / sums.weight) if getattr(trained.settings, "final", "") == "trained" else {}


def apart(found: Mapping[str, Rows], name: str, other: str) -> str:
    """Mean difference of test losses, and its p."""
    if name == other or other not in found:
        return "–"
    one, two = (np.array([row["test"] for row in found[each].values()]) for each in (name, other))
    p = f"{ttest_rel(one, two).pvalue:.3f}" if len(one) > 1 and np.ptp(one - two) > 0 else "–"
    return f"{(one - two).mean():+.4f} ({p})"


def table(found: Mapping[str, Rows]) -> Iterator[str]:
    """Markdown, a row per variant: means over clients."""
    yield f"| | {' | '.join(COLUMNS)} | less {WHOLE} (p) | less {RECEIVED} (p) |"
    yield "|---|" + "--:|" * (len(COLUMNS) + 2)
    for name, rows in found.items():
        columns = {key: [row[key] for row in rows.values() if key in row] for key in COLUMNS}
        cells = [f"{np.mean(own):,.{COLUMNS[key]}f}" if own else "–" for key, own in columns.items()]
        yield f"| {' | '.join([name, *cells, apart(found, name, WHOLE), apart(found, name, RECEIVED)])} |"


def compare(words: Sequence[str]) -> None:
    """Reads the words, searches, prints the table."""
    parser = argparse.ArgumentParser(prog="mix_saved.py")
    parser.add_argument("storage")
    parser.add_argument("run_id")
    parser.add_argument("variant", nargs="*")
    parser.add_argument("--clients", type=int, metavar="N", help="the first N alone")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="numbers of every client")
    args = parser.parse_intermixed_args(words)
    if args.clients is not None and args.clients < 1:
        raise ConfigError(f"--clients {args.clients}: allowed are 1 and more")
    run = RunFolder.open(Storage(args.storage), args.run_id)
    if METHOD not in (methods := run.info()["config"]["methods"]):
        raise ConfigError(f"run '{args.run_id}' has no {METHOD} (its methods: {', '.join(methods)})")
    trained = open_method(run, METHOD, seed=args.seed)
    if not trained.answers or not isinstance(trained.settings, PFedGptConfig):
        raise ConfigError(f"run '{args.run_id}' classifies texts; response losses are of runs whose models answer")
    known = variants(trained.settings)
    for name in args.variant:
        if name not in known:
            raise ConfigError(f"variant '{name}'{did_you_mean(name, known)} (allowed here: {'; '.join(known)})")
    asked = list(dict.fromkeys(args.variant or known))
    found: dict[str, Rows] = {name: {} for name in (RECEIVED, OWN, *asked)}
    for pairs in opened(trained, args.seed, args.clients):
        for w, name in enumerate((RECEIVED, OWN)):
            losses = pairs.tests([pairs.ends[w]] * len(pairs.ctx.lanes))
            found[name] |= {client: {"w": float(w), "test": loss} for client, loss in losses.items()}
        for name in asked:
            found[name] |= pairs.searched(*known[name])
    print(f"run {args.run_id}, seed {args.seed}, {len(found[OWN])} clients", "", *table(found), sep="\n")
    noted = committed(trained, args.seed)
    if gaps := [abs(row["test"] - noted[client]) for client, row in found[OWN].items() if client in noted]:
        print(f"\nw = 1 against what the run noted of its clients' own LoRAs: at most {max(gaps):.1e} apart")
    if args.out:
        configs = {name: known[name][1].model_dump() for name in asked}
        args.out.write_text(json.dumps({"seed": args.seed, "configs": configs, "clients": found}, indent=1) + "\n")


def main(words: Sequence[str]) -> int:
    """2 and one line where something is wrong."""
    try:
        compare(words)
    except TailorError as error:
        print(*f"error: {error}".split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
