"""A personalised client taken away: plain peft on the exported base is the model that the run evaluated."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, model_of
from peft import PeftModel
from squad_case import SPANS, write_squad
from tiny import run_tiny, talk, tiny
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from fedtailor.evaluation.spans import score
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.prepare import make_inputs
from fedtailor.lanes.batches import LaneBatch
from fedtailor.models.load import load_causal, load_classifier, load_tokenizer
from fedtailor.personalise.export import base_folder, export_client
from fedtailor.storage.artifacts import Artifacts, model_path
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import PREDICTIONS
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.tokens import TokenData

CLIENTS = ("seen/amh/00", "unseen/yor/02")


def loss_of(model: torch.nn.Module, data: TokenData, client: str) -> float:
    """Mean cross-entropy on a client's test texts."""
    test = data.examples(client, "test")
    mask = torch.arange(test.input_ids.shape[1]) < torch.from_numpy(test.lengths).unsqueeze(1)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(test.input_ids), attention_mask=mask.long()).logits
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels)))


METHODS = {
    "lora": ("scale=1.7",), "fedp2eft": ("finetune.scale=1.7",), "ditto": ("scale=1.7", "lr=1e-2", "batch_size=8"),
    "fedbabu": ("scale=1.7", "lr=1e-2", "batch_size=8", "tune_epochs=1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    keys = [f"{method}.{key}" for method, keys in METHODS.items() for key in keys]
    few = ("strategy.rounds=2", f"methods=[{','.join(METHODS)}]", "save_adapters=true")
    return run_tiny(tiny(tmp_path_factory.mktemp("run"), *few, *keys))


@pytest.mark.parametrize("method", METHODS)
def test_peft_reproduces_the_test_loss_of_the_run(run: RunFolder, tmp_path: Path, method: str) -> None:
    artifacts = Path(run.storage.url) / "artifacts"
    base = next(artifacts.glob("base-*/model"))
    data = TokenData.open(next(artifacts.glob("tokens-*")))
    objects = {
        name: commit
        for stage in run.stages("personalise")
        if stage["method"] == method
        for commit in CommitLog(run.storage, f"artifacts/{stage['artifact']}").all()
        for name in commit.objects
    }
    frame = run.metrics()
    losses = frame[(frame.metric == "loss") & (frame.method == method)].set_index(["client", "budget"]).value
    for client in CLIENTS:
        for budget in (1, 2):
            prefix = f"adapters/r{budget}/{client}/"
            folder = tmp_path / "out" / prefix
            folder.mkdir(parents=True)
            for name in (n for n in objects if n.startswith(prefix)):
                (folder / name.removeprefix(prefix)).write_bytes(objects[name].bytes(name))
            model = PeftModel.from_pretrained(load_classifier(base, data.labels), str(folder)).eval()
            assert loss_of(model, data, client) == pytest.approx(float(losses[client, budget]), abs=1e-5)


@pytest.mark.parametrize("base", ["dept", "feddpa"])
def test_a_client_that_keeps_a_part_of_its_base_takes_it_along(tmp_path: Path, base: str) -> None:
    own = (f"base.name={base}", f"{base}.lr=1e-2", f"{base}.batch_size=8", "base.rounds=1")
    run = run_tiny(tiny(tmp_path, *own, "methods=[lora]", "budgets=[1]", "save_adapters=true"))
    frame = run.metrics()
    sampled = frame[frame["stage"] == "base"]["client"].iloc[0]
    losses = frame[(frame.metric == "loss")].set_index("client").value
    for client, keeps in ((sampled, True), ("unseen/yor/00", False)):
        out = tmp_path / "out" / client
        belongs = export_client(run, client, "lora", 1, 42, out)
        assert (belongs == out / "base") is keeps
        model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(belongs), str(out)).eval()
        data = TokenData.open(next((tmp_path / "artifacts").glob("tokens-*")))
        assert loss_of(model, data, client) == pytest.approx(float(losses[client]), abs=1e-5)
    common = AutoModelForSequenceClassification.from_pretrained(base_folder(run, 42))
    shared = PeftModel.from_pretrained(common, str(tmp_path / "out" / sampled)).eval()
    assert abs(loss_of(shared, data, sampled) - float(losses[sampled])) > 1e-4, "its own part matters"


@pytest.mark.parametrize("method", ["lora", "fedp2eft"])
def test_peft_reproduces_the_answers_loss_of_a_language_model(tmp_path: Path, method: str) -> None:
    """Mean over the client's answers of the mean loss of an answer's tokens."""
    run = run_tiny(talk(tmp_path, f"methods=[{method}]", "budgets=[2]", "save_adapters=true", "decoding.max_test=4"))
    data = TokenData.open(next((tmp_path / "artifacts").glob("tokens-*")))
    frame = run.metrics().query("metric == 'loss' and stage == 'personalise'")
    client = frame.client.iloc[0]
    own = frame[frame.client == client]
    export_client(run, client, method, 2, 42, tmp_path / "out")
    model = PeftModel.from_pretrained(load_causal(base_folder(run, 42)), str(tmp_path / "out")).eval()
    test = data.examples(client, "test")
    losses = []
    for ids, prompt, length in zip(test.input_ids[:4], test.prompt_length[:4], test.lengths[:4], strict=True):
        row = torch.from_numpy(ids[:length])[None]
        with torch.no_grad():
            scores = model(input_ids=row).logits[0, prompt - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(scores, row[0, prompt:])))
    assert float((own.value * own.weight).sum() / own.weight.sum()) == pytest.approx(sum(losses) / 4, abs=1e-5)


def folder_with(model_type: str, exp: ExperimentBase, folder: Path) -> Path:
    """A random model of this type as a Hugging Face folder, with the tokenizer that the experiment's own model has."""
    inputs = make_inputs(exp, 42, Artifacts(Storage(exp.storage), "tokenizer", print))
    tokenizer = load_tokenizer(Path(exp.storage) / model_path(inputs.model))
    architecture = next(own for own in ARCHITECTURES if own.type == model_type)
    kind = architecture.kinds[-1]
    end = tokenizer.eos_token_id if kind == "generation" else tokenizer.sep_token_id
    model_of(architecture.config(len(tokenizer), end), kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers_of(run: RunFolder) -> pd.DataFrame:
    [stage] = run.stages("personalise")
    commits = CommitLog(run.storage, f"artifacts/{stage['artifact']}").all()
    return pd.concat([commit.table(PREDICTIONS).to_pandas() for commit in commits if PREDICTIONS in commit.objects])


@pytest.mark.parametrize("method", ["homlora", "pf2lora"])
def test_peft_answers_as_a_gpt2_client_does(tmp_path: Path, method: str) -> None:
    """Same losses and, token by token, the same greedy answers."""
    folder = folder_with("gpt2", talk(tmp_path / "made"), tmp_path / "gpt2")
    own = (f"{method}.{key}" for key in ("targets=[c_attn]", "lr=3e-2", "batch_size=8", "rank=3"))
    keys = (f"methods=[{method}]", "budgets=[2]", "base.name=none", "personalise.pools=[seen]", "save_adapters=true")
    kept = (f"model={folder}", "personalise.save_predictions=true")
    run = run_tiny(talk(tmp_path, *keys, *kept, *own))
    data = TokenData.open(next((tmp_path / "artifacts").glob("tokens-*")))
    frame, answers, tokenizer = run.metrics().query("stage == 'personalise'"), answers_of(run), load_tokenizer(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    changed = 0
    for client in sorted(set(answers.client)):
        base = export_client(run, client, method, 2, 42, tmp_path / "out" / client)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / client).eval()
        test, mine = data.examples(client, "test"), answers[answers.client == client].sort_values("row")
        losses = []
        for row, said in zip(mine.row, mine.prediction, strict=True):
            prompt, length = test.prompt_length[row], test.lengths[row]
            ids = torch.from_numpy(test.input_ids[row, :length])[None]
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, prompt - 1 : -1]
                both = [
                    own.generate(
                        input_ids=ids[:, :prompt], attention_mask=torch.ones(1, int(prompt)), do_sample=False,
                        max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                    )[0, prompt:]
                    for own in (model, plain)
                ]  # fmt: skip
            losses.append(float(torch.nn.functional.cross_entropy(scores, ids[0, prompt:])))
            answer, before = (tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in both)
            assert answer == said
            changed += answer != before
        loss = frame[(frame.client == client) & (frame.metric == "loss") & (frame.module == "")]
        assert float((loss.value * loss.weight).sum() / loss.weight.sum()) == pytest.approx(
            sum(losses) / len(losses), abs=1e-5
        )
    assert changed, "adapters change answers"


@pytest.mark.parametrize(("method", "model"), [("lora", None), ("pf2lora", None), ("pf2lora", "deberta-v2")])
def test_peft_marks_the_spans_of_the_run(tmp_path: Path, method: str, model: str | None) -> None:
    keys = {"lora": ("lora.lr=5e-2",), "pf2lora": ("pf2lora.lr=5e-2", "pf2lora.batch_size=8")}[method]
    path = write_squad(tmp_path / "squad" / "train-v2.0.json.gz")
    if model:
        made = compose([], [*SPANS, f"task.path={path}", f"storage={tmp_path / 'made'}"])
        keys += (f"model={folder_with(model, made, tmp_path / model)}",)
    own = (f"task.path={path}", f"storage={tmp_path}", f"methods=[{method}]", "budgets=[2]", "save_adapters=true")
    run = run_tiny(compose([], [*SPANS, *own, "personalise.save_predictions=true", *keys]))
    data = TokenData.open(next((tmp_path / "artifacts").glob("tokens-*")))
    frame, answers = run.metrics().query("stage == 'personalise' and module == ''"), answers_of(run)
    for client in ("seen/squad2/00", "seen/squad2/03"):
        belongs = export_client(run, client, method, 2, 42, tmp_path / "out" / client)
        base = AutoModelForQuestionAnswering.from_pretrained(belongs or base_folder(run, 42))
        plain_model = PeftModel.from_pretrained(base, str(tmp_path / "out" / client)).eval()

        def logits(batch: LaneBatch, model: torch.nn.Module = plain_model) -> torch.Tensor:
            ids, mask, types = (x[0] for x in (batch.input_ids, batch.attention_mask, batch.token_type_ids))
            found = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
            return (
                torch.stack([found.start_logits, found.end_logits], 1)
                .masked_fill(mask[:, None] == 0, -1e30)
                .view(1, -1, ids.shape[1])
            )

        [plain] = score(logits, [data.examples(client, "test")], [data.asked(client)], data.pad_id, 512, "cpu", True)
        mine = frame[frame.client == client].set_index("metric").value
        assert plain.loss == pytest.approx(mine["loss"], abs=1e-5)
        for name, value in plain.measures.items():
            assert value == pytest.approx(mine[name], abs=1e-6)
        assert list(plain.answers) == answers[answers.client == client].prediction.tolist()
