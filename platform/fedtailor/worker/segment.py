"""One call of a worker: a segment's clients in groups of lanes, their answers checked, clipped, masked and summed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtailor.core.errors import MethodError, TailorError
from fedtailor.core.faults import Sabotage
from fedtailor.core.messages import (
    ALL_BUDGETS,
    ClientCost,
    Failure,
    FloatArray,
    SegmentJob,
    SegmentResult,
    metric_row,
    peak_rss,
)
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import seed_for
from fedtailor.federated.checks import bad_metrics, check_personalised, check_report
from fedtailor.federated.context import ClientContext, Lane
from fedtailor.federated.release import RoundId
from fedtailor.federated.updates import clip_update
from fedtailor.worker.open_stage import OpenStage
from fedtailor.worker.scoring import rank_rows, scores_on_test, scores_on_train

BASE_REF = "base"
"""What an exported adapter calls its base model; a path of this machine would enter committed bytes."""

_FLOAT = 4


class Segment:
    """One call of `Worker.run`: collects per-client answers, then adds them in client order."""

    def __init__(
        self, stage: OpenStage, job: SegmentJob, shared: FloatArray | None, sabotage: Sabotage | None = None
    ) -> None:
        self.stage, self.job, self.received, self.sabotage = stage, job, shared, sabotage
        self.shared = (
            None if shared is None else torch.from_numpy(np.array(shared, dtype=np.float32)).to(stage.net.device)
        )
        self.result = SegmentResult(job.stage, job.round, job.index, job.attempt)
        self.rows: dict[str, FloatArray] = {}
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.answers: dict[str, list[Mapping[str, Any]]] = {}
        self.failed: dict[str, Failure] = {}
        self.tokens: dict[str, int] = {}
        self.searched: dict[str, float] = {}
        self.sent: dict[str, int] = {}
        self.partial: Any = None
        self.next = 0

    def play(self) -> SegmentResult:
        """Runs all groups; see `fedtailor.worker.worker.Worker.run`."""
        job, stage = self.job, self.stage
        self.partial = [] if not job.presum else None
        for group in stage.groups(job.clients):
            clients = [job.clients[i] for i in group]
            if stage.net.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(stage.net.device)
            started, broken = time.perf_counter(), None
            try:
                self._group(clients)
            except TailorError:
                raise
            except Exception as error:
                if stage.net.ranks is not None:
                    raise  # the ranks are out of step now: their group starts again
                broken = _without_frames(error)
            if broken is not None:
                self._one_by_one(clients, broken)
            share = (time.perf_counter() - started) / len(clients)
            self.result.seconds |= dict.fromkeys(clients, share)
            self.result.costs |= self._costs(clients)
            self._add_in_order()
        stage.net.unbind()
        result = self.result
        result.partial = self.partial
        result.valid = tuple(c for c in job.clients if c not in self.failed)
        result.failures = [self.failed[c] for c in job.clients if c in self.failed]
        result.metrics = [row for c in job.clients for row in self.metrics.get(c, [])]
        result.predictions = [dict(row) for c in job.clients for row in self.answers.get(c, [])]
        result.host = {"pid": os.getpid(), "node": platform.node(), "peak_rss_mb": peak_rss() / 2**20}
        return self.sabotage.reply(result) if self.sabotage else result

    def _one_by_one(self, clients: Sequence[str], error: Exception) -> None:
        """Names the client that broke the group: runs it again lane by lane."""
        if len(clients) > 1:
            self.result.warnings.append({"kind": "group-rerun", "clients": list(clients), "reason": _reason(error)})
        for client in clients:
            self._forget(client)
            self.failed.pop(client, None)
            try:
                if len(clients) == 1:
                    raise error
                self._group([client])
            except TailorError:
                raise
            except Exception as own:
                self.failed[client] = Failure(client, self.job.stage, self.job.round, "exception", _reason(own))

    def _group(self, clients: Sequence[str]) -> None:
        job = self.job
        ctx = self.stage.context(clients, job.round, self.shared, job.private, self._warn, job.overlay)
        # Of torch's global stream, which only a base's own dropout draws from (one client at a time).
        torch.manual_seed(seed_for(ctx.seed, ctx.stage, ctx.round, ctx.lanes[0].client.id, "base-dropout"))
        with self.sabotage.during(clients, self.stage.net.model) if self.sabotage else nullcontext():
            try:
                self._personalise(ctx) if self.stage.spec.kind == "personalise" else self._update(ctx)
            except MethodError as broken:
                raise MethodError(f"{self.stage.who}: {broken}") from broken
            finally:
                self.tokens |= {client: ctx.trained[client] for client in clients}
                self.searched |= ctx.searched
                self.sent |= {client: ctx.received.numbers(k) for k, client in enumerate(clients)}

    def _update(self, ctx: ClientContext) -> None:
        update = self.stage.method.local_update
        if update is None:
            raise TailorError(f"method {self.stage.method.name} has no local update: it cannot take part in rounds")
        report = check_report(update(ctx), len(ctx.lanes))
        shared, private = ctx.params.flat(Scope.SHARED), ctx.params.flat(Scope.PRIVATE)
        for k, lane in enumerate(ctx.lanes):
            client = lane.client.id
            # Copies: a lane's buffer is reused by the next group.
            row = shared[k].detach().cpu().numpy().astype(np.float32, copy=True)
            own = private[k].detach().cpu().numpy().astype(np.float32, copy=True)
            received = self.received
            if received is not None and self.stage.method.downlink is not None:
                received = ctx.received.row(k).cpu().numpy()
            if self.stage.attack and received is not None:
                row = self.stage.attack.sent(client, row, received, ctx.seed, ctx.stage, ctx.round)
            if self.sabotage:
                changed = self.sabotage.update(client, row)
                if changed is None:  # what a rejection must be equal to
                    self._leave_out(client, "absent", "left out by a fault plan")
                    continue
                row = changed
            if not (np.isfinite(row).all() and np.isfinite(own).all()):
                self._reject(client, "NaN or Inf in the update")
                continue
            if bad := bad_metrics(report.metrics, k):
                self._reject(client, f"NaN or Inf in the metrics {bad}")
                continue
            norm = 0.0
            if received is not None:
                row, norm = clip_update(row, received, self.stage.method.bound)
            self.rows[client] = row
            if self.stage.method.masking is None:
                self.result.norms[client] = norm
            if own.size:
                self.result.private[client] = own
            self.metrics[client] = self._metric_rows(report.metrics, k, lane)

    def _metric_rows(self, metrics: Mapping[str, Tensor], k: int, lane: Lane) -> list[dict[str, Any]]:
        return [
            self._row(lane, metric=name, value=float(values[k]), weight=float(lane.size))
            for name, values in metrics.items()
        ]

    def _row(self, lane: Lane, **values: Any) -> dict[str, Any]:
        spec, client = self.stage.spec, lane.client
        return metric_row(
            stage=spec.key.split("/")[0], method=spec.method, seed=spec.seed, round=self.job.round, pool=client.pool,
            client=client.id, budget=-1 if lane.budget is None else lane.budget,
            **{"language": client.language, **values},
        )  # fmt: skip

    def _personalise(self, ctx: ClientContext) -> None:
        spec = self.stage.spec
        personaliser = self.stage.method.personaliser
        classes = ctx.num_labels if self.stage.data.kind == "classification" else None
        made = check_personalised(personaliser(ctx), ctx, personaliser, classes)
        ctx.net.train_mode(False)
        scores = scores_on_test(self.stage, made)
        fitted = scores_on_train(self.stage, made) if spec.personalise.score_train else [()] * len(scores)
        for client, lam in made.strategy.items():
            self.result.tensors[client] = lam.detach().cpu().numpy().astype(np.float32, copy=True)
        for k, (lane, score) in enumerate(zip(made.lanes, scores, strict=True)):
            client = lane.client.id
            if client in self.failed:
                continue  # one bad budget rejects the client whole
            if not np.isfinite(score.loss):
                self._reject(client, f"test loss is {score.loss}, by Personalised.logits")
                continue
            if bad := bad_metrics({**made.metrics, **made.spectra}, k):
                self._reject(client, f"NaN or Inf in the metrics {bad}")
                continue
            rows = self.metrics.setdefault(client, [])
            rows += [self._row(lane, **values) for values in (*score.rows, *fitted[k])]
            rows += [self._row(lane, **values) for values in rank_rows(self.stage, made, k)]
            self.answers.setdefault(client, []).extend(score.answers)
            rows += self._metric_rows(made.metrics, k, lane)
            if self.stage.overlay is not None and client not in self.job.overlay:
                rows.append(self._row(lane, metric="initial_overlay", value=1.0, weight=float(lane.size)))
            if spec.save_adapters and made.export is not None:
                at = ALL_BUDGETS if lane.budget is None else f"r{lane.budget}"
                self.result.adapters[f"{at}/{client}"] = made.export(k, BASE_REF)

    def _reject(self, client: str, found: str) -> None:
        reason = f"{found}; updates, metrics and logits of {self.stage.who} must be finite"
        self._leave_out(client, "rejected", reason)

    def _leave_out(self, client: str, kind: str, reason: str) -> None:
        self._forget(client)
        self.failed[client] = Failure(client, self.job.stage, self.job.round, kind, reason)

    def _forget(self, client: str) -> None:
        result = self.result
        for record in (self.rows, self.metrics, self.answers, result.private, result.tensors, result.norms):
            record.pop(client, None)
        result.adapters = {lane: files for lane, files in result.adapters.items() if lane.partition("/")[2] != client}

    def _warn(self, lane: Lane, sentence: str) -> None:
        self.result.warnings.append({"kind": "client-warning", "client": lane.client.id, "reason": sentence})

    def _add_in_order(self) -> None:
        """Adds every client whose predecessors are done; keeps no more rows than it must."""
        if self.stage.spec.kind == "personalise":
            return
        aggregator = self.stage.method.aggregator
        while self.next < len(self.job.clients):
            client = self.job.clients[self.next]
            if client in self.rows:
                row, weight = self.rows.pop(client), float(self.stage.data.client(client).n_train)
                size, row = row.size, self._masked(client, row, weight)
                if row is None:
                    continue
                if self.job.presum:
                    state = aggregator.zero(size) if self.partial is None else self.partial
                    self.partial = aggregator.add(state, row, weight)
                else:
                    self.partial.append((client, row, weight))
            elif client not in self.failed:
                return
            self.next += 1

    def _masked(self, client: str, row: FloatArray, weight: float) -> Any:
        """What the client sends; None if it vanished (it is then among the failed)."""
        masking, job = self.stage.method.masking, self.job
        if masking is None or self.received is None:
            return row
        round_id = RoundId(self.stage.spec.seed, job.stage, job.round, job.cohort)
        sent = masking.mask(row, np.asarray(self.received, np.float32), weight, client, round_id)
        if sent.clamped:
            reason = "values beyond 'privacy.secagg.range' were cut to it"
            self.result.warnings.append(
                {"kind": "clamped", "client": client, "numbers": sent.clamped, "reason": reason}
            )
        if sent.vector is None:
            self._leave_out(client, "absent", "vanished after masking ('privacy.secagg.dropout')")
        return sent.vector

    def _costs(self, clients: Sequence[str]) -> dict[str, ClientCost]:
        """Costs of a group that has just been played; its clients share its memory peaks."""
        job, device = self.job, self.stage.net.device
        gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        there, whole = self.stage.method.pooled != "no", 0 if self.shared is None else self.shared.numel()
        costs = {}
        for client in clients:
            down = 0 if there else self.sent.get(client, whole)  # by default where it failed before it began
            up = down if client in self.rows else 0
            kept = sum(rows[client].size for rows in (self.result.private, job.overlay) if client in rows)
            costs[client] = ClientCost(
                examples=self.stage.data.client(client).n_train, tokens=self.tokens.get(client, 0),
                bytes_down=_FLOAT * down, bytes_up=_FLOAT * up, bytes_kept=_FLOAT * kept, peak_rss=peak_rss(),
                peak_gpu=gpu, attempt=job.attempt, host=platform.node(), pid=os.getpid(),
                search_seconds=self.searched.get(client, 0.0),
            )  # fmt: skip
        return costs


def _without_frames(error: Exception) -> Exception:
    """The error without the frames that it passed through: they hold the group's activations, and where memory ran out
    that is what the clients need to run one by one."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
