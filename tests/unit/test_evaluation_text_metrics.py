"""Measures of answers: those of the libraries on English, and worth something in every script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer

from fedtailor.evaluation.text_metrics import (
    Mean,
    add,
    ascii_words,
    exact_match,
    init,
    merge,
    meteor,
    result,
    rouge,
    unicode_words,
)

ANSWER = "It is a guide to action which ensures that the military always obeys the commands of the party"
REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"
SAME = {
    "ar": "السَّلامُ عليكم يا صديقي",
    "ru": "Привет, мой дорогой друг!",
    "te": "తెలుగు భాష చాలా అందమైనది",
    "zh": "今天天气很好。",
}


def test_rouge_is_rouge_score_on_english() -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).score(REFERENCE, ANSWER)
    for tokenizer in ("unicode", "ascii"):
        assert rouge(ANSWER, REFERENCE, tokenizer) == {name: score.fmeasure for name, score in theirs.items()}
    # Of 18 and 16 words 12 are common, of 17 and 15 pairs 8; the longest common subsequence has 11.
    golden = {"rouge1": 24 / 34, "rouge2": 16 / 32, "rougeL": 22 / 34}
    assert rouge(ANSWER, REFERENCE) == pytest.approx(golden)


def test_meteor_is_nltks_without_synonyms() -> None:
    # The example of nltk's documentation, .6944 there with WordNet too: no synonym matches in it.
    assert meteor(ANSWER, REFERENCE) == pytest.approx(0.6944, abs=5e-5)
    # Two of three words match, one by its stem: P = 2/3, R = 2/4, F = PR/(.9P + .1R) = 1/1.95, one chunk.
    assert meteor("the cats slept", "the cat sat down") == pytest.approx((1 / 1.95) * (1 - 0.5 / 2**3))


def test_synonyms_never_count_whatever_a_machine_has_installed() -> None:
    class WordNet:
        def synsets(self, word: str) -> list[object]:
            lemma = type("Lemma", (), {"name": lambda self: "auto"})()
            return [type("Synset", (), {"lemmas": lambda self: [lemma]})()]

    words = (["red", "auto"], ["red", "car"])
    assert single_meteor_score(*words, wordnet=WordNet()) > meteor("red car", "red auto")
    assert meteor("red car", "red auto") == pytest.approx(0.5 * (1 - 0.5))


@pytest.mark.parametrize("language", SAME)
def test_a_perfect_answer_is_perfect_in_every_script(language: str) -> None:
    text, words = SAME[language], len(unicode_words(SAME[language]))
    assert rouge(text, text) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert meteor(text, text) == pytest.approx(1 - 0.5 / words**3)


@pytest.mark.parametrize("language", SAME)
def test_the_references_tokenizer_scores_other_scripts_zero(language: str) -> None:
    assert rouge(SAME[language], SAME[language], "ascii") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_arabic_by_hand() -> None:
    # ذهب الولد إلى المدرسة | الولد ذهب إلى السوق: three of four words, no pair, two in order.
    found = rouge("الولد ذهب إلى السوق", "ذهب الولد إلى المدرسة")
    assert found == pytest.approx({"rouge1": 3 / 4, "rouge2": 0.0, "rougeL": 2 / 4})
    # P = R = F = 3/4 and three chunks of one word: half is taken off.
    assert meteor("الولد ذهب إلى السوق", "ذهب الولد إلى المدرسة") == pytest.approx(3 / 4 * (1 - 0.5))


def test_chinese_by_hand() -> None:
    # 我 爱 北 京 | 我 爱 南 京: three of four letters, one of three pairs.
    found = rouge("我爱北京。", "我爱南京")
    assert found == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4})
    assert meteor("我爱北京。", "我爱南京") == pytest.approx(3 / 4 * (1 - 0.5 * (2 / 3) ** 3))


def test_telugu_by_hand() -> None:
    # Three words each, two in common and side by side.
    found = rouge("నేను ఇంటికి వెళ్ళాను", "నేను ఇంటికి వచ్చాను")
    assert found == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})
    assert meteor("నేను ఇంటికి వెళ్ళాను", "నేను ఇంటికి వచ్చాను") == pytest.approx(2 / 3 * (1 - 0.5 / 2**3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("తెలుగు భాష!", ["తెలుగు", "భాష"]),
        ("हिन्दी क्षत्रिय", ["हिन्दी", "क्षत्रिय"]),
        ("አማርኛ፡ቋንቋ ነው።", ["አማርኛ", "ቋንቋ", "ነው"]),
        ("السَّلامُ عليكم،", ["السَّلامُ", "عليكم"]),
        ("한국어, 좋아요", ["한국어", "좋아요"]),
        ("བོད་སྐད", ["བོད", "སྐད"]),
        ("東京タワー333", ["東", "京", "タ", "ワ", "ー", "333"]),
        ("ไทยดี", ["ไ", "ท", "ย", "ดี"]),
        ("ភាសា", ["ភា", "សា"]),
        ("x¹ ﬁve STRASSE Straße", ["x1", "five", "strasse", "strasse"]),
        ("می‌خواهم", ["میخواهم"]),
        ("cafe\u0301", ["café"]),
        ("👍 … !", []),
    ],
)
def test_words_of_all_scripts(text: str, words: list[str]) -> None:
    assert unicode_words(text) == words


@given(st.text(st.characters(max_codepoint=127)))
def test_of_ascii_text_both_tokenizers_make_the_same_words(text: str) -> None:
    assert unicode_words(text) == ascii_words(text)


@given(st.text())
def test_words_are_never_empty_nor_have_spaces(text: str) -> None:
    assert all(word and not any(c.isspace() for c in word) for word in unicode_words(text))


@given(st.text(), st.text())
def test_every_measure_lies_in_0_to_1(answer: str, reference: str) -> None:
    values = [*rouge(answer, reference).values(), meteor(answer, reference), exact_match(answer, reference)]
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize("text", SAME.values())
def test_the_stemmer_touches_latin_letters_only(text: str) -> None:
    assert all(PorterStemmer().stem(word) == word for word in unicode_words(text))


def test_an_empty_answer_is_worth_nothing() -> None:
    for answer in ("", "  \n", "?!"):
        assert set(rouge(answer, "three little words").values()) == {0.0}
        assert meteor(answer, "three little words") == exact_match(answer, "three little words") == 0.0


def test_exact_match_looks_past_spaces_and_forms_of_letters_only() -> None:
    assert exact_match(" a\n\tb ", "a b") == exact_match("ﬁx Ａ", "fix A") == exact_match("cafe\u0301", "café") == 1.0
    assert exact_match("A", "a") == exact_match("a b.", "a b") == exact_match("ab", "a b") == 0.0


def test_tallies_of_parts_are_the_tally_of_the_whole() -> None:
    samples = [("en", 0.25), ("te", 1.0), ("en", 0.75), ("en", 0.5), ("te", 0.0)]
    whole, left, right = init(), init(), init()
    for i, (group, value) in enumerate(samples):
        whole = add(whole, group, {"rougeL": value, "meteor": value / 2})
        if i < 3:
            left = add(left, group, {"rougeL": value, "meteor": value / 2})
        else:
            right = add(right, group, {"rougeL": value, "meteor": value / 2})
    assert merge(left, right) == whole == merge(init(), whole) == merge(whole, init())
    assert whole["en"]["rougeL"] == Mean(1.5, 3)
    assert result(whole) == {"en": {"rougeL": 0.5, "meteor": 0.25}, "te": {"rougeL": 0.5, "meteor": 0.25}}
