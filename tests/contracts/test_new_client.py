"""A new client gets what the run gave an unseen client with the same rows, bit for bit, or is told why not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_kit import tiny_section
from peft import PeftModel
from safetensors.torch import load_file
from tiny import run_tiny, talk, tiny
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.core.errors import ConfigError, DataError
from fedtailor.experiment.launch import load_experiment
from fedtailor.methods import METHODS
from fedtailor.models.load import load_base
from fedtailor.personalise.export import export_client
from fedtailor.personalise.new_client import MEASURES, Answer, Request, carry_out, prepared
from fedtailor.personalise.trained import chosen_method
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.tokens import TokenData

ALONE = ("personalise.chunk=1", "personalise.pools=[unseen]", "budgets=[2]", "save_adapters=true")
"""One client at one budget in a forward pass, as a new client is: other company changes the rounding."""

REFUSED = {
    "majority": "trains nothing",
    "prior_shift": "trains nothing",
    "base": "trains nothing",
    "dept": "trains the base's own weights",
}
COMMON = {
    "fedavg": 3,
    "fedprox": 3,
    "fedavgm": 3,
    "fedadagrad": 3,
    "fedadam": 3,
    "fedyogi": 3,
    "feddpa": 3,
    "perfit": 4,
    "homlora": 3,
    "perfedavg_lora": 3,
    "pf2lora": 3,
    "centralised_lora": 3,
    "hetlora": 3,
    "mix_grid": 3,
    "mix_random": 3,
    "mix_gradient": 3,
    "fdlora": 3,
    "pfedgpt": 3,
}
"""Methods whose clients all use one LoRA, and its rank."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Every method on a base that FedAvg trained with LoRA."""
    sections = [word for name, entry in METHODS.items() for word in tiny_section(name, entry.tiny or {})]
    small = ("task.languages=[eng,yor]", "task.clients_per_language=12", "task.clients_kept=1", "base.rounds=1",
             "base.cohort=2", "strategy.rounds=1", "strategy.cohort=2", f"methods=[{','.join(METHODS)}]")  # fmt: skip
    return run_tiny(tiny(tmp_path_factory.mktemp("texts"), *small, *ALONE, *sections))


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Some methods on instructions of four clients, one of them unseen."""
    folder = tmp_path_factory.mktemp("talks")
    rows = [
        {"client": f"c{c}", "instruction": f"Write {i} of kind {c}.", "response": f"{'no' if c % 2 else 'yes'} {i}"}
        for c in range(4)
        for i in range(6)
    ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ("task=instructions", f"task.path={folder / 'all.jsonl'}", "task.unseen=[c3]", "task.max_length=48")
    small = ("base.rounds=1", "base.cohort=2", "strategy.rounds=1", "strategy.cohort=2", "fedavg.adapter=lora")
    return run_tiny(talk(folder, *task, *small, *ALONE, "methods=[lora,feddpa,fedprox,ditto,fedp2eft]"))


def new_client(run: RunFolder, out: Path, client: str, **asked: Any) -> tuple[Mapping[str, Any], list[Answer]]:
    """A new client with the rows of one of the run's own."""
    data = TaskData.open(next(Path(run.storage.url).glob("artifacts/data-*")))
    files = {}
    for split in ("train", "test"):
        words, labels = data.texts(client, split)  # type: ignore[arg-type]
        rows = [{"text": word, "label": data.labels[label]} for word, label in zip(words, labels, strict=True)]
        if data.kind == "generation":
            pairs = data.pairs(client, split) or []  # type: ignore[arg-type]
            rows = [{"instruction": w, "response": r} for w, r in zip(words, pairs, strict=True)]
        files[split] = out.with_suffix(f".{split}.jsonl")
        files[split].write_text("\n".join(map(json.dumps, rows)))
    request = Request(
        run.run_id, str(files["train"]), out, run.storage.url, test=str(files["test"]), client=client, **asked
    )
    with prepared(request) as ready:
        return carry_out(ready)


def given(run: RunFolder, client: str, method: str) -> dict[str, float]:
    """What the run measured of the client's model."""
    frame = run.metrics("personalise")
    own = frame[(frame.client == client) & (frame.method == method) & (frame.module == "")]
    return dict(zip(own.metric, own.value, strict=True))


def same_as_in_the_run(run: RunFolder, tmp_path: Path, client: str, method: str) -> Mapping[str, Any]:
    record, _ = new_client(run, tmp_path / "new", client, method=method)
    own, made = given(run, client, method), record["scores"]["personalised"]
    assert {name: made[name] for name in MEASURES if name in made} == {n: v for n, v in own.items() if n in MEASURES}
    assert {name: record[name] for name in own if name not in MEASURES} == {
        name: value for name, value in own.items() if name not in MEASURES
    }
    assert record["scores"]["base"]["loss"] == given(run, client, "base").get("loss", record["scores"]["base"]["loss"])
    if method not in ("fedavg", "fedprox", "feddpa"):
        export_client(run, client, method, 2, 42, tmp_path / "own")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    return record


@pytest.mark.parametrize("method", METHODS)
def test_a_client_with_an_unseen_client_s_texts_gets_its_adapter_and_score(
    texts: RunFolder, tmp_path: Path, method: str
) -> None:
    if method in REFUSED:
        with pytest.raises(ConfigError, match=f"--method {method}: it {REFUSED[method]}.* that give a client"):
            new_client(texts, tmp_path / "new", "unseen/yor/00", method=method)
        return
    record = same_as_in_the_run(texts, tmp_path, "unseen/yor/00", method)
    assert record["budget"] == COMMON.get(method, 2)


@pytest.mark.parametrize("method", ["lora", "feddpa", "fedprox", "ditto", "fedp2eft"])
def test_a_client_with_an_unseen_client_s_instructions_gets_its_adapter_and_score(
    talks: RunFolder, tmp_path: Path, method: str
) -> None:
    same_as_in_the_run(talks, tmp_path, "unseen/all/c3", method)


@pytest.mark.parametrize(
    ("method", "kind"), [("fedavg", "texts"), ("feddpa", "texts"), ("homlora", "texts"), ("feddpa", "talks")]
)
def test_the_lora_that_all_clients_use_is_what_peft_loads(
    request: pytest.FixtureRequest, tmp_path: Path, method: str, kind: str
) -> None:
    run, client = request.getfixturevalue(kind), "unseen/yor/00" if kind == "texts" else "unseen/all/c3"
    record, _ = new_client(run, tmp_path / "new", client, method=method)
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    data = TokenData.open(next(Path(run.storage.url).glob("artifacts/tokens-*")))
    base = json.loads((tmp_path / "new/adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(load_base(base, data.kind, data.labels), str(tmp_path / "new")).eval()
    test, losses = data.examples(client, "test"), []
    for i, length in enumerate(test.lengths[: record["scores"]["base"]["count"]]):
        row = torch.from_numpy(test.input_ids[i, :length])[None]
        with torch.no_grad():
            scores = model(input_ids=row).logits
        if test.prompt_length is None:
            losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(test.labels[i : i + 1])))
        else:
            prompt = int(test.prompt_length[i])
            losses.append(torch.nn.functional.cross_entropy(scores[0, prompt - 1 : -1], row[0, prompt:]))
    assert record["scores"]["personalised"]["loss"] == pytest.approx(float(sum(losses) / len(losses)), abs=1e-5)


def test_models_that_answer_show_what_they_answered_before_and_after(talks: RunFolder, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Write {i}."}, {"role": "assistant", "content": "no"}]}
            for i in range(12)]  # fmt: skip
    rows[3]["messages"][1]["content"] = " "
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--run", "run", "--storage", talks.storage.url, "--data", str(tmp_path / "mine.jsonl"), "--merge"]
    words += ["--method", "lora"]
    done = CliRunner().invoke(app, ["personalise", *words, "--out", str(tmp_path / "out"), "epochs=30", "lr=3e-2"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out/personalise.json").read_text())
    assert (record["method"], record["data"]["empty"], record["test"]["used"]) == ("lora", 1, 2)
    before, after = record["scores"]["base"], record["scores"]["personalised"]
    assert after["loss"] < before["loss"]
    for word in ("12 rows; 1 without instruction or response left out", "ROUGE-L in %", f"{after['loss']:.4f}"):
        assert word in done.output
    assert re.search(r"asked +Write \d+\. *\nwanted +no *\nbase model .*\npersonalised +no *\n", done.output)
    code = (tmp_path / "out/README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(tmp_path / "out"))), names)
    ids = names["tokenizer"]("Write 3.", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = names["model"](input_ids=ids).logits
        merged = load_base(tmp_path / "out/merged", "generation")(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)


def test_columns_are_not_named_for_instructions(talks: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--text, --pair and --label are for runs that classify"):
        new_client(talks, tmp_path / "new", "unseen/all/c3", text="prompt")
    (tmp_path / "mine.csv").write_text("frage,antwort\na,b\n")
    asked = Request("run", str(tmp_path / "mine.csv"), tmp_path / "new", talks.storage.url)
    with (
        pytest.raises(DataError, match=r"mine.csv, line 2: keys frage, antwort fit none of the shapes"),
        prepared(asked),
    ):
        pass


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"method": "ditto", "budget": 1}, r"--budget 1: ditto of run 'run' was trained for each .*\(allowed: 2\)"),
        ({"method": "fedprox", "budget": 2}, r"--budget 2: all clients use the one LoRA of fedprox .*\(allowed: 3\)"),
        ({"method": "lora", "budget": 3}, r"--budget 3: lora of run 'run' serves .* r_max = 2 \(allowed: 1 \.\.\. 2\)"),
        ({"method": "fedprox", "overrides": ["lr=1"]}, "lr=1: fedprox trains nothing on a new client"),
        ({"method": "adalora", "overrides": ["lrr=1"]}, "unknown key 'lrr'; did you mean 'lr'?"),
        ({"client": "me"}, r"--client me: an id has three parts, e.g. unseen/new/newcomer"),
    ],
)
def test_what_a_method_does_not_serve_is_told(texts: RunFolder, tmp_path: Path, asked: Any, told: str) -> None:
    request = Request("run", "none.csv", tmp_path / "new", texts.storage.url, **asked)
    with pytest.raises(ConfigError, match=told), prepared(request):
        pass


def test_the_usual_method_is_the_last_one_that_was_trained(texts: RunFolder) -> None:
    exp = load_experiment(texts)
    for methods, usual in (
        (METHODS, "fedp2eft"), (("lora", "fedbabu", "adalora"), "fedbabu"), (("base", "lora", "adalora"), "adalora"),
    ):  # fmt: skip
        assert chosen_method("run", exp.model_copy(update={"methods": tuple(methods)}), None) == usual
