"""``fedtailor judge``: a language model scores the answers of a finished run, several times each.

What is judged is kept reply by reply and never asked again, whatever ends the command. The judgements become a table:
methods, budgets and languages, with mean and spread over clients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from fedtailor.core.errors import ConfigError
from fedtailor.experiment.stages import short_hash
from fedtailor.report.grid import Grid, markdown
from fedtailor.report.judge_client import KEY, Endpoint, Task, ask_all
from fedtailor.report.judge_prompt import Template, judgement_key, prompt_hash
from fedtailor.report.judge_records import Ledger, kept_answers
from fedtailor.report.names import in_method_order, in_pool_order, method_name
from fedtailor.storage import payloads
from fedtailor.storage.files import Storage, join
from fedtailor.storage.lock import lock
from fedtailor.storage.run_folder import RunFolder

AVERAGE = "average"

RESULT_COLUMNS = ("pool", "method", "budget", "language", "mean", "sd", "clients", "answers", "failures")

_CELL = ["pool", "method", "budget", "language"]

JUDGEMENT_COLUMNS = (
    "seed", "client", "language", "method", "budget", "row", "repeat", "score", "model", "replies", "problem",
    "prompt_sha256", "key",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is asked of whom.

    Args:
        url: address of the endpoint.
        model: name of the judge.
        repeats: judgements of an answer, averaged.
        scale: highest score; the lowest is 0.
        methods: whose answers; empty: of all.
        limit: questions at most, the same for all methods and budgets.
        order: seed of the order in which answers are judged, and of the choice that ``limit`` makes.
        tries: replies to ask for until one holds a score.
        at_once: requests that run at the same time.
        timeout_s: seconds that the endpoint may be silent.
        retries: of a request that meets 429, 5xx or a lost connection.
        key_env: variable that holds the key.
        out: folder; default: ``<run>/judge/<model>-<hash of model and prompt>``.
    """

    url: str
    model: str
    repeats: int = 3
    scale: int = 10
    methods: tuple[str, ...] = ()
    limit: int | None = None
    order: int = 0
    tries: int = 3
    at_once: int = 4
    timeout_s: float = 60.0
    retries: int = 5
    key_env: str = KEY
    out: Path | None = None


@dataclass(frozen=True)
class Judged:
    """What a command did.

    Args:
        table: see `results`.
        place: the folder.
        counts: distinct judgements that are ``wanted``, were ``there`` before, are ``missing`` now.
        gaps: why judgements are missing, one sentence each; empty if none is.
    """

    table: pd.DataFrame
    place: str
    counts: Mapping[str, int]
    gaps: tuple[str, ...]


def judge_run(run: RunFolder, asked: Request, tell: Callable[[int, int], None] = lambda done, total: None) -> Judged:
    """Asks for what is not judged yet and writes ``judgements.parquet``, ``table.csv`` and ``table.md``.

    Args:
        run: complete, with kept answers.
        asked: what of whom.
        tell: called with how many judgements are through, and of how many that this command asks for.

    Raises:
        ConfigError: a value that cannot be used.
        StorageError: see `kept_answers` and `Ledger.begin`; LockedError while another process judges there.
        JudgeError: the endpoint is down.
    """
    _check(asked)
    endpoint = Endpoint(asked.url, asked.model, asked.key_env, asked.timeout_s, asked.retries)
    template = Template(asked.scale)
    answers = kept_answers(run, asked.methods, asked.limit, asked.order)
    storage, path = _place(run, asked, template)
    with lock(storage, path, run.run_id):
        ledger = Ledger(storage, path, run.run_id)
        ledger.begin(_setting(run, asked, template))
        tasks = {task.key: task for task in _tasks(answers, asked, template)}
        todo = [task for task in tasks.values() if ledger.of(task.key).score is None]
        # What failed before comes last, so that one bad question does not keep the others waiting.
        todo.sort(key=lambda task: bool(ledger.of(task.key).kind))
        tell(0, len(todo))
        unasked = ask_all(
            todo, endpoint, template, asked.tries, asked.at_once, ledger.note, lambda done: tell(done, len(todo))
        )
        judged = _judged(answers, asked, template, ledger)
        table = results(judged)
        files = dict([payloads.encode("judgements", pa.Table.from_pandas(judged, preserve_index=False))])
        files["table.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
        files["table.md"] = _markdown(table, asked).encode()
        for name, data in files.items():
            storage.write_bytes(join(path, name), data)
    missing = [key for key in tasks if ledger.of(key).score is None]
    counts = {"wanted": len(tasks), "there": len(tasks) - len(todo), "missing": len(missing)}
    return Judged(table, storage.full(path), counts, _gaps(missing, unasked, ledger))


def _check(asked: Request) -> None:
    at_least = {"repeats": 1, "scale": 1, "tries": 1, "at_once": 1, "retries": 0}
    problems = [
        f"--{name.replace('_', '-')} {getattr(asked, name)}: at least {least}"
        for name, least in at_least.items()
        if getattr(asked, name) < least
    ]
    if asked.limit is not None and asked.limit < 1:
        problems.append(f"--max {asked.limit}: at least 1")
    if not asked.timeout_s > 0:
        problems.append(f"--timeout {asked.timeout_s:g}: more than 0 seconds")
    if not asked.model.strip():
        problems.append("--model: a name that the endpoint knows")
    if problems:
        raise ConfigError(problems)


def _place(run: RunFolder, asked: Request, template: Template) -> tuple[Storage, str]:
    if asked.out is not None:
        return Storage(asked.out), ""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", asked.model).strip(".-")[:40] or "model"
    name = f"{readable}-{short_hash([asked.model, template.sha256])[:8]}"
    return run.storage, join(run.run_id, "judge", name)


def _setting(run: RunFolder, asked: Request, template: Template) -> dict[str, Any]:
    return {
        "run": run.run_id, "model": asked.model, "endpoint": asked.url, "temperature": 0,
        "template": {**template.words(), "sha256": template.sha256}, "repeats": asked.repeats,
        "tries": asked.tries, "methods": list(asked.methods), "max": asked.limit, "order": asked.order,
    }  # fmt: skip


def _tasks(answers: pd.DataFrame, asked: Request, template: Template) -> Iterator[Task]:
    for repeat in range(asked.repeats):
        for texts in answers[["prompt", "reference", "prediction"]].itertuples(index=False, name=None):
            prompt = prompt_hash(template.messages(*texts))
            key = judgement_key(prompt, asked.model, template, repeat)
            yield Task(key, prompt, repeat, partial(template.messages, *texts))


def _judged(answers: pd.DataFrame, asked: Request, template: Template, ledger: Ledger) -> pd.DataFrame:
    """Rows of JUDGEMENT_COLUMNS, one per answer and repeat; ``score`` is NaN where there is none."""
    rows = answers.sort_values(["seed", "method", "budget", "client", "row"], ignore_index=True)
    tasks = list(_tasks(rows, asked, template))
    frame = pd.concat([rows] * asked.repeats, ignore_index=True)
    known = [ledger.of(task.key) for task in tasks]
    frame = frame.assign(
        repeat=[task.repeat for task in tasks], key=[task.key for task in tasks],
        prompt_sha256=[task.prompt for task in tasks], score=pd.Series([one.score for one in known], dtype="float64"),
        model=[one.model for one in known], replies=[one.replies for one in known],
        problem=["" if one.score is not None else one.problem or "not asked" for one in known],
    )  # fmt: skip
    return frame[list(JUDGEMENT_COLUMNS)]


def results(judgements: pd.DataFrame) -> pd.DataFrame:
    """Rows of RESULT_COLUMNS, scores in units of the scale.

    An answer's score is the mean of its judgements that hold one, a client's the mean of its answers (once per seed).
    ``mean`` and ``sd`` (sample SD, NaN for one client) are over clients; ``answers`` counts those with a score,
    ``failures`` judgements without one. Language `AVERAGE` weighs languages equally and has no SD.

    Args:
        judgements: rows of JUDGEMENT_COLUMNS.
    """
    pools = judgements["client"].str.partition("/")[0]
    frame = judgements.assign(pool=pools, failures=judgements["score"].isna())
    unit, whole, sums = [*_CELL, "seed", "client"], _CELL[:-1], {"failures": ("failures", "sum")}
    answers = frame.groupby([*unit, "row"], as_index=False).agg(score=("score", "mean"), **sums)
    sums["answers"] = ("answers", "sum")
    clients = answers.groupby(unit, as_index=False).agg(
        score=("score", "mean"), answers=("score", "count"), failures=("failures", "sum")
    )
    table = clients.groupby(_CELL, as_index=False).agg(
        mean=("score", "mean"), sd=("score", "std"), clients=("score", "count"), **sums
    )
    scored = clients[clients["answers"] > 0].drop_duplicates([*whole, "seed", "client"])
    average = table.groupby(whole).agg(mean=("mean", "mean"), **sums)
    average["clients"] = scored.groupby(whole).size().reindex(average.index, fill_value=0)
    average = average.reset_index().assign(language=AVERAGE, sd=float("nan"))
    table = pd.concat([table.assign(last=False), average.assign(last=True)], ignore_index=True)
    ranks = {"pool": in_pool_order(table["pool"]), "method": in_method_order(table["method"])}
    table = table.sort_values(
        ["pool", "method", "budget", "last", "language"],
        key=lambda column: column.map(ranks[column.name].index) if column.name in ranks else column,
        ignore_index=True,
    )
    return table[list(RESULT_COLUMNS)]


def format_row(row: Mapping[Hashable, object]) -> list[str]:
    """A row as texts, in the order of RESULT_COLUMNS."""
    texts = {name: f"{row[name]:.2f}" if row[name] == row[name] else "" for name in ("mean", "sd")}
    texts |= {"method": method_name(str(row["method"])), "budget": "" if row["budget"] == -1 else str(row["budget"])}
    return [texts.get(name, str(row[name])) for name in RESULT_COLUMNS]


def _markdown(table: pd.DataFrame, asked: Request) -> str:
    rule = (
        f"0 to {asked.scale}; mean of {asked.repeats} judgement(s) per answer; mean and sample SD over clients. "
        f"Language {AVERAGE}: all languages weigh the same."
    )
    rows = [format_row(row) for row in table.to_dict("records")]
    return markdown(Grid(RESULT_COLUMNS, rows, caption=[rule], title=f"Scores of {asked.model}", labels=4)) + "\n"


def _gaps(missing: Collection[str], unasked: Collection[str], ledger: Ledger) -> tuple[str, ...]:
    sentences = {
        "reply": "have replies without exactly one score in range",
        "failure": "have no reply",
        "unasked": "were not asked, as the endpoint kept failing",
    }
    kinds = {key: "unasked" if key in unasked else ledger.of(key).kind for key in missing}
    gaps = []
    for kind, sentence in sentences.items():
        keys = [key for key in missing if kinds[key] == kind]
        causes = Counter(ledger.of(key).problem for key in keys if ledger.of(key).problem)
        why = f": {causes.most_common(1)[0][0]}" if causes else ""
        if keys:
            gaps.append(f"{len(keys)} {sentence}{why}")
    return tuple(gaps)
