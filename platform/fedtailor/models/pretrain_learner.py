"""Masked language modelling of a BERT (Devlin et al., 2019): model, optimiser, one step, held-out measure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from fedtailor.core.seeding import seed_for, torch_rng
from fedtailor.models.pretrain_blocks import Rows
from fedtailor.models.pretrain_options import PretrainOptions
from fedtailor.models.pretrain_start import log_frequencies

IGNORED = -100

HELD_OUT_MASK = 0.15

MEASURED_AT_ONCE = 32

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        return {
            "loss": round(self.loss_sum / n, 6) if n else None,
            "accuracy": round(self.correct / n, 6) if n else None,
            "masked": n,
        }


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
        self._hiding = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=HELD_OUT_MASK, mask_replace_prob=1.0, random_replace_prob=0.0
        )
        self.model = new_model(options, len(tokenizer), self.pad).to(self.device)
        parameters = list(self.model.named_parameters())
        matrices = [p for name, p in parameters if p.dim() > 1]
        vectors = [p for name, p in parameters if p.dim() == 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.98),
            eps=1e-6,
            fused=True,
        )

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
        self.optimiser.zero_grad(set_to_none=True)
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
            rows = held_out[stream].astype(np.int64)
            total = Score()
            for at in range(0, len(rows), MEASURED_AT_ONCE):
                loss, count, correct = self._loss(
                    self._hiding, rows[at : at + MEASURED_AT_ONCE], f"held_out/{stream}", at
                )
                total += Score(float(loss), int(correct), count)
            scores[stream] = total
        return scores

    def state(self) -> dict[str, Tensor]:
        """Weights and both moments, float32 on the CPU: ``weight.*``, ``exp_avg.*``, ``exp_avg_sq.*``."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimiser.state[parameter][moment]
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Takes up a state that had made `step` updates."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                moments = {moment: tensors[f"{moment}.{name}"].to(self.device).clone() for moment in MOMENTS}
                count = torch.tensor(float(step), dtype=torch.float32, device=self.device)
                self.optimiser.state[parameter] = {"step": count, **moments}

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
        padded = bool((ids == self.pad).any())
        mask = (ids != self.pad).to(self.device) if padded else None
        low = self.options.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext():
            body = self.model.bert(input_ids=shown.to(self.device), attention_mask=mask, position_ids=positions)
            hidden = body.last_hidden_state
            logits = self.model.cls(hidden.flatten(0, 1).index_select(0, places.to(self.device)))
        loss = functional.cross_entropy(logits.float(), wanted, reduction="sum")
        return loss, len(places), (logits.argmax(-1) == wanted).sum()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are no text; an unknown token is."""
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def guess(train: Rows, held_out: Rows, vocabulary: int, special: list[int]) -> dict[str, float]:
    """What knowing a stream's token frequencies alone gives: the bar that a model must pass."""
    known = log_frequencies([train], vocabulary, special)
    tokens = held_out[~np.isin(held_out, special)]
    if not len(tokens):
        return {}
    return {
        "frequency_loss": round(float(-known[tokens].mean(dtype=np.float64)), 6),
        "frequency_accuracy": round(float((tokens == known.argmax()).mean()), 6),
    }


def new_model(options: PretrainOptions, vocab_size: int, pad: int) -> Any:
    """Weights drawn from the seed alone; the global random state is neither read nor changed.

    The config has BERT's dropout for whoever trains the folder on; here the model stays in evaluation mode.
    """
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.intermediate_size,
        max_position_embeddings=options.max_position,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(options.seed, "pretrain", "weights"))
        return BertForMaskedLM(config).eval()  # type: ignore[no-untyped-call]


def learning_rate(options: PretrainOptions, step: int) -> float:
    """Of update `step` (from 0): linear warm-up to the peak, then linear decay to 0 after the last step."""
    warm = round(options.warmup * options.steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    return options.learning_rate * (options.steps - step) / (options.steps - warm)
