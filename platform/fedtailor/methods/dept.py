"""DEPT (SPEC): every client keeps its own embeddings, all other weights are averaged.

Paper: Iacob et al., "DEPT: Decoupled Embeddings for Pre-training Language Models", ICLR 2025, in the cross-device form
that FedP2EFT (section 4.1.2, A.3, "Personalized FL") uses as a base model: full fine-tuning with FedAvg, embeddings
start from the pretrained ones and are never sent, no outer optimizer.
    theta (body, head)   -> SHARED
    phi_k (embeddings)   -> PRIVATE   cfg.private: word, position and token-type tables; their LayerNorm is shared
Later stages see common weights plus each client's tables (`EmbeddingOverlay`). A client that was never sampled keeps
the pretrained tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtailor.adapters.full import FullModel, plain_name
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.lanes.layers import LaneEmbedding
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.methods.fedavg import FedAvgConfig, LocalSgd
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import NoPersonalisation


class DeptConfig(Config):
    """Defaults: FedP2EFT A.3."""

    lr: Rate = 5e-5
    lr_final: Rate | None = None
    """Cosine decay from lr to this value over the rounds; None: constant."""
    epochs: Positive = 2
    batch_size: Positive = 32
    server_lr: Rate = 1.0
    private: tuple[str, ...] = ("_embeddings",)
    """Parts of the names of the weights that stay with the client; none at all is FedAvg."""


@dataclass(frozen=True)
class EmbeddingOverlay:
    """The clients' own tables, frozen, in the place of the common ones.

    Args:
        private: as in `DeptConfig`.
    """

    private: tuple[str, ...]

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """The PRIVATE parameters of the base stage, in its order."""
        return [ParamSpec(name, tuple(w.shape), Scope.PRIVATE) for name, w in self._tables(net).items()]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """The tables in the base's folder: those that every client started from."""
        return {name: weight.detach() for name, weight in self._tables(net).items()}

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Gives every embedding its tables (K, V, d)."""
        for spec in params.specs:
            path, _, leaf = spec.name.removesuffix(".weight").rpartition(".")
            parent = net.model.get_submodule(path)
            module = getattr(parent, leaf)
            if isinstance(module, nn.Embedding):
                module = LaneEmbedding(module, net.state)
                setattr(parent, leaf, module)
            module.tables = params[spec.name]

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """Writes a client's tables over the common ones."""
        weights = dict(model.named_parameters())
        for name, value in tensors.items():
            weights[name].copy_(torch.from_numpy(value))

    def _tables(self, net: LaneNet) -> dict[str, Tensor]:
        named = ((plain_name(name), weight) for name, weight in net.model.named_parameters())
        return {name: weight for name, weight in named if any(part in name for part in self.private)}


def build(cfg: DeptConfig, r_max: int) -> Method:
    """FedAvg with full fine-tuning, embeddings PRIVATE."""
    training = FedAvgConfig(lr=cfg.lr, lr_final=cfg.lr_final, epochs=cfg.epochs, batch_size=cfg.batch_size)
    return Method(
        name="dept",
        adapter=FullModel(cfg.private),
        local_update=LocalSgd(training),
        personaliser=NoPersonalisation(),
        aggregator=WeightedMean(),
        server=ServerSgd(cfg.server_lr),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        overlay=EmbeddingOverlay(cfg.private) if cfg.private else None,
    )


ENTRY = MethodEntry(
    name="dept",
    config=DeptConfig,
    build=build,
    title="DEPT (SPEC)",
    summary="DEPT (SPEC): FedAvg with each client's own embeddings (Iacob et al. 2025)",
    base=True,
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2},
)
