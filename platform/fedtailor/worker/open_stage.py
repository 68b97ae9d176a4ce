"""A stage opened on a worker: resident model, method, data and parameters.

The frozen model is in one process, or on the ranks of a group together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import MethodError
from fedtailor.core.messages import FloatArray, StageInfo, StageSpec
from fedtailor.core.scope import ParamSpec, Ranks, Scope
from fedtailor.core.settings import AttackConfig, ModelConfig
from fedtailor.federated.checks import check_overlay
from fedtailor.federated.context import ClientContext, Federation, Lane, Received, open_params
from fedtailor.federated.method import LaidOut, Method, Overlay
from fedtailor.federated.updates import Attack, attack_of
from fedtailor.lanes.features import FeatureCache
from fedtailor.lanes.grouping import Load, lane_groups
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams, Parameters
from fedtailor.lanes.probe import probe
from fedtailor.methods import build_method
from fedtailor.methods.build import build_server_side
from fedtailor.methods.external import add_method
from fedtailor.models.families import adapted_linears, notices
from fedtailor.models.load import load_base, load_tokenizer
from fedtailor.models.zero import load_partitioned
from fedtailor.tasks.source import TaskKind
from fedtailor.tasks.tokens import TokenData


@dataclass
class OpenStage:
    """Everything that stays between segments of one stage.

    Args:
        spec: what was opened.
        data: tokenised clients.
        net: resident model.
        method: built record.
        params: parameters by number of lanes, reused from group to group.
        initial: initial values of all parameters, copied once.
    """

    spec: StageSpec
    data: TokenData
    net: LaneNet
    method: Method
    features: FeatureCache
    params: dict[int, LaneParams]
    initial: dict[str, Tensor]
    overlay: Overlay | None = None
    attack: Attack | None = None

    @classmethod
    def open(cls, spec: StageSpec, net: LaneNet | None = None, ranks: Ranks | None = None) -> OpenStage:
        """Loads data and, unless an unchanged one is handed in, the model."""
        torch.set_num_threads(spec.engine.threads)
        for reference in spec.code.values():
            add_method(reference, "code")
        method = build_server_side(spec.method, spec.method_config, spec.r_max, spec.server_side)
        data = TokenData.open(Path(spec.data_dir), method.validation_pool)
        if net is None:
            net = load_stage_net(spec, data, ranks)
        net.clear_overlay()
        overlay = build_method(spec.base_method, spec.base_config, spec.r_max).overlay if spec.base_method else None
        lies = AttackConfig.model_validate(dict(spec.server_side.get("attack", {})))
        attack = attack_of(lies, [client.id for client in data.pool("seen")])
        stage = cls(spec, data, net, method, FeatureCache(spec.cache_dir), {}, {}, overlay, attack)
        if isinstance(method.aggregator, LaidOut):
            stage.method = replace(method, aggregator=method.aggregator.laid_out(stage.specs(Scope.SHARED)))
        for part in stage.parts():
            stage.initial |= {name: value.clone() for name, value in part.initial(net, spec.seed).items()}
        try:
            check_overlay(method.overlay, stage.specs(Scope.PRIVATE), net)
        except MethodError as broken:
            raise MethodError(f"{stage.who}: {broken}") from broken
        return stage

    @property
    def trains_base(self) -> bool:
        """Whether the resident weights themselves change."""
        return self.method.adapter is not None and self.method.adapter.trains_base

    @property
    def who(self) -> str:
        """How an error names what runs here."""
        return f"method {self.spec.method}, stage {self.spec.key}"

    @cached_property
    def federation(self) -> Federation:
        """What the server knows of the clients."""
        return Federation(tuple(c.id for c in self.data.pool("seen")), self.data.class_counts(), self.spec.cohort)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model's folder, loaded at first use: it turns a generation task's tokens into text."""
        return load_tokenizer(self.spec.model_dir, padded=False)

    def parts(self) -> list[Parameters]:
        """Adapter and auxiliary modules."""
        return [*([self.method.adapter] if self.method.adapter else []), *self.method.modules]

    def specs(self, scope: Scope) -> tuple[ParamSpec, ...]:
        """Declared parameters of a scope, in flat order."""
        return tuple(s for part in self.parts() for s in part.specs(self.net) if s.scope is scope)

    def info(self) -> StageInfo:
        """What the driver needs to know."""
        params = self._lanes(1)
        self._reset(params, None, [None])
        initial = params.flat(Scope.SHARED)[0].detach().float().cpu().numpy().copy()
        adapter = self.method.adapter
        said = () if self.trains_base else notices(self.net, self.spec.model.targets)
        return StageInfo(
            self.specs(Scope.SHARED), self.specs(Scope.PRIVATE), initial, self.net.modules,
            adapter.r_init if adapter else 0, said,
        )  # fmt: skip

    def groups(self, clients: Sequence[str]) -> list[list[int]]:
        """Client indices that share a forward pass."""
        personalising = self.spec.kind == "personalise"
        each = len(self.spec.budgets) if personalising and self.method.personaliser.budgeted else 1
        alone = not self.method.lanes or self.net.base_dropout > 0
        loads = [Load(self.data.client(c).n_train, self.data.longest(c)) for c in clients]
        most = each if alone else self.spec.engine.max_lanes
        return lane_groups(loads, self.method.batch_size, each, self.spec.engine.token_budget, most)

    def context(
        self,
        clients: Sequence[str],
        job_round: int,
        shared: Tensor | None,
        private: Mapping[str, FloatArray],
        warn: Any,
        overlay: Mapping[str, FloatArray] | None = None,
    ) -> ClientContext:
        """Lanes of ``clients`` with their parameters in place.

        Args:
            clients: ordered by falling number of examples.
            job_round: round index.
            shared: (P,) on the worker's device, or None.
            private: rows of the clients that have some.
            warn: called with (lane, sentence).
            overlay: what clients keep of their base, where the base has such rows.
        """
        spec = self.spec
        self._lay_over(clients, overlay or {})
        lanes = tuple(Lane(self.data.client(c), self.data.examples(c, "train")) for c in clients)
        params = self._lanes(len(lanes))
        sent = self._sent(params, shared)
        self._reset(params, sent, [private.get(c) for c in clients])
        ctx = ClientContext(
            net=self.net, lanes=lanes, params=params, seed=spec.seed, stage=spec.key.split("/")[0],
            round=0 if spec.kind == "personalise" else job_round, num_labels=self.data.num_labels,
            pad_id=self.data.pad_id, feature_source=self._features, warn=warn, budgets=spec.budgets, r_max=spec.r_max,
            rounds=spec.rounds, received=self._received(params, sent),
            fresh=torch.tensor([c not in private for c in clients], device=self.net.device),
            federation=self.federation, token_budget=spec.engine.token_budget,
            micro_batch=spec.engine.micro_batch, validation=self.data.validation,
        )  # fmt: skip
        if self.method.downlink is None or sent is None:
            return ctx
        with torch.no_grad():
            numbers = self.method.downlink(ctx)
            return replace(ctx, received=self._received(params, params.flat(Scope.SHARED).detach().clone(), numbers))

    def _lay_over(self, clients: Sequence[str], rows: Mapping[str, FloatArray]) -> None:
        """Binds each client's part of the base; clients without a row get the initial one."""
        if self.overlay is None:
            return
        specs = self.overlay.specs(self.net)
        params = LaneParams(specs, len(clients), self.net.device, self.net.param_dtype, trained=False)
        if any(client not in rows for client in clients):
            for name, value in self.overlay.initial(self.net, self.spec.seed).items():
                params.set(name, value.to(self.net.device, self.net.param_dtype))
        for lane, client in enumerate(clients):
            if client in rows:
                params.flat(Scope.PRIVATE)[lane].copy_(torch.from_numpy(rows[client].copy()))
        self.overlay.bind(self.net, params)
        self.net.overlay_index = {client: lane for lane, client in enumerate(clients)}
        self.net.place(clients)

    def _features(self, lanes: Sequence[Lane], pad_to: int | None) -> list[Tensor]:
        before, found = self.net.state.overlay_rows, []
        try:
            for x in lanes:
                # One client is computed alone, on its own base.
                self.net.place([x.client.id])
                found.append(self.features.get(self.net, x.client.id, x.train, self.data.pad_id, pad_to))
        finally:
            self.net.state.overlay_rows = before
        return found

    def _lanes(self, count: int) -> LaneParams:
        if count not in self.params:
            self.params[count] = open_params(self.net, count, self.method.adapter, self.method.modules, self.spec.seed)
        params = self.params[count]
        self.net.unbind()
        if self.method.adapter:
            self.method.adapter.bind(self.net, params)
        return params

    @torch.no_grad()
    def _reset(self, params: LaneParams, sent: Tensor | None, private: Sequence[FloatArray | None]) -> None:
        """Received SHARED, stored PRIVATE, initial EPHEMERAL values; copies, never references."""
        for scope in (Scope.SHARED, Scope.PRIVATE, Scope.EPHEMERAL):
            if scope is not Scope.SHARED or sent is None:
                params.flat(scope).zero_()
                for spec in params.of_scope(scope):
                    if spec.name in self.initial:
                        params.set(spec.name, self.initial[spec.name].to(params.flat(scope)))
        if sent is not None:
            params.flat(Scope.SHARED).copy_(sent)
        for lane, row in enumerate(private):
            if row is not None:
                params.flat(Scope.PRIVATE)[lane].copy_(torch.from_numpy(row.copy()))

    def _sent(self, params: LaneParams, shared: Tensor | None) -> Tensor | None:
        """What the server sends, (1, P)."""
        if shared is None:
            return None
        size = params.flat(Scope.SHARED).shape[1]
        if shared.shape != (size,):
            raise ValueError(f"SHARED state has {tuple(shared.shape)} numbers, the method declares {size}")
        return shared.unsqueeze(0)

    def _received(self, params: LaneParams, sent: Tensor | None, numbers: Sequence[int] | None = None) -> Received:
        if sent is None:
            return Received((), torch.empty(1, 0), range(params.lanes))
        rows = range(params.lanes) if len(sent) > 1 else [0] * params.lanes
        return Received(params.of_scope(Scope.SHARED), sent.to(params.flat(Scope.SHARED).dtype), rows, numbers)


def load_net(
    folder: Path,
    model: ModelConfig,
    labels: Sequence[str],
    kind: TaskKind = "classification",
    device: str = "cpu",
    dtype: str = "float32",
    pad_id: int | None = None,
) -> LaneNet:
    """A frozen model with its adapted layers wrapped.

    Args:
        folder: Hugging Face folder of the model.
        model: how the base is kept, and which of its layers to adapt.
        labels: class names in the order of their ids; unused for generation.
        kind: what the model's head is for.
        device: where to compute.
        dtype: what is computed in.
        pad_id: padding token of the tokenizer; None: nothing will be computed, so lanes are not tried.

    Raises:
        ModelError: the folder cannot be loaded, or the model cannot carry adapters, see `probe`.
    """
    bits = model.weights if model.weights in ("8bit", "4bit") else None
    kept = torch.float32 if model.weights == "float32" else torch.bfloat16
    base = load_base(folder, kind, labels, kept, attn_implementation=model.attention, quantisation=bits)
    if bits is None:  # quantised weights are made on the GPU and stay there
        base.to(torch.device(device))  # type: ignore[arg-type]
    linears = adapted_linears(base, model.targets)
    net = LaneNet(base, linears, dtype, model.base_dropout, checkpointing=model.checkpointing)
    if pad_id is not None:
        probe(net, pad_id)
    return net


def load_stage_net(spec: StageSpec, data: TokenData, ranks: Ranks | None) -> LaneNet:
    """The frozen model of a stage: in this process, or on a group's ranks, over which ZeRO stage 3 spreads it."""
    folder, model, engine = Path(spec.model_dir), spec.model, spec.engine
    if ranks is None or engine.zero.stage != 3:
        net = load_net(folder, model, data.labels, data.kind, engine.device, engine.dtype, data.pad_id)
        net.ranks, net.shares_optimizer = ranks, ranks is not None
        return net
    base, gathering = load_partitioned(
        folder, data.kind, data.labels, torch.bfloat16 if model.weights == "bfloat16" else torch.float32, ranks.size,
        offload=engine.zero.offload, attention=model.attention, device=engine.device,
    )  # fmt: skip
    gathering.check()
    linears = adapted_linears(base, model.targets)
    net = LaneNet(base, linears, engine.dtype, model.base_dropout, model.checkpointing, ranks, gathering.check)
    probe(net, data.pad_id, numbers=False)
    return net
