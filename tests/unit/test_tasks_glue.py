"""Task glue: GLUE's own files and the hub's rows, clients whose labels are partly sorted, Matthews correlation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import run_tiny

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.core.messages import metric_row
from fedtailor.evaluation.classification import matthews
from fedtailor.experiment.compose import compose
from fedtailor.experiment.plan import make_plan
from fedtailor.report import report_of
from fedtailor.report.scores import answer_measures, by_language, checked, primary, scored_rows
from fedtailor.tasks import glue
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import Shard
from fedtailor.tasks.rows import Row
from fedtailor.tasks.sorted_share import sorted_partition
from fedtailor.tasks.source import Example, LanguagePool
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare, task_config

WORDS = ["ada", "barks", "calmly", "during", "every", "fine", "game", "here"]


def text(i: int) -> str:
    return " ".join(WORDS[int(d)] for d in f"{i:05o}")


def write(folder: Path, rows: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return folder


def cola(root: Path, train: int = 40, dev: int = 24) -> Path:
    """A third of the rows is unacceptable; one text has a lone quote."""
    rows = [f'gj04\t{int(i % 3 > 0)}\t\t{text(i)}{" “ 12" if i == 1 else ""} "' for i in range(train + dev)]
    return write(root / "CoLA", {"train.tsv": rows[:20], "val.tsv": rows[20:train], "dev.tsv": rows[train:]}).parent


def cfg(root: Path, **more: Any) -> TaskConfig:
    return task_config("glue", path=str(root), **{"subset": "cola", "clients_per_language": 4} | more)


def made(config: TaskConfig, out: Path) -> TaskData:
    return prepare(config, 42, out / "data")


def pool(train: tuple[int, ...], test: tuple[int, ...]) -> LanguagePool:
    parts = ([Example(f"{c} {i}", c) for c, n in enumerate(counts) for i in range(n)] for counts in (train, test))
    return LanguagePool(*parts)


def deal(part: LanguagePool, share: float, clients: int = 4, **more: Any) -> list[Shard]:
    config = TaskConfig(sorted_share=share, clients_per_language=clients, **more)
    return list(sorted_partition(part, "seen", "x", config, ("no", "yes", "perhaps"), 42))


def classes(part: LanguagePool, shards: list[Shard], split: str) -> np.ndarray:
    labels = np.array([e.label for e in part.split(split)])  # type: ignore[arg-type]
    return np.stack([np.bincount(labels[getattr(s, split)], minlength=3) for s in shards])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("test_split", ["mirror", "blocks"])
def test_every_text_has_one_client_and_train_sizes_differ_by_at_most_one(share: float, test_split: str) -> None:
    part = pool((50, 30, 22), (21, 17, 9))
    shards = deal(part, share, test_split=test_split)
    for split in ("train", "test"):
        rows = np.concatenate([getattr(s, split) for s in shards])
        assert sorted(rows) == list(range(len(part.split(split))))  # type: ignore[arg-type]
    assert sorted(len(s.train) for s in shards) == [25, 25, 26, 26]


def test_the_share_is_what_is_sorted_and_the_rest_is_iid() -> None:
    part = pool((400, 400, 0), (40, 40, 0))
    majority = [classes(part, deal(part, s), "train").max(axis=1).mean() / 200 for s in (0.0, 0.5, 1.0)]
    assert majority == pytest.approx([0.5, 0.75, 1.0], abs=0.05)
    assert classes(part, deal(part, 1.0), "train").tolist() == [[200, 0, 0]] * 2 + [[0, 200, 0]] * 2


def test_mirrored_test_texts_have_the_class_shares_of_train_texts_and_blocks_may_not() -> None:
    part = pool((500, 300, 0), (30, 50, 0))
    for shards, near in ((deal(part, 0.9), True), (deal(part, 0.9, test_split="blocks"), False)):
        train, test = (classes(part, shards, split) for split in ("train", "test"))
        expected = train / train.sum(axis=0, where=train > 0, keepdims=True).clip(1) * np.array([30, 50, 0])
        assert bool(np.abs(expected - test).max() < 1) is near


def test_a_class_that_cannot_be_mirrored_is_named() -> None:
    part = pool((50, 30, 20), (21, 17, 3))
    message = r"class 'perhaps' of seen/x has 3 test texts for 4 clients.*clients_per_language.*test_split=blocks"
    with pytest.raises(DataError, match=message):
        deal(part, 0.5)
    assert len(deal(part, 0.5, test_split="blocks")) == 4
    with pytest.raises(DataError, match="client seen/x/03 would have 1 train and 2 test texts, and needs 2 and 1"):
        deal(pool((3, 4, 0), (10, 10, 0)), 0.0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=rf"'task\.sorted_share': .*, got {share}"):
        compose([], ["task=glue", f"task.sorted_share={share}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=glue", "task.subset=colla"], r"'task\.subset': allowed: cola, sst2, .*did you mean 'cola'"),
        (["task=glue", "task.pools=[unseen]"], r"'task\.pools': allowed: \[seen\], \[seen,unseen\]"),
        (
            ["task=glue", "personalise.pools=[unseen]"],
            r"'personalise.pools' = \[unseen\] leaves nobody.*allowed: \[seen\]",
        ),
        (["task=glue", "task.resample=3"], "'task.sorted_share' and 'task.resample' exclude each other"),
        (["task=xnli", "task.pools=[seen]", "task.reference_unseen_partition=true"], "'task.pools' has none"),
    ],
)
def test_keys_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([], overrides)


def test_all_texts_go_to_seen_clients_and_split_off_train_rows_are_train_rows(tmp_path: Path) -> None:
    data = made(cfg(cola(tmp_path)), tmp_path)
    assert [(c.id, c.n_train) for c in data.clients] == [(f"seen/cola/{i:02d}", 10) for i in range(4)]
    assert sum(c.n_test for c in data.clients) == 24
    assert data.labels == ("unacceptable", "acceptable")
    assert data.score == "mcc"
    assert sum(np.array(c["train_classes"]) for c in data.manifest["clients"]).tolist() == [14, 26]
    assert any(t.endswith('“ 12 "') for c in data.clients for t in data.texts(c.id, "train")[0])
    both = made(cfg(tmp_path, pools=("seen", "unseen"), clients_per_language=2), tmp_path / "both")
    assert [len(both.pool(p)) for p in ("seen", "unseen")] == [2, 2]


FILES = {
    "sst2": ("SST-2", "sentence\tlabel", "{}\t1", "positive"),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\tq{0}\t{0}\tnot_entailment", "not_entailment"),
    "mnli": ("MNLI", "index\tsentence1\tsentence2\tgold_label", "0\tq{0}\t{0}\tneutral", "neutral"),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tq{0}\t{0}\t0", "not_duplicate"),
}


@pytest.mark.parametrize("subset", FILES)
def test_files_are_read_as_glue_distributes_them(subset: str, tmp_path: Path) -> None:
    folder, header, row, label = FILES[subset]
    dev = ["dev_matched.tsv", "dev_mismatched.tsv"] if subset == "mnli" else ["dev.tsv"]
    rows = {name: [header, *(row.format(f"{name} {i}") for i in range(5))] for name in ("train.tsv", *dev)}
    if subset == "qqp":
        rows["train.tsv"].append("broken\trow")
    root = write(tmp_path / folder, rows).parent
    for path in (root, root / folder):
        source = glue.load(cfg(path, subset=subset), 42)
        part = [source.pools[p][subset] for p in ("seen", "unseen")]
        assert sum(len(p.train) for p in part) == 5
        assert sum(len(p.test) for p in part) == 5 * len(dev)
        assert {source.labels[e.label] for p in part for e in p.train} == {label}
        assert source.paired is (subset != "sst2")
        assert source.notes["dropped_damaged"] == int(subset == "qqp")


def test_the_hubs_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*name: str, split: str) -> list[Row]:
        assert name == ("nyu-mll/glue", "mnli")
        values = {"premise": f"p {split}", "hypothesis": "h", "label": 2, "idx": 0}
        return [Row("hub", values | {"hypothesis": f"h{i}"}) for i in range(4)]

    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    monkeypatch.setattr(glue, "hub_rows", rows)
    part = glue.load(task_config("glue", subset="MNLI"), 42).pools["seen"]["mnli"]
    assert part.train[0][1:3] == (2, part.train[0].pair)
    assert {e.text for e in part.test} == {"p validation_matched", "p validation_mismatched"}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("SST-2/dev.tsv", ["index\tsentence", "0\tfine"], r"dev\.tsv, line 1: no column label, so it holds no labels"),
        ("SST-2/dev.tsv", ["sentence\tlabel", "fine\t-1"], r"dev\.tsv, line 2: no label .*allowed: 0 or negative"),
        (
            "SST-2/train.tsv",
            ["sentence\tlabel", "fine\t2"],
            r"train\.tsv, line 2: unknown label '2'; allowed: 0 or neg",
        ),
        ("SST-2/train.tsv", ["sentence\tlabel", "fine"], r"train\.tsv, line 2: 1 columns, expected sentence, label"),
        ("CoLA/dev.tsv", ["index\tsentence"], r"dev\.tsv, line 1: 2 columns, expected .*holds no labels"),
        ("CoLA/dev.tsv", None, r"CoLA: missing file, one of dev\.tsv, dev\.tsv\.gz"),
        ("CoLA/train.tsv", None, r"task\.path: no train\.tsv or train\.tsv\.gz in .*CoLA, .* or .* itself"),
    ],
)
def test_what_cannot_serve_is_named(name: str, rows: list[str] | None, message: str, tmp_path: Path) -> None:
    cola(tmp_path)
    write(tmp_path / "SST-2", {f"{part}.tsv": ["sentence\tlabel", "good\t1", "bad\t0"] for part in ("train", "dev")})
    (tmp_path / name).unlink()
    if rows is not None:
        write((tmp_path / name).parent, {Path(name).name: rows})
    with pytest.raises(DataError, match=message):
        glue.load(cfg(tmp_path, subset="sst2" if name.startswith("SST") else "cola"), 42)


def test_a_subset_and_english_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'task\.subset' names no data set of glue \(allowed: cola, sst2"):
        glue.load(cfg(tmp_path, subset=None), 42)
    with pytest.raises(ConfigError, match=r"'task\.languages' \(fra\): glue is in English alone"):
        glue.load(cfg(tmp_path, languages=("fra",)), 42)


def test_test_texts_that_are_train_texts_are_counted_and_dropped(tmp_path: Path) -> None:
    rows = [f"gj04\t{i % 2}\t\t{text(i)}" for i in range(8)]
    write(
        tmp_path / "CoLA", {"train.tsv": rows, "dev.tsv": [*rows[:2], *(f"gj04\t{i % 2}\t\tnew {i}" for i in range(6))]}
    )
    found = [glue.load(cfg(tmp_path, drop_duplicates=drop), 42).notes for drop in (False, True)]
    assert [(n["found_duplicates"], n["dropped_duplicates"]) for n in found] == [(2, 0), (2, 2)]


def test_matthews_is_zero_for_one_class_and_pooled_from_counts() -> None:
    assert matthews(np.array([[0, 4], [0, 6]])) == matthews(np.array([[0, 0], [3, 2]])) == 0.0
    tp, tn, fp, fn = 6, 3, 1, 2
    by_hand = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(np.array([[tn, fp], [fn, tp]])) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("subset", "share", "size", "majority"), [("cola", 0.3, 1069, 0.70), ("sst2", 0.9, 8419, 0.90)]
)
def test_real_files_give_the_published_sizes(
    subset: str, share: float, size: int, majority: float, tmp_path: Path
) -> None:
    root = Path(os.environ.get("FEDTAILOR_DATA", "none"), "glue")
    if not root.is_dir():
        pytest.skip("set FEDTAILOR_DATA to a folder that holds glue/ to deal its real texts")
    data = made(cfg(root, subset=subset, sorted_share=share, clients_per_language=8), tmp_path)
    assert {c.n_train for c in data.clients} == {size, size - 1}
    train, test = (np.array([c[f"{split}_classes"] for c in data.manifest["clients"]]) for split in ("train", "test"))
    right = np.take_along_axis(test, train.argmax(1)[:, None], 1).sum() / test.sum()
    assert right == pytest.approx(majority, abs=0.015), "what a client's most frequent class alone is worth"


def client_rows(client: str, table: list[list[int]]) -> list[dict[str, Any]]:
    confusion, size = np.array(table), float(np.sum(table))
    common = {"stage": "personalise", "method": "base", "pool": "seen", "language": "cola", "client": client}
    values = {"accuracy": np.trace(confusion) / size, "mcc": matthews(confusion), "loss": 0.5}
    rows = [metric_row(**common, metric=name, value=float(v), weight=size) for name, v in values.items()]
    cells = {f"{'ny'[i]}/{'ny'[j]}": float(n) for (i, j), n in np.ndenumerate(confusion)}
    return rows + [metric_row(**common, metric="confusion", module=m, value=v, weight=size) for m, v in cells.items()]


def test_a_group_is_the_mean_over_clients_and_pooled_beside_it() -> None:
    tables = {"seen/cola/00": [[30, 10], [5, 55]], "seen/cola/01": [[0, 2], [0, 8]]}
    scored = scored_rows(checked(pd.DataFrame([row for c, t in tables.items() for row in client_rows(c, t)])))
    assert primary(scored).name == "mcc"
    assert [m.name for m in answer_measures(scored)] == ["mcc", "mcc_pooled", "accuracy"]
    found = by_language(scored).set_index("metric")
    assert found.value["mcc"] == pytest.approx((matthews(np.array(tables["seen/cola/00"])) + 0) / 2)
    assert found.value["mcc_pooled"] == pytest.approx(matthews(np.array([[30, 12], [5, 63]])))
    assert found.value["accuracy"] == pytest.approx(93 / 110)
    assert (found.n_examples[["mcc", "mcc_pooled", "accuracy"]] == 110).all()
    assert (found.n_clients == 2).all()


def test_a_run_with_one_pool_is_planned_run_and_reported(tmp_path: Path) -> None:
    words = [
        "task=glue", "task.subset=cola", f"task.path={cola(tmp_path)}", "task.clients_per_language=3", "base=none",
        "methods=[majority,base]", "model.hidden_size=16", "model.layers=1", "model.vocab_size=200",
        "engine.backend=serial", "task.max_length=16", f"storage={tmp_path / 'runs'}",
    ]  # fmt: skip
    exp = compose([], words)
    plan = make_plan(exp)
    assert (plan.population.seen, plan.population.unseen) == (3, 0)
    run = run_tiny(exp)
    report_of(run, tmp_path / "report")
    table = (tmp_path / "report/table_seen.md").read_text("utf-8")
    assert "Matthews correlation in percent on seen clients" in table
    assert "Of the train texts a share s = 0.9 is sorted by label" in table
    assert "the paper's text calls s the IID share" in table
    beside = (tmp_path / "report/metrics_seen.md").read_text("utf-8")
    assert "Matthews correlation / Pooled Matthews correlation / Accuracy, in this order, in percent" in beside
