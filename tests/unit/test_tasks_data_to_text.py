"""Tasks webnlg and e2e: from the challenges' files to clients with several references, and their measures."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from tiny import TALK, run_tiny

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.evaluation.corpus_metrics import MEASURES, corpus_measures, words
from fedtailor.evaluation.generation import measures
from fedtailor.experiment.compose import compose
from fedtailor.experiment.plan import make_plan
from fedtailor.report import report_of
from fedtailor.tasks import e2e, webnlg
from fedtailor.tasks.source import spaced
from fedtailor.tasks.task import prepare, task_config

DATA = Path(os.environ.get("FEDTAILOR_DATA", ""))


def needs(name: str) -> pytest.MarkDecorator:
    there = bool(os.environ.get("FEDTAILOR_DATA")) and (DATA / name).is_dir()
    return pytest.mark.skipif(not there, reason=f"set FEDTAILOR_DATA to a folder that holds {name}/ to test with it")


def table(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows])


def restaurants(root: Path, names: Sequence[str] = ("Aromi", "Cotto", "The Mill", "Zizzi")) -> Path:
    train = [(f"name[{n}], food[French], near[Café {i}]", f"{n} 's food , no . {i} .") for n in names for i in range(3)]
    table(root / "trainset_tokenised.csv", train)
    tests = [(f"name[{n}], priceRange[£20-25]", f"{n} is £20-{i}.") for n in names for i in (25, 26)]
    table(root / "testset_w_refs.csv", tests)
    return root


def entry(domain: str, number: int, lexs: Sequence[str] = ("One.", "Two.")) -> dict[str, Any]:
    triples = [[f"Aarhus_Airport_{number}", "cityServed", '"Aarhus, Denmark"'], ["Aarhus", "leaderName", "Jacob"]]
    return {"category": domain, "triples": triples, "lexs": list(lexs)}


def triples(root: Path, domains: Sequence[str] = webnlg.DOMAINS, extra: Sequence[dict[str, Any]] = ()) -> Path:
    for split in ("train", "test"):
        entries = [entry(domain, number) for domain in domains for number in range(2)]
        text = "".join(json.dumps(one) + "\n" for one in [*entries, *(extra if split == "test" else ())])
        (root / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return root


# ---- e2e -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "tokenised"),
    [
        ("It's £20-25, isn't it?", "It 's £ 20 - 25 , isn 't it ?"),
        ("family-friendly; Café Sicilia.", "family - friendly ; Café Sicilia ."),
        ("less than £20 (5 out of 5)", "less than £ 20 ( 5 out of 5 )"),
    ],
)
def test_original_and_tokenised_texts_are_written_alike(original: str, tokenised: str) -> None:
    assert spaced(original) == spaced(tokenised)


def test_an_input_is_asked_once_with_all_its_references(tmp_path: Path) -> None:
    cfg = task_config("e2e", path=str(restaurants(tmp_path)), clients_per_language=2)
    data = prepare(cfg, 1, tmp_path / "out")
    assert [(c.id, c.n_train, c.n_test) for c in data.clients] == [
        ("seen/Cotto/Cotto", 6, 2),
        ("seen/Zizzi/Zizzi", 6, 2),
    ]
    asked, _ = data.texts("seen/Cotto/Cotto", "test")
    assert asked[0] == "name : Aromi | priceRange : £ 20 - 25"
    assert data.several
    assert (data.pairs("seen/Cotto/Cotto", "test") or [""])[0] == "Aromi is £ 20 - 25 ."
    learned, _ = data.texts("seen/Cotto/Cotto", "train")
    assert learned[0] == "name : Aromi | food : French | near : Café 0"


def test_blocks_of_names_have_about_equal_weight_and_none_is_empty() -> None:
    assert e2e.cut("dcba", {"a": 5, "b": 0, "c": 2, "d": 3}, 2) == [["a"], ["b", "c", "d"]]
    with pytest.raises(ConfigError, match=r"'task\.clients_per_language' is 3: .* number 2 gets no restaurant"):
        e2e.cut("ab", {"a": 1, "b": 1}, 3)


@needs("e2e")
def test_the_names_that_the_paper_shows_lie_in_its_clients_in_this_order() -> None:
    source = e2e.load(task_config("e2e", path=str(DATA / "e2e")), 42)
    shown = (
        "Blue Spice",
        "The Cricketers",
        "The Mill",
        "The Phoenix",
        "The Punter",
        "The Vaults",
        "The Waterman",
        "Wildwood",
    )
    assert len(source.natural_clients) == len(shown)
    for client, name in zip(source.natural_clients, shown, strict=True):
        assert any(example.text.startswith(f"name : {name} |") for example in client.test), client.id
    assert sum(len(client.train) for client in source.natural_clients) == 42_061
    assert sum(len(client.test) for client in source.natural_clients) == 630
    assert sum(1 + len(e.others) for client in source.natural_clients for e in client.test) == 4_693


# ---- webnlg ----------------------------------------------------------------------------------------------------------


def test_domains_become_eight_clients_and_triples_become_words(tmp_path: Path) -> None:
    other = entry("Artist", 9)
    source = webnlg.load(task_config("webnlg", path=str(triples(tmp_path, extra=[other]))), 1)
    assert [client.name for client in source.natural_clients] == list(webnlg.CLIENTS)
    both = source.natural_clients[2]
    assert {source.labels[e.label] for e in both.test} == {"Building", "City"}
    assert (len(both.train), len(both.test)) == (8, 4)
    assert both.test[0].text == "Aarhus Airport 0 : city Served : Aarhus, Denmark | Aarhus : leader Name : Jacob"
    assert (both.test[0].pair, both.test[0].others) == ("One.", ("Two.",))
    assert source.notes["sets_of_other_categories"] == 1


def test_the_challenges_own_files_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    triples(tmp_path / "lines", ["Airport"])
    for split in ("train", "test"):
        folder = tmp_path / "xml" / split / "1triples"
        folder.mkdir(parents=True)
        written = "".join(
            f'<entry category="{domain}" eid="Id{i}" size="2"><originaltripleset><otriple>x | y | z</otriple>'
            f"</originaltripleset><modifiedtripleset><mtriple>Aarhus_Airport_{i} | cityServed | "
            '"Aarhus, Denmark"</mtriple><mtriple>Aarhus | leaderName | Jacob</mtriple></modifiedtripleset>'
            '<lex comment="good" lid="Id1">One.</lex><lex comment="good" lid="Id2">Two.</lex></entry>'
            for domain in webnlg.DOMAINS
            for i in range(2)
        )
        (folder / "all.xml").write_text(f"<benchmark><entries>{written}</entries></benchmark>", encoding="utf-8")
    triples(tmp_path / "lines")
    sources = [webnlg.load(task_config("webnlg", path=str(tmp_path / name)), 3) for name in ("lines", "xml")]
    assert sources[0].natural_clients == sources[1].natural_clients


@needs("webnlg")
def test_the_real_files_hold_what_the_paper_counts() -> None:
    source = webnlg.load(task_config("webnlg", path=str(DATA / "webnlg")), 42)
    assert sum(len(client.train) for client in source.natural_clients) == 18_102
    assert sum(len(client.test) for client in source.natural_clients) == 971


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domains", "words_of_it"),
    [
        (webnlg.CLIENTS[:-1], "'task.domains' leaves out WrittenWork; join them to a client with"),
        ((*webnlg.CLIENTS, "City"), "'task.domains' has 'City' 2 times"),
        ((*webnlg.CLIENTS, "Airprot"), "'task.domains' has 'Airprot', no domain of webnlg; .*did you mean 'Airport'"),
    ],
)
def test_a_map_that_leaves_a_domain_out_is_refused(domains: tuple[str, ...], words_of_it: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words_of_it):
        webnlg.load(task_config("webnlg", path=str(tmp_path), domains=domains), 1)


def test_rows_without_a_reference_are_refused_with_their_place(tmp_path: Path) -> None:
    restaurants(tmp_path)
    table(tmp_path / "testset_w_refs.csv", [("name[Aromi], food[French]", "Fine."), ("name[Zizzi], food[French]", " ")])
    with pytest.raises(DataError, match=r"testset_w_refs\.csv, line 3: no reference \('ref'\)"):
        e2e.load(task_config("e2e", path=str(tmp_path), clients_per_language=2), 1)
    triples(tmp_path, extra=[entry("City", 1, [" "])])
    with pytest.raises(DataError, match=r"test\.jsonl, line 21: no reference \('lexs'\)"):
        webnlg.load(task_config("webnlg", path=str(tmp_path)), 1)


def test_other_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"task\.path: no folder .*WebNLG challenge 2017"):
        webnlg.load(task_config("webnlg", path=str(tmp_path / "none")), 1)
    with pytest.raises(DataError, match=r"has neither challenge2017_train\.jsonl nor XML files below train/"):
        webnlg.load(task_config("webnlg", path=str(tmp_path)), 1)
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    with pytest.raises(DataError, match=r"data of task=e2e are not on this machine: set task\.path"):
        e2e.load(task_config("e2e"), 1)
    restaurants(tmp_path)
    with pytest.raises(ConfigError, match=r"'task\.clients_per_language' is 8, and there are 4 restaurants"):
        e2e.load(task_config("e2e", path=str(tmp_path)), 1)
    table(tmp_path / "trainset_tokenised.csv", [("food[French]", "Fine.")])
    with pytest.raises(DataError, match=r"line 2: 'mr' has no attribute name\[\.\.\.\]"):
        e2e.load(task_config("e2e", path=str(tmp_path), clients_per_language=2), 1)


# ---- measures --------------------------------------------------------------------------------------------------------

ANSWERS = ["The cat sat on the mat", "a dog"]
REFERENCES = [["the cat sat on a mat", "the cat is on the mat"], ["a dog barks"]]


def test_each_measure_of_one_sample_is_what_a_hand_counts() -> None:
    found = corpus_measures(ANSWERS, REFERENCES)
    # 8 of 8 words, 6 of 6 pairs, 3 of 4 triples, 1 of 3 fours; 8 words against the nearest 6 + 3.
    assert found["bleu"] == pytest.approx(exp(1 - 9 / 8) * (1 * 1 * 3 / 4 * 1 / 3) ** 0.25)
    assert found["ter"] == pytest.approx((1 + 1) / (6 + 3))
    assert min(found["nist"], found["cider"]) > 0
    by_place = [[own[0] for own in REFERENCES], [REFERENCES[0][1], None]]
    second = sacrebleu.corpus_bleu([answer.lower() for answer in ANSWERS], by_place)
    assert 100 * found["bleu"] == pytest.approx(second.score)


def test_perfect_answers_score_best_and_empty_ones_least() -> None:
    right = [own[0] for own in REFERENCES]
    best, least = corpus_measures(right, REFERENCES), corpus_measures(["", ""], REFERENCES)
    assert (best["ter"], least["ter"]) == (0, 1)
    assert (least["bleu"], least["nist"], least["cider"]) == (0, 0, 0)
    assert all(best[name] > corpus_measures(ANSWERS, REFERENCES)[name] for name in ("nist", "cider"))
    assert best.keys() == MEASURES.keys()


def test_case_and_blanks_do_not_count() -> None:
    assert corpus_measures(["It's £20."], [["it ' s £ 20 ."]])["ter"] == 0
    assert words("  A  b.c ") == "a b . c"


def test_an_answer_is_measured_by_its_best_reference() -> None:
    found = measures("the cat is on the mat", REFERENCES[0])
    assert (found["rougeL"], found["exact_match"]) == (1, 1)
    assert found["meteor"] > measures("the cat is on the mat", REFERENCES[0][:1])["meteor"]


# ---- whole -----------------------------------------------------------------------------------------------------------


def test_plan_gives_the_trained_numbers_of_table_13_without_model_and_data() -> None:
    sizes = make_plan(compose(["pf2lora_e2e"], []), 24).sizes
    numbers = {
        name: round(sizes[name].adapter / 1e6, 2) for name in ("homlora", "perfedavg_lora", "hetlora", "pf2lora")
    }
    assert numbers == {"homlora": 0.39, "perfedavg_lora": 0.39, "hetlora": 0.81, "pf2lora": 0.59}


def test_a_run_scores_answers_as_corpora_and_shows_some_with_all_their_references(tmp_path: Path) -> None:
    restaurants(tmp_path)
    made = compose(
        [],
        [
            *TALK, f"storage={tmp_path / 'runs'}", "task=e2e", f"task.path={tmp_path}", "task.clients_per_language=2",
            "task.max_length=64", "methods=[base,homlora]", "budgets=[1]", "base.name=none", "homlora.rank=1",
            "strategy.rounds=1", "strategy.cohort=all", "personalise.pools=[seen]", "personalise.save_predictions=true",
        ],
    )  # fmt: skip
    run = run_tiny(made, "answers")
    rows = run.metrics()
    scored = rows[(rows["stage"] == "personalise") & (rows["method"] == "homlora")]
    assert set(MEASURES) <= set(scored["metric"])
    assert set(scored.loc[scored["metric"] == "ter", "client"]) == {"seen/Cotto/Cotto", "seen/Zizzi/Zizzi"}
    page = report_of(run)
    assert isinstance(page, Path)
    text = (page.parent / "samples.md").read_text(encoding="utf-8")
    assert "**1.** name : Aromi \\| priceRange : £ 20 - 25" in text
    for words_of_it in ("- Reference: Aromi is £ 20 - 25 .", "- Reference: Aromi is £ 20 - 26 .", "- **HOMLoRA**: "):
        assert words_of_it in text
    measured = (page.parent / "metrics_seen.md").read_text(encoding="utf-8")
    assert "NIST and CIDEr as they are" in measured
