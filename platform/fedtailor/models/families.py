"""Facts about architectures: which linear layers carry adapters, in which order, and which output heads are supported.

Whether a language model's scores are exactly its output embedding of the last hidden state is found without weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from fedtailor.core.errors import ModelError
from fedtailor.lanes.layers import Linear
from fedtailor.lanes.net import LaneNet
from fedtailor.tasks.source import TaskKind

if TYPE_CHECKING:  # transformers' base class takes seconds, and who only reads configs and tokens needs none
    from transformers import PreTrainedModel

_SAME_ROLE = {f"{x}": (f"{x[0]}_proj", f"{x}_proj") for x in ("query", "key", "value")}
"""What BERT calls a layer -> what LLaMA and DeBERTa call it: papers write "query and value" for all."""

Targets = Literal["all-linear"] | tuple[str, ...]
CAUSAL_MODELS = "tiny-llama, gpt2-medium, mobilellama-1.4b, llama-3.2-3b, or a causal model that ends in a linear layer"
EXTRACTORS = "tiny-bert, mini-mbert, mbert, roberta-base, deberta-v3-base, or any encoder that can have such a head"
CLASSIFIERS = "tiny-bert, mini-mbert, mbert, roberta-base, roberta-large, or any sequence classifier"

_PARTS = {
    "attention.self.query": "Query", "attention.self.key": "Key", "attention.self.value": "Value",
    "attention.output.dense": "Attn\nout", "intermediate.dense": "FFN\nin", "output.dense": "FFN\nout",
    "attention.q_lin": "Query", "attention.k_lin": "Key", "attention.v_lin": "Value",
    "attention.out_lin": "Attn\nout", "ffn.lin1": "FFN\nin", "ffn.lin2": "FFN\nout",
    "attention.self.query_proj": "Query", "attention.self.key_proj": "Key", "attention.self.value_proj": "Value",
    "self_attn.q_proj": "Query", "self_attn.k_proj": "Key", "self_attn.v_proj": "Value",
    "self_attn.o_proj": "Attn\nout", "mlp.gate_proj": "FFN\ngate", "mlp.up_proj": "FFN\nup",
    "mlp.down_proj": "FFN\ndown", "attn.c_attn": "QKV", "attn.c_proj": "Attn\nout", "mlp.c_fc": "FFN\nin",
    "mlp.c_proj": "FFN\nout",
}  # fmt: skip

_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
_NOT_CAUSAL = {"xlnet": "it was trained on permutations: without them every token sees the whole text"}
"""Types that transformers lists as causal and that are not -> why."""

_PART_ORDER = tuple(dict.fromkeys(_PARTS.values()))
IN_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(?!.*\.\d+\.)(.+)$")  # a module's path: its block, its path inside


def adapted_linears(model: nn.Module, targets: Targets = "all-linear") -> list[tuple[str, Linear]]:
    """Lists the linear layers that carry adapters, in the order of ``model.named_modules()``.

    ``all-linear`` is every ``nn.Linear`` and ``Conv1D`` (GPT-2: a linear layer whose weight is transposed) but the
    output embedding (``get_output_embeddings()``), as peft resolves it when no task type is set, which is how
    FedP2EFT's reference code runs: an mBERT classifier has L = 12 * 6 + pooler + classifier = 74, a LLaMA block 7 (no
    ``lm_head``), a GPT-2 block 4.

    Args:
        model: the base model, without adapters; may live on the meta device.
        targets: ``all-linear``, or names that end a module path at a dot: ``query`` matches
            ``bert.encoder.layer.0.attention.self.query``, ``output.dense`` also ``attention.output.dense``; see
            `ends` for names that families share.

    Returns:
        (full module path, layer) pairs; each name is unique.

    Raises:
        ModelError: a target matches no linear layer (the message lists the endings that exist), or the model has none.
    """
    candidates = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    if targets == "all-linear":
        getter: Any = getattr(model, "get_output_embeddings", None)
        output = getter() if getter else None
        chosen = [(name, layer) for name, layer in candidates if layer is not output]
    else:
        names = [name for name, _ in candidates]
        unknown = [t for t in targets if not any(ends(name, t) for name in names)]
        if unknown or not targets:
            raise ModelError(
                f"'model.targets' {list(targets)}: no linear layer ends in {unknown or 'any of them'}; "
                f"this model has {endings(names)}"
            )
        chosen = [(name, layer) for name, layer in candidates if any(ends(name, t) for t in targets)]
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layer that could carry an adapter")
    return chosen


def endings(names: Sequence[str]) -> str:
    """Says which last parts module paths have, and how often: ``dense (25), key (12), query (12)``."""
    counts = Counter(name.rsplit(".", 1)[-1] for name in names)
    return ", ".join(f"{ending} ({count})" for ending, count in sorted(counts.items())) or "none"


def uncovered(model: nn.Module) -> list[str]:
    """Weights that work like linear layers and are none, so that ``all-linear`` leaves them out.

    Routers and fused experts of a mixture are such, and the projections of XLNet. Numbers of layers become ``*``.

    Args:
        model: with or without adapters.
    """
    own = (nn.Linear, Conv1D, nn.Embedding)
    found = [
        f"{name}.{part}".lstrip(".")
        for name, module in model.named_modules()
        for part, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1 and not isinstance(module, own) and not part.endswith("bias") and "emb" not in part
    ]
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in found))


def notices(net: LaneNet, targets: Targets) -> tuple[str, ...]:
    """What a user should know of how adapters sit in a model that `lanes.probe` has tried.

    Args:
        net: the model.
        targets: as configured.
    """
    rest = uncovered(net.model) if targets == "all-linear" else []
    sentences = {
        f"clients run one by one, which is slower: {net.one_by_one}": net.one_by_one,
        f"the model does not call {len(net.idle)} of its {len(net.adapted)} adapted layers, so that their adapters "
        f"change nothing: {', '.join(net.idle[:3])}{', ...' * (len(net.idle) > 3)}": net.idle,
        f"no adapter for weights that are not layers of their own: {', '.join(rest)}": rest,
    }
    return tuple(sentence for sentence, holds in sentences.items() if holds)


def embedding_names(model: nn.Module) -> list[str]:
    """Full names of all embedding tables' parameters (word, position, token type), in module order."""
    return [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)]


def ends(name: str, target: str) -> bool:
    """Whether a target means this module path.

    >>> ends("model.layers.0.self_attn.q_proj", "query"), ends("model.layers.0.mlp.up_proj", "proj")
    (True, False)
    """
    return any(f".{name}".endswith(f".{t}") for t in (target, *_SAME_ROLE.get(target, ())))


def check_kind(config: PretrainedConfig, kind: TaskKind, where: str) -> None:
    """Checks that transformers makes a model of the task's kind from a config.

    Args:
        config: of the base model.
        kind: of the task.
        where: name of the model for the message.

    Raises:
        ModelError: it does not, or a language model's scores are not ``get_output_embeddings()(hidden)`` and nothing
            else, or it cannot be told.
    """
    name = config.model_type
    if kind == "regression":
        if name != "fedtailor-linear":
            raise ModelError(f"{where}: type '{name}' predicts no numbers (allowed for regression: linear)")
        return
    spans = next((x for x in config.architectures or () if x.endswith("ForQuestionAnswering")), None)
    if kind == "extraction":
        if is_decoder(config):
            raise ModelError(
                f"{where}: type '{name}' is a causal language model, whose tokens do not see what follows them, and a "
                f"span's first token needs its last one (allowed for extraction: {EXTRACTORS})"
            )
        if type(config) not in AutoModelForQuestionAnswering._model_mapping:
            raise ModelError(
                f"{where}: transformers has no head that marks spans for type '{name}' (allowed for extraction: "
                f"{EXTRACTORS})"
            )
        return
    if kind == "classification":
        if spans:
            raise ModelError(
                f"{where}: its head marks spans of a text ({spans}), and the task asks for classes; give the "
                f"checkpoint that the head was put on, or a classifier (allowed for classification: {CLASSIFIERS})"
            )
        if type(config) not in AutoModelForSequenceClassification._model_mapping:
            raise ModelError(
                f"{where}: transformers has no sequence classifier of type '{name}' (allowed for classification: "
                f"{CLASSIFIERS})"
            )
        return
    if not is_decoder(config):
        raise ModelError(
            f"{where}: type '{name}' is no causal language model, which generation needs (allowed: {CAUSAL_MODELS})"
        )
    if reason := _NOT_CAUSAL.get(name) or _why_not(config.to_json_string(use_diff=False), name):
        raise ModelError(f"{where}: models of type '{name}' are not supported for generation: {reason}")


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether a model of this type reads from left to right, so that a classifier is scored at a text's last token.

    An encoder may be in transformers' list of causal models, as a decoder that nobody has trained.
    """
    listed = type(config) in AutoModelForCausalLM._model_mapping
    return listed and type(config) not in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder


def untrained(config: PretrainedConfig, kind: TaskKind, **options: Any) -> PreTrainedModel:
    """A model of a task's kind from a config, with whatever weights transformers draws; see its ``from_config``."""
    if kind == "regression":
        from fedtailor.models.linear import LinearConfig, LinearRegressor

        assert isinstance(config, LinearConfig), "as `check_kind` asks for"
        return LinearRegressor(config)
    autos: dict[TaskKind, Any] = {"generation": AutoModelForCausalLM, "extraction": AutoModelForQuestionAnswering}
    auto = autos.get(kind, AutoModelForSequenceClassification)
    model: PreTrainedModel = auto.from_config(config, trust_remote_code=False, **options)
    return model


def meta_causal(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return untrained(config, "generation", dtype=torch.float32)


@lru_cache(maxsize=8)
def _why_not(config: str, model_type: str) -> str:
    """Why a language model's scores are not its output embedding's of the last hidden state; empty where they are.

    Only the tokens that are learned get scores, past the model's own last lines (`lanes.net.LaneNet.logits`): what
    these do there, e.g. Gemma 2's soft cap or Cohere's scale, would silently be lost.
    """
    model = meta_causal(CONFIG_MAPPING[model_type].from_dict(json.loads(config)))
    # Of the ways to multiply with experts the one that asks for no values.
    model.set_experts_implementation("batched_mm")
    output: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(output, nn.Linear):
        return f"they end in {type(output).__name__}, not in a linear layer"
    made: list[Tensor] = []
    output.register_forward_hook(lambda _module, _inputs, result: made.append(result))
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # Masks and positions that are given spare most models a look at values, which the meta device has not.
    given = {"position_ids": ids, "attention_mask": torch.zeros(1, 1, 2, 2, device="meta")}
    told = ""
    for inputs in (given, {}):
        made.clear()
        try:
            with torch.no_grad():
                scores = model(input_ids=ids, use_cache=False, **inputs).logits
        except Exception as error:  # any model's code may fail here in its own way
            told = told or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        # The very tensor that the layer made: nothing was done to it.
        plain = len(made) == 1 and scores is made[0]
        return "" if plain else "they change the output embedding's scores (a scale or a soft cap)"
    return f"their scores cannot be followed without weights ({told})"


def positions_of(config: PretrainedConfig) -> int | None:
    """Most tokens that a model can position; None: there is no limit (XLNet says -1).

    The RoBERTa family counts from the position after the padding token's number; those before it serve no text.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - (config.pad_token_id or 0) - 1 if config.model_type in _POSITIONS_AFTER_PADDING else positions


def locate_module(module: str) -> tuple[int | None, str]:
    """Transformer layer and part of an adapted module; layer None for modules outside the layers.

    >>> locate_module("bert.encoder.layer.11.attention.self.query")
    (11, 'Query')
    >>> locate_module("bert.pooler.dense"), locate_module("classifier")
    ((None, 'Pooler'), (None, 'Classifier'))
    """
    found = IN_BLOCK.search(module)
    if found:
        return int(found[1]), _PARTS.get(found[2], found[2])
    words = [word for word in module.split(".") if word not in ("dense", "model", "bert")] or [module]
    return None, (label := ".".join(words))[:1].upper() + label[1:]


def in_part_order(parts: Iterable[str]) -> list[str]:
    """Parts of a layer in the order of the computation; unknown ones last, as they come."""
    rank = {name: k for k, name in enumerate(_PART_ORDER)}
    return sorted(dict.fromkeys(parts), key=lambda name: rank.get(name, len(rank)))
