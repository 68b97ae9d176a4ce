"""What a report finds in a run's folder besides metrics, and what it shows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.core.messages import METRIC_COLUMNS, metric_row
from fedtailor.report import write_report
from fedtailor.report.facts import gather
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

TASK = {"name": "cldr", "clients_per_language": 2, "clients_kept": None, "alpha": 0.5, "max_length": 16}


def manifest(seed: int = 1, n_test: int = 5, **config: Any) -> dict[str, Any]:
    clients = [
        {"id": f"{pool}/{code}/0", "n_train": 10, "n_test": n_test, "train_classes": [4, 6]}
        for pool in ("seen", "unseen") for code in ("amh", "ur")
    ]  # fmt: skip
    task = {key: value for key, value in TASK.items() if key != "max_length"} | config
    return {
        "task": "cldr", "config": task, "seed": seed, "labels": ["خبر", "sport"], "clients": clients,
        "notes": {"leak_seen_unseen": 0}, "hash": f"{seed}{n_test}{config}",
    }  # fmt: skip


def run_with(storage: Path, *manifests: dict[str, Any], **config: Any) -> RunFolder:
    whole = {"task": TASK, "base": {"name": "fedavg", "rounds": 4}, "seeds": [1, 2]} | config
    for k, content in enumerate(manifests):
        folder = storage / "artifacts" / f"data-{k}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(content), "utf-8")
    run = RunFolder.create(Storage(str(storage)), "run", whole)
    run.set_stages(
        [
            {
                "key": f"personalise/lora/seed{seed}",
                "kind": "personalise",
                "seed": seed,
                "parent": "model-x",
                "data": f"data-{k}",
            }
            for k, seed in enumerate(whole["seeds"])
        ]
    )
    return run


def metrics() -> pd.DataFrame:
    rows = [
        metric_row(stage="personalise", method="lora", seed=seed, pool=pool, language=code,
                   client=f"{pool}/{code}/0", budget=2, metric="accuracy", value=0.5, weight=float(n))
        for seed, n in ((1, 5), (2, 7)) for pool in ("seen", "unseen") for code in ("amh", "ur")
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(METRIC_COLUMNS))


def test_the_data_of_the_first_seed_are_read(tmp_path: Path) -> None:
    found = gather(run_with(tmp_path, manifest(1), manifest(2, 7)))
    assert list(found.clients["n_test"]) == [5] * 4
    assert found.labels == ("خبر", "sport")
    assert [found.class_counts[seed]["seen/ur/0"] for seed in (1, 2)] == [(4, 6), (4, 6)]


def test_data_that_are_gone_are_left_out(tmp_path: Path) -> None:
    found = gather(run_with(tmp_path))
    assert found.clients.empty
    assert found.notes == {}


def test_keys_that_are_newer_than_a_run_have_their_defaults(tmp_path: Path) -> None:
    exp = gather(run_with(tmp_path)).experiment
    assert (exp.base.rounds, exp.scale, exp.privacy.name) == (4, 1.0, "none")
    with pytest.raises(ConfigError, match=r"base\.name.*allowed: fedavg"):
        gather(run_with(tmp_path / "other", base={"name": "gone"}))


def test_what_the_model_was_pretrained_on_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "pretrain.json"
    file.write_text('{"steps": 5}')
    run = run_with(tmp_path, model={"path": str(tmp_path / "model")})
    assert gather(run).pretrain == {"steps": 5}
    for damaged in ("[1]", "{"):
        file.write_text(damaged)
        with pytest.raises(DataError, match=r"pretrain\.json"):
            gather(run)


def test_a_page_shows_data_cost_scale_and_own_names(tmp_path: Path) -> None:
    run = run_with(tmp_path, manifest(), scale=0.5)
    run.timing("personalise/lora/seed1", 0, {"seen/amh/0": 2.0, "seen/ur/0": 2.0})
    files = write_report(run.info(), metrics(), {}, ["classifier"], tmp_path / "out", gather(run))
    assert {"cost.csv", "figures/clients_per_language.png", "figures/classes_per_language.png"} <= set(files)
    scale = "Scale 0.5: 1 of 2 clients per language and pool, 2 of 4 base rounds, 75 of 150 strategy rounds."
    for name in ("table_seen.md", "table_unseen.md", "table_seen.tex", "report.html"):
        assert scale in files[name].read_text("utf-8").replace("\\", "")
    page = files["report.html"].read_text("utf-8")
    assert 'lang="ur" dir="rtl">اردو<' in page
    assert '<th scope="row">personalise/lora</th>' in page
