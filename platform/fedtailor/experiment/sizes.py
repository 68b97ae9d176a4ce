"""Numbers that methods declare, by owner, without weights: what travels, what stays, and of how many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.errors import listed
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.experiment.config import ExperimentBase, method_of
from fedtailor.federated.method import Method
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import METHODS
from fedtailor.models.dimensions import meta_model
from fedtailor.models.families import adapted_linears
from fedtailor.training.common_lora import KeptAdam


@dataclass(frozen=True)
class Generator:
    """An auxiliary network that a method trains, e.g. FedP2EFT's PSG.

    Args:
        widths: of its layers, input first.
        parameters: all of them.
    """

    widths: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class MethodSizes:
    """Numbers of a client: SHARED ones travel, the others stay where they are.

    Args:
        shared: where clients' ranks differ, on average.
        state: of the PRIVATE ones, those that are an optimizer's.
        adapter: those of its adapters, whoever owns them, without the classification head's own weights: what papers
            count as trained. Where clients' ranks differ, on average.
        ranks: ranks that seen clients begin with, where they differ and are known.
    """

    shared: int
    private: int
    ephemeral: int
    generators: tuple[Generator, ...]
    state: int = 0
    adapter: int = 0
    ranks: tuple[int, ...] = ()


def method_sizes(exp: ExperimentBase, method: Method, classes: int, seen: Sequence[str] | int = ()) -> MethodSizes:
    """Sums a method's declared parameters by owner, on a model without weights.

    Args:
        exp: whole configuration.
        method: as configured.
        classes: C.
        seen: ids of the seen clients, or where they are not known how many there are.
    """
    model = meta_model(exp.model, classes, exp.task.max_length, exp.task_entry.kind)
    targets = "all-linear" if method.name == exp.base.name else exp.model.targets
    net = LaneNet(model, adapted_linears(model, targets))
    modules = [module.specs(net) for module in method.modules]
    specs = [*(method.adapter.specs(net) if method.adapter else ()), *(spec for module in modules for spec in module)]
    total = {scope: sum(spec.size for spec in specs if spec.scope is scope) for scope in Scope}
    generators = [
        Generator((layers[0][1], *(width for width, _ in layers)), sum(spec.size for spec in module))
        for module in modules
        if (layers := [spec.shape for spec in module if len(spec.shape) == 2 and spec.name.endswith(".weight")])
    ]
    state = sum(spec.size for part in method.modules if isinstance(part, KeptAdam) for spec in part.specs(net))
    ranks, shared, adapter = tuple[int, ...](), total[Scope.SHARED], method.adapter
    alone = 0 if adapter is None or adapter.trains_base else _without_head(adapter.specs(net), net)
    if isinstance(seen, int):  # ranks that are drawn follow from the ids
        seen = () if method.ranks is None or method.ranks.name == "drawn" else [str(k) for k in range(seen)]
    if method.ranks is not None and isinstance(adapter, LoraAdapter) and seen:
        ranks = tuple(method.ranks.of(client, seen, exp.seeds[0], adapter.rank) for client in seen)
        each = [replace(adapter, rank=rank).specs(net) for rank in ranks]
        shared = round(mean(sum(s.size for s in specs if s.scope is Scope.SHARED) for specs in each))
        alone = round(mean(_without_head(specs, net) for specs in each))
    return MethodSizes(shared, total[Scope.PRIVATE], total[Scope.EPHEMERAL], tuple(generators), state, alone, ranks)


def _without_head(specs: Sequence[ParamSpec], net: LaneNet) -> int:
    return sum(spec.size for spec in specs if spec.name.rpartition(".")[0] not in net.heads)


def rank_notes(exp: ExperimentBase, sizes: Mapping[str, MethodSizes]) -> Iterator[str]:
    """A sentence on every method whose clients have ranks of their own.

    Args:
        exp: whole configuration.
        sizes: of its methods.
    """
    for name, size in sizes.items():
        how = method_of(exp, name).ranks
        if how is not None and size.ranks:
            yield (
                f"{METHODS[name].title}: seen clients begin with the ranks {listed(list(map(str, size.ranks)), 16)} "
                f"({name}.ranks={how.name}), {mean(size.ranks):.4g} on average, and SHARED counts these; the server's "
                f"adapter has rank {how.largest(exp.r_max)}."
            )
