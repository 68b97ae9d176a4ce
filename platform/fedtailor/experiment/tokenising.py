"""A task's texts as its run has them tokenised: with which settings, under which name, what is refused before."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.stages import short_hash
from fedtailor.models.source import model_title
from fedtailor.tasks import prompts
from fedtailor.tasks.encoding import Encoder, check_texts
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.tokens import TokenData, check_conversations, tokenise
from fedtailor.tasks.windows import PlaceOf, check_windows


def write_tokens(exp: ExperimentBase, data: TaskData, tokenizer: PreTrainedTokenizerBase, out: Path) -> TokenData:
    """Tokenises a task as its run does, see `tokens.tokenise`; errors name the model as it was configured."""
    tokenizer.name_or_path, task = model_title(exp.model), exp.task
    return tokenise(data, tokenizer, task.max_length, out, task.template, task.overlong, _place_of(exp), task.stride)


def check_tokenizer(exp: ExperimentBase, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what `write_tokens` would refuse, without tokenising.

    Raises:
        DataError, ModelError: see `tokens.tokenise`; but over-long examples are not looked for.
    """
    tokenizer.name_or_path, task = model_title(exp.model), exp.task
    if data.kind == "generation":
        template = Encoder(task.template, tokenizer, task.max_length, task.overlong).template
        check_conversations(data, template, _place_of(exp))
    elif data.kind == "extraction":
        check_windows(tokenizer, task.max_length, task.stride)
    else:
        check_texts(tokenizer, task.max_length, data.paired)


def _place_of(exp: ExperimentBase) -> PlaceOf | None:
    find = exp.task_entry.place_of
    return partial(find, exp.task) if find else None


def tokens_artifact(exp: ExperimentBase, data: str, model: str) -> str:
    """Name of the tokenised clients."""
    content: list[object] = [data, model, exp.task.max_length]
    if exp.task_entry.kind == "generation":
        content += [prompts.identity(exp.task.template), exp.task.overlong]
    if exp.task_entry.kind == "extraction":
        content.append(exp.task.stride)
    return f"tokens-{short_hash(content)}"
