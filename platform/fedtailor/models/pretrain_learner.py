"""Masked language modelling of a BERT (Devlin et al., 2019): options, model, optimiser, one step, held-out measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from fedtailor.core.config import Config, validate
from fedtailor.core.errors import ConfigError
from fedtailor.core.seeding import torch_rng
from fedtailor.core.settings import Natural, Positive, Rate
from fedtailor.models.embedded import drawn
from fedtailor.models.pretrain_data import Rows
from fedtailor.tasks.task import TASKS

IGNORED = -100
HELD_OUT_MASK = 0.15
MEASURED_AT_ONCE = 32
MOMENTS = ("exp_avg", "exp_avg_sq")


def flag(name: str) -> str:
    """The option of a field: ``vocab_size`` to ``--vocab-size``; a list's option is its singular.

    >>> flag("learning_rate"), flag("tasks")
    ('--learning-rate', '--task')
    """
    return "--task" if name == "tasks" else f"--{name.replace('_', '-')}"


class PretrainOptions(Config):
    """All that decides the bytes of a pretrained folder, next to texts, library versions and hardware.

    Keys are the command line's options, so that messages name what was typed. The default architecture is a BERT
    (Devlin et al., 2019) of 4 layers and 256 hidden units; the optimiser's constants are RoBERTa's (Liu et al.,
    2019, table 9); no dropout, since a corpus of this size is read about once.
    """

    model_config = ConfigDict(alias_generator=flag)

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks whose train texts are read; their order does not matter."""
    layers: Positive = 4
    hidden_size: Positive = 256
    heads: Positive = 4
    intermediate_size: Positive = 1024
    max_position: Annotated[int, Field(ge=8)] = 256
    vocab_size: Annotated[int, Field(ge=200)] = 16000
    block: Annotated[int, Field(ge=8)] = 128
    """Tokens of a row, [CLS] included."""
    shift: bool = True
    """Let each row begin at a drawn position (SHAPE, Kiyono et al., 2021), so that positions beyond the block are
    learned too."""
    batch: Positive = 32
    """Rows of a step."""
    steps: Positive = 4000
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Peak, reached after the warm-up; falls linearly to 0 at the last step."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """Share of the steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; biases and layer norms are not decayed."""
    clip: Rate = 1.0
    """Largest norm of the gradient."""
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of tokens to predict; of these 80 % are shown as [MASK], 10 % as another token. BERT has 0.15; more teaches
    more per step at nearly no cost (Wettig et al., 2023)."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.5
    """alpha of XLM (Conneau and Lample, 2019, section 3.1): languages are drawn in proportion to tokens ** alpha."""
    start: Literal["counts", "random"] = "counts"
    """Token vectors and output bias before the first step: from the corpus by counting (`token_vectors`), or drawn."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Share of each language's documents that is only measured on, one at least."""
    seed: Natural = 42
    precision: Literal["bfloat16", "float32"] = "float32"
    """Of matrix products (autocast); weights, moments and sums are float32."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        allowed = [name for name, entry in TASKS.items() if entry.kind == "classification"]
        if not set(value) <= set(allowed):
            raise ValueError(f"allowed: {', '.join(allowed)}")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _consistent(self) -> PretrainOptions:
        if self.hidden_size % self.heads:
            raise ValueError(f"'--hidden-size' ({self.hidden_size}) must be a multiple of '--heads' ({self.heads})")
        if self.block > self.max_position:
            raise ValueError(f"'--block' ({self.block}) must be at most '--max-position' ({self.max_position})")
        return self

    def record(self) -> dict[str, Any]:
        """The options as JSON, by field name."""
        return self.model_dump(mode="json")


def chosen(given: Mapping[str, Any]) -> PretrainOptions:
    """Options from what was typed, by field name; device and precision may be ``auto``.

    Raises:
        ConfigError: every problem, by the option's name.
    """
    device = choose_device(str(given.get("device", "auto")))
    precision = choose_precision(str(given.get("precision", "auto")), device)
    values = {**given, "device": device, "precision": precision}
    return validate(PretrainOptions, {flag(name): value for name, value in values.items()})


def choose_device(name: str) -> str:
    """``auto`` to cuda or cpu; anything else is checked.

    Raises:
        ConfigError: no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in ("auto", *there):
        raise ConfigError(f"'--device' is {name!r}, allowed here: auto, {', '.join(there)}")
    return ("cuda" if gpus else "cpu") if name == "auto" else name


def choose_precision(name: str, device: str) -> str:
    """``auto`` to bfloat16 where the device has instructions for it, else to float32; others as they are.

    Raises:
        ConfigError: another word.
    """
    if name not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"'--precision' is {name!r}, allowed: auto, bfloat16, float32")
    if name != "auto":
        return name
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if able else "float32"


@dataclass(frozen=True)
class Score:
    """Sums over masked tokens."""

    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.count + other.count)

    def means(self) -> dict[str, float | int | None]:
        """Loss (nats) and accuracy per masked token; None without any."""
        n = self.count
        loss, accuracy = (round(total / n, 6) if n else None for total in (self.loss_sum, self.correct))
        return {"loss": loss, "accuracy": accuracy, "masked": n}


class Learner:
    """Owns weights and moments; nothing else survives a step.

    Args:
        options: sizes and optimiser.
        tokenizer: vocabulary, and which tokens are special.
    """

    def __init__(self, options: PretrainOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.pad = int(tokenizer.pad_token_id)
        self._special = torch.tensor(special_ids(tokenizer))
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.mask)
        # Tokens that stay visible are no test: held-out tokens are all hidden.
        hidden: dict[str, Any] = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0}
        self._hiding = DataCollatorForLanguageModeling(tokenizer, mlm_probability=HELD_OUT_MASK, **hidden)
        self.model = new_model(options, len(tokenizer), self.pad).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def start_from(self, vectors: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> None:
        """Takes token vectors (vocabulary, hidden) at the scale of the initial weights, and the output bias.

        Zeros in the vectors leave the drawn weight.
        """
        scaled = torch.from_numpy(vectors).to(self.device) * float(self.model.config.initializer_range)
        with torch.no_grad():
            weight = self.model.bert.embeddings.word_embeddings.weight
            weight.copy_(torch.where(scaled == 0, weight, scaled))
            self.model.cls.predictions.bias.copy_(torch.from_numpy(bias))

    def step(self, rows: npt.NDArray[np.int64], step: int) -> float:
        """One update on rows (batch, block); `step` counts from 0. Returns the mean loss per masked token, in nats."""
        loss, count, _ = self._loss(self._collator, rows, "train", step, self._positions(len(rows), step))
        mean = loss / max(count, 1)
        self.optimiser.zero_grad()
        mean.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.options, step)
        self.optimiser.step()
        return float(mean.detach())

    @torch.no_grad()
    def measure(self, held_out: Mapping[str, Rows]) -> dict[str, Score]:
        """Scores of each stream's held-out rows; the same tokens are hidden whenever it is asked."""
        scores = {}
        for stream in sorted(held_out):
            rows, total = held_out[stream].astype(np.int64), Score()
            for at in range(0, len(rows), MEASURED_AT_ONCE):
                part, purpose = rows[at : at + MEASURED_AT_ONCE], f"held_out/{stream}"
                loss, count, correct = self._loss(self._hiding, part, purpose, at)
                total += Score(float(loss), int(correct), count)
            scores[stream] = total
        return scores

    def state(self) -> dict[str, Tensor]:
        """Weights and both moments, float32 on the CPU: ``weight.*``, ``exp_avg.*``, ``exp_avg_sq.*``."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimiser.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Takes up a state that had made `step` updates."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                moments = {moment: tensors[f"{moment}.{name}"].to(self.device).clone() for moment in MOMENTS}
                self.optimiser.state[parameter] = {"step": torch.tensor(float(step), device=self.device), **moments}

    def _positions(self, rows: int, step: int) -> Tensor | None:
        """Position ids, int64 (rows, block): [CLS] at 0, the rest from a place that is drawn for each row."""
        if not self.options.shift:
            return None
        room = self.options.max_position - self.options.block
        draws = torch_rng(self.options.seed, "pretrain", "shift", step)
        moved = torch.arange(self.options.block) + torch.randint(room + 1, (rows, 1), generator=draws)
        moved[:, 0] = 0
        return moved.to(self.device)

    def _loss(
        self, collator: Any, rows: npt.NDArray[np.int64], purpose: str, at: int, positions: Tensor | None = None
    ) -> tuple[Tensor, int, Tensor]:
        """Summed loss over masked tokens, their number, and how many are right.

        The vocabulary's matrix product is done for masked positions only: a seventh of all.
        """
        ids = torch.from_numpy(rows)
        collator.generator = torch_rng(self.options.seed, "pretrain", "mask", purpose, at)
        shown, labels = collator.torch_mask_tokens(ids.clone(), torch.isin(ids, self._special))
        places = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        wanted = labels.flatten()[places].to(self.device)
        mask = (ids != self.pad).to(self.device) if (ids == self.pad).any() else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            body = self.model.bert(input_ids=shown.to(self.device), attention_mask=mask, position_ids=positions)
            hidden = body.last_hidden_state.flatten(0, 1)
            logits = self.model.cls(hidden.index_select(0, places.to(self.device)))
        loss = functional.cross_entropy(logits.float(), wanted, reduction="sum")
        return loss, len(places), (logits.argmax(-1) == wanted).sum()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are no text; an unknown token is."""
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def new_model(options: PretrainOptions, vocab_size: int, pad: int) -> Any:
    """Weights drawn from the seed alone.

    The config has BERT's dropout for whoever trains the folder on; here the model stays in evaluation mode.
    """
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, intermediate_size=options.intermediate_size,
        max_position_embeddings=options.max_position, pad_token_id=pad,
    )  # fmt: skip
    return drawn(BertForMaskedLM, config, options.seed, "pretrain", "weights").eval()


def learning_rate(options: PretrainOptions, step: int) -> float:
    """Of update `step` (from 0): linear warm-up to the peak, then linear decay to 0 after the last step."""
    warm = round(options.warmup * options.steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    return options.learning_rate * (options.steps - step) / (options.steps - warm)
