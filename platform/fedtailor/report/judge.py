"""``fedtailor judge``: a language model scores the answers of a finished run, several times each.

What is judged is kept reply by reply and never asked again, whatever ends the command. The judgements become a table:
methods, budgets and languages, with mean and spread over clients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from fedtailor.core.errors import ConfigError, StorageError, did_you_mean
from fedtailor.core.seeding import numpy_rng
from fedtailor.experiment.stages import short_hash
from fedtailor.report.grid import Grid, markdown
from fedtailor.report.judge_client import KEY, Endpoint, Line, Template, ask_all
from fedtailor.report.names import method_name
from fedtailor.report.samples import committed_answers
from fedtailor.report.scores import AVERAGE, in_table_order
from fedtailor.storage.files import Storage, join
from fedtailor.storage.journal import Journal
from fedtailor.storage.lock import Lock
from fedtailor.storage.payloads import canonical_json, encode, sha256
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.task import TASKS

COLUMNS = (
    "seed", "client", "language", "method", "budget", "row", "repeat", "score", "model", "replies", "problem",
    "prompt_sha256", "key",
)  # fmt: skip
"""Of ``judgements.parquet``."""

RESULT_COLUMNS = ("pool", "method", "budget", "language", "mean", "sd", "clients", "answers", "failures")
_CELL, _QUESTION = ["pool", "method", "budget", "language"], ["seed", "client", "row"]
"""What names a row of the table, and a question, which every method and budget answers."""


@dataclass(frozen=True)
class Request:
    """What is asked of whom.

    Args:
        url: address of the endpoint; ``model``: name that it knows; ``key_env``: variable that holds the key.
        repeats: judgements of an answer, averaged; ``scale``: highest score, the lowest is 0.
        methods: whose answers, empty: of all; ``limit``: questions at most, the same for all methods and budgets.
        order: seed of the order in which answers are judged, and of the choice that ``limit`` makes.
        tries: replies to ask for until one holds a score; ``at_once``: requests that run at the same time.
        timeout_s: seconds that the endpoint may be silent.
        retries: of a request that meets 429, 5xx or a lost connection.
        out: folder; default: ``<run>/judge/<model>-<hash of model and prompt>``.
    """

    url: str
    model: str
    key_env: str = KEY
    repeats: int = 3
    scale: int = 10
    methods: tuple[str, ...] = ()
    limit: int | None = None
    order: int = 0
    tries: int = 3
    at_once: int = 4
    timeout_s: float = 60.0
    retries: int = 5
    out: Path | None = None

    def check(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        least = {"repeats": 1, "scale": 1, "tries": 1, "at_once": 1, "retries": 0, "limit": 1}
        problems = [
            f"--{'max' if name == 'limit' else name.replace('_', '-')} {value}: at least {least[name]}"
            for name in least
            if (value := getattr(self, name)) is not None and value < least[name]
        ]
        if not self.timeout_s > 0:
            problems.append(f"--timeout {self.timeout_s:g}: more than 0 seconds")
        if not self.model.strip():
            problems.append("--model: a name that the endpoint knows")
        if problems:
            raise ConfigError(problems)


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
        StorageError: see `kept_answers`; the folder holds other files, or judgements of another run, model or prompt;
            LockedError while another process judges there.
        JudgeError: the endpoint is down.
    """
    asked.check()
    endpoint = Endpoint(asked.url, asked.model, asked.key_env, asked.timeout_s, asked.retries)
    template = Template(asked.scale)
    wanted = _wanted(kept_answers(run, asked.methods, asked.limit, asked.order), asked, template)
    storage, path = _place(run, asked, template)
    with Lock(storage, path, run.run_id):
        _begin(storage, path, run, asked, template)
        # Pieces are cut where a file grows large, and all are kept.
        journal = Journal(storage, path, "replies", kept=2**31)
        lines = [line for line in journal.entries() if "key" in line]

        def note(line: Line) -> None:
            lines.append(journal.append({**line, "run": run.run_id}))

        distinct = _with_replies(wanted, lines).drop_duplicates("key")
        # What failed before comes last, so that one bad question does not keep the others waiting.
        todo = distinct[distinct["score"].isna()].sort_values("kind", key=lambda kind: kind != "", kind="stable")
        unasked = ask_all(todo.to_dict("records"), endpoint, template, asked.tries, asked.at_once, note, tell)
        judged = _with_replies(wanted, lines).sort_values(
            ["repeat", "seed", "method", "budget", "client", "row"], ignore_index=True
        )
        table = results(judged)
        kept = pa.Table.from_pandas(judged[list(COLUMNS)], preserve_index=False)
        storage.write_bytes(join(path, "judgements.parquet"), encode("judgements", kept)[1])
        storage.write_bytes(join(path, "table.csv"), table.to_csv(index=False, lineterminator="\n").encode())
        storage.write_bytes(join(path, "table.md"), _markdown(table, asked).encode())
    missing = judged[judged["score"].isna()].drop_duplicates("key")
    counts = {"wanted": len(distinct), "there": len(distinct) - len(todo), "missing": len(missing)}
    return Judged(table, storage.full(path), counts, _gaps(missing, unasked))


def _wanted(answers: pd.DataFrame, asked: Request, template: Template) -> pd.DataFrame:
    """The answers once per repeat, with the hash of their prompt and the key of the judgement.

    A key names a judgement by its content, so that equal answers share it and a repeated command finds it.
    """
    texts = zip(answers["prompt"], answers["reference"], answers["prediction"], strict=True)
    prompts = [sha256(canonical_json(template.messages(*three))) for three in texts]

    def keys(repeat: int) -> list[str]:
        return [sha256(canonical_json([template.sha256, asked.model, prompt, repeat])) for prompt in prompts]

    repeats = [answers.assign(repeat=n, prompt_sha256=prompts, key=keys(n)) for n in range(asked.repeats)]
    return pd.concat(repeats, ignore_index=True)


def _with_replies(wanted: pd.DataFrame, lines: Sequence[Line]) -> pd.DataFrame:
    """The judgements with the newest of what is known of them; ``score`` is NaN where there is none."""
    frame = pd.DataFrame(lines, columns=["key", "number", "score", "model", "kind", "problem"]).groupby("key")
    known = frame[["score", "model", "kind", "problem"]].last().astype({"score": "float64"})
    table = wanted.join(known.assign(replies=frame["number"].count()), on="key")
    table["problem"] = table["problem"].fillna("not asked").where(table["score"].isna(), "")
    return table.fillna({"model": "", "kind": "", "replies": 0}).astype({"replies": "int64"})


def _place(run: RunFolder, asked: Request, template: Template) -> tuple[Storage, str]:
    if asked.out is not None:
        return Storage(asked.out), ""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", asked.model).strip(".-")[:40] or "model"
    name = f"{readable}-{short_hash([asked.model, template.sha256])[:8]}"
    return run.storage, join(run.run_id, "judge", name)


def _begin(storage: Storage, path: str, run: RunFolder, asked: Request, template: Template) -> None:
    """Keeps what the scores mean: run, model and template stay, the endpoint is added to those before."""
    file, where = join(path, "judge.json"), storage.full(path)
    before = storage.read_json(file) if storage.exists(file) else {}
    if not before and any(not name.startswith("LOCK") for name in storage.list(path)):
        raise StorageError(f"{where} is there already and holds no judgements; choose a new folder")
    setting: dict[str, Any] = {
        "run": run.run_id, "model": asked.model, "temperature": 0,
        "template": {**template.words(), "sha256": template.sha256}, "repeats": asked.repeats, "tries": asked.tries,
        "methods": list(asked.methods), "max": asked.limit, "order": asked.order,
    }  # fmt: skip
    if before and any(before[key] != setting[key] for key in ("run", "model", "template")):
        raise StorageError(f"{where} holds judgements of another run, model or prompt; choose a new folder")
    setting["endpoints"] = list(dict.fromkeys([*before.get("endpoints", []), asked.url]))
    storage.write_json(file, {"schema": 1, **setting})


def kept_answers(run: RunFolder, methods: Sequence[str], limit: int | None, order: int) -> pd.DataFrame:
    """Rows of `PREDICTION_SCHEMA` and ``seed``, questions in an order drawn from ``order``.

    Args:
        run: complete, of a generation task, with ``personalise.save_predictions=true``.
        methods: whose answers; empty: of all.
        limit: take so many questions at most, the first of that order, with the answers of all methods to them.
        order: seed of the order.

    Raises:
        ConfigError: a method that the run has not.
        StorageError: not complete, no generation task, answers were not kept, or a committed file is damaged.
    """
    config, state, name = run.info()["config"], run.status()["state"], f"run '{run.run_id}'"
    known, task = list(config["methods"]), config["task"]["name"]
    unknown = [f"{m}: not in this run{did_you_mean(m, known)}" for m in methods if m not in known]
    if unknown:
        raise ConfigError([f"--method {problem} (it has: {', '.join(known)})" for problem in unknown])
    if TASKS[task].kind != "generation":
        raise StorageError(f"{name} has no answers to judge: task {task} asks for classes")
    if state != "complete":
        raise StorageError(f"{name} is {state}, not complete; resume it first")
    if not config["personalise"].get("save_predictions"):
        raise StorageError(
            f"{name} kept no answers: personalise.save_predictions was off. Run it with "
            "personalise.save_predictions=true; all stages but the personalising ones are reused"
        )
    answers = committed_answers(run, methods)
    if answers.empty:
        raise StorageError(f"{name} has no answers of {', '.join(methods) or 'any method'}")
    questions = answers[_QUESTION].drop_duplicates().sort_values(_QUESTION)
    drawn = questions.iloc[numpy_rng(order, "judge", "order").permutation(len(questions))[:limit]]
    drawn = answers.merge(drawn.assign(place=range(len(drawn))), on=_QUESTION)
    return drawn.sort_values(["place", "method", "budget"], ignore_index=True).drop(columns="place")


def results(judgements: pd.DataFrame) -> pd.DataFrame:
    """Rows of RESULT_COLUMNS, scores in units of the scale.

    An answer's score is the mean of its judgements that hold one, a client's the mean of its answers (once per seed).
    ``mean`` and ``sd`` (sample SD, NaN for one client) are over clients; ``answers`` counts those with a score,
    ``failures`` judgements without one. Language `AVERAGE` weighs languages equally and has no SD.

    Args:
        judgements: rows of COLUMNS.
    """
    frame = judgements.assign(pool=judgements["client"].str.partition("/")[0], failures=judgements["score"].isna())
    unit, whole, failures = [*_CELL, "seed", "client"], _CELL[:-1], ("failures", "sum")
    answers = frame.groupby([*unit, "row"], as_index=False).agg(score=("score", "mean"), failures=failures)
    clients = answers.groupby(unit, as_index=False).agg(
        score=("score", "mean"), answers=("score", "count"), failures=failures
    )
    sums = {"answers": ("answers", "sum"), "failures": failures}
    table = clients.groupby(_CELL, as_index=False).agg(
        mean=("score", "mean"), sd=("score", "std"), clients=("score", "count"), **sums
    )
    average = table.groupby(whole).agg(mean=("mean", "mean"), **sums)
    scored = clients[clients["answers"] > 0].drop_duplicates([*whole, "seed", "client"])
    average["clients"] = scored.groupby(whole).size().reindex(average.index, fill_value=0)
    average = average.reset_index().assign(language=AVERAGE)
    return in_table_order(pd.concat([table, average]), _CELL)[list(RESULT_COLUMNS)]


def format_row(row: Mapping[Hashable, object]) -> list[str]:
    """A row as texts, in the order of RESULT_COLUMNS."""
    texts = {name: f"{row[name]:.2f}" if row[name] == row[name] else "" for name in ("mean", "sd")}
    texts |= {"method": method_name(str(row["method"])), "budget": "" if row["budget"] == -1 else str(row["budget"])}
    return [texts.get(name, str(row[name])) for name in RESULT_COLUMNS]


def _markdown(table: pd.DataFrame, asked: Request) -> str:
    rule = (
        f"0 to {asked.scale}; mean of {asked.repeats} judgement(s) per answer; mean and sample SD over clients. "
        "Language average: all languages weigh the same."
    )
    rows = [format_row(row) for row in table.to_dict("records")]
    return markdown(Grid(RESULT_COLUMNS, rows, caption=[rule], title=f"Scores of {asked.model}", labels=4)) + "\n"


def _gaps(missing: pd.DataFrame, unasked: Collection[str]) -> tuple[str, ...]:
    kinds, gaps = missing["kind"].mask(missing["key"].isin(list(unasked)), "unasked"), []
    for kind, sentence in {
        "reply": "have replies without exactly one score in range",
        "failure": "have no reply",
        "unasked": "were not asked, as the endpoint kept failing",
    }.items():
        problems = missing.loc[kinds == kind, "problem"]
        causes = Counter(problems[problems != "not asked"]).most_common(1)
        if len(problems):
            gaps.append(f"{len(problems)} {sentence}" + "".join(f": {cause}" for cause, _ in causes))
    return tuple(gaps)
