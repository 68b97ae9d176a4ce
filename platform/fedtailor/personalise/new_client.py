"""A new client: one that no run knew gets the adapter that a trained strategy generator chooses for it.

FedP2EFT section 3.2, inference: features of the client's texts -> lambda -> the r L largest -> fine-tuning with
lambda frozen. Nothing here depends on whether the generator saw the client's language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedtailor.core.config import merge_layers, validate
from fedtailor.core.errors import ModelError
from fedtailor.core.messages import Client
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import seed_for
from fedtailor.evaluation.classification import Score, evaluate
from fedtailor.experiment.config import to_json
from fedtailor.federated.context import ClientContext, Lane, open_params
from fedtailor.federated.early_stop import best_of
from fedtailor.federated.method import Method, Personalised
from fedtailor.federated.received import Received
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.methods.fedp2eft import FedP2EFTConfig
from fedtailor.personalise.data import Labelled
from fedtailor.personalise.generator import METHOD, TrainedGenerator
from fedtailor.storage.round_store import flatten
from fedtailor.tasks.tokens import examples_of
from fedtailor.training.finetune import FinetuneConfig
from fedtailor.worker.resident_net import load_net

CLIENT = "newcomer"
"""Client id of every new client, a coordinate of its random streams."""


@dataclass(frozen=True)
class Prepared:
    """A new client's tokenised texts.

    Args:
        train: what is learned from.
        test: what the result is scored on.
        truncated: texts of (train, test) that were cut to the run's ``task.max_length``.
        pad_id: padding token.
    """

    train: Examples
    test: Examples
    truncated: tuple[int, int]
    pad_id: int


@dataclass(frozen=True)
class Result:
    """What personalising gave.

    Args:
        base: score of the base model on the held-out texts.
        personalised: score of the personalised one.
        majority: class most frequent in training (the first of equals), and how many held-out texts are of it.
        ranks: adapted module to ranks kept, in module order.
        train_loss: mean cross-entropy over the training steps.
        tied: share of lambda entries that tie with the smallest kept one; 1: the generator ranks nothing.
        warnings: what the method said about the client.
        files: the peft adapter's files.
    """

    base: Score
    personalised: Score
    majority: tuple[int, int]
    ranks: dict[str, int]
    train_loss: float
    tied: float
    warnings: tuple[str, ...]
    files: dict[str, bytes]


def with_overrides(cfg: FedP2EFTConfig, overrides: Sequence[str]) -> FedP2EFTConfig:
    """The run's configuration with other fine-tuning settings.

    Args:
        cfg: of the run.
        overrides: ``key=value`` with keys of ``fedp2eft.finetune``, with or without that prefix.

    Raises:
        ConfigError: every problem found.
    """
    plain = [override.removeprefix("fedp2eft.").removeprefix("finetune.") for override in overrides]
    finetune = validate(FinetuneConfig, merge_layers([to_json(cfg.finetune)], plain))
    return cfg.model_copy(update={"finetune": finetune})


def prepare(tokenizer: PreTrainedTokenizerBase, train: Labelled, test: Labelled, max_length: int) -> Prepared:
    """Tokenises a new client's texts by the rules of the run's own clients.

    Raises:
        ModelError: see `tasks.tokens.examples_of`.
    """

    def tokens(data: Labelled, length: int) -> Examples:
        labels = np.array(data.labels, dtype=np.int64)
        return examples_of(tokenizer, data.texts, data.pairs, labels, length)

    def cut(data: Labelled) -> int:
        return int((tokens(data, max_length + 1).lengths > max_length).sum())

    assert isinstance(tokenizer.pad_token_id, int)
    return Prepared(
        tokens(train, max_length), tokens(test, max_length), (cut(train), cut(test)), tokenizer.pad_token_id
    )


def personalise(
    generator: TrainedGenerator, cfg: FedP2EFTConfig, data: Prepared, budget: int, language: str, device: str = "cpu"
) -> Result:
    """Loads the base model and makes the new client's adapter.

    Computed in float32 whatever the run's ``engine.dtype``, so that plain peft gives the same scores.

    Args:
        generator: trained generator.
        cfg: its configuration, fine-tuning possibly overridden.
        data: tokenised texts.
        budget: r; r L ranks are kept.
        language: code, for messages only.
        device: where to compute.

    Raises:
        ModelError: the base cannot be loaded, or training ran away (a loss or weight is not finite).
        StorageError: the saved generator does not fit the base.
    """
    model = generator.exp.model
    net = load_net(generator.base, model.targets, generator.labels, device=device, base_dropout=model.base_dropout)
    net.unbind()
    net.train_mode(False)
    base = _score(generator, net.logits, data, net)
    method = build_method(METHOD, cfg, generator.exp.r_max)
    warnings: list[str] = []
    client = Client(CLIENT, CLIENT, language, len(data.train.labels), len(data.test.labels))
    with torch.random.fork_rng(devices=[]):
        # Only a base with dropout of its own draws from the global stream.
        torch.manual_seed(seed_for(generator.seed, "personalise", 0, CLIENT, "base-dropout"))
        personalised = method.personaliser(_context(generator, method, net, client, data, budget, warnings))
    net.train_mode(False)
    score = _score(generator, personalised.logits, data, net)
    if not np.isfinite(score.loss_sum):
        raise ModelError(f"the loss after fine-tuning is {score.loss_sum}; try a smaller lr than {cfg.finetune.lr:g}")
    return _result(generator, personalised, data, base, score, warnings)


def _context(
    generator: TrainedGenerator,
    method: Method,
    net: LaneNet,
    client: Client,
    data: Prepared,
    budget: int,
    warnings: list[str],
) -> ClientContext:
    """One lane that has received the generator."""
    params = open_params(net, 1, None, method.modules, generator.seed)
    shared = params.of_scope(Scope.SHARED)
    row = torch.from_numpy(best_of(generator.server, flatten(shared, generator.shared)).copy()).to(net.device)
    params.flat(Scope.SHARED)[0].data.copy_(row)

    def features(lanes: Sequence[Lane], pad_to: int | None) -> list[Tensor]:
        return [client_features(net, lane.train, data.pad_id, pad_to) for lane in lanes]

    return ClientContext(
        net=net,
        lanes=(Lane(client, data.train),),
        params=params,
        seed=generator.seed,
        stage="personalise",
        round=0,
        num_labels=len(generator.labels),
        pad_id=data.pad_id,
        feature_source=features,
        warn=lambda lane, sentence: warnings.append(sentence),
        budgets=(budget,),
        r_max=generator.exp.r_max,
        received=Received(shared, row.unsqueeze(0), [0]),
        fresh=torch.tensor([True], device=net.device),
    )


def _score(generator: TrainedGenerator, logits: Callable[..., Tensor], data: Prepared, net: LaneNet) -> Score:
    [score] = evaluate(logits, [data.test], data.pad_id, generator.exp.engine.token_budget, net.device)
    return score


def _result(
    generator: TrainedGenerator,
    personalised: Personalised,
    data: Prepared,
    base: Score,
    score: Score,
    warnings: Sequence[str],
) -> Result:
    assert personalised.ranks is not None
    assert personalised.export is not None
    best = int(np.bincount(data.train.labels).argmax())
    return Result(
        base=base,
        personalised=score,
        majority=(best, int((data.test.labels == best).sum())),
        ranks=dict(zip(generator.modules, personalised.ranks[0].tolist(), strict=True)),
        train_loss=float(personalised.metrics["train_loss"][0]),
        tied=float(personalised.metrics["tied_at_threshold"][0]),
        warnings=tuple(warnings),
        files=personalised.export(0, str(generator.base)),
    )


def missing_device(device: str) -> str | None:
    """Why a device cannot be used, or None."""
    if device not in ("cpu", "cuda"):
        return f"--device {device}: allowed are cpu and cuda"
    return "--device cuda: torch sees no GPU here" if device == "cuda" and not torch.cuda.is_available() else None
