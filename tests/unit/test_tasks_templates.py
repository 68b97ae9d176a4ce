"""Prompt templates: the papers' text, one BOS, the closing token, and what becomes of samples that are too long."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from instruction_cases import CASES, ODD, Case, byte_tokenizer, dolly, gpt2_tokenizer, piece_tokenizer
from transformers import ByT5Tokenizer

from fedtailor.core.errors import ConfigError, DataError, ModelError
from fedtailor.tasks.encoding import Encoded, Encoder, Sample
from fedtailor.tasks.prompts import NAMES, Turn, check_name, identity, resolve, template_for

DATA = Path(os.environ.get("FEDTAILOR_DATA", ""))
HAS_DATA = bool(os.environ.get("FEDTAILOR_DATA")) and all((DATA / n).is_dir() for n in ("dolly", "tokenizers"))
WHY = "set FEDTAILOR_DATA to a folder that holds dolly/ and tokenizers/gpt2/ to test with them"
HISTORY = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "You."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
)


@cache
def tokenizer_of(name: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {"bytes": byte_tokenizer, "pieces": piece_tokenizer, "slow": ByT5Tokenizer}
    return (makers | {"gpt2": lambda: gpt2_tokenizer(DATA)})[name]()


def render(
    template: str, tokenizer: Any, instruction: str, history: tuple[Turn, ...] = (), response: str | None = None
) -> tuple[str, str]:
    """The prompt, and what is learned after it."""
    form = template_for(template, tokenizer)
    return form.prompt(instruction, history), "" if response is None else form.lead + response + form.closing


def one(template: str, tokenizer: Any, sample: Sample, max_length: int = 4096, overlong: str = "cut_prompt") -> Encoded:
    (found,) = Encoder(template, tokenizer, max_length, overlong).encode([sample])  # type: ignore[arg-type]
    assert found is not None
    return found


def learned(tokenizer: Any, encoded: Encoded) -> str:
    ids = encoded.ids[encoded.prompt_tokens :].tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


SETTINGS = [("bytes", name) for name in NAMES]
SETTINGS += [(name, form) for name in ("pieces", "slow") for form in ("alpaca", "alpaca_input")] + [("pieces", "chat")]
CLOSING = {"llama3": "<|eot_id|>", "chat": "<|im_end|>"}


def closing_of(name: str, template: str) -> str:
    return CLOSING.get(template, "</s>") if name in ("bytes", "gpt2") else "</s>"


# --- the text ------------------------------------------------------------------------------------------------------


def test_alpaca_is_the_papers_with_a_blank_after_the_instruction_and_no_input_section() -> None:
    prompt, completion = render("alpaca", byte_tokenizer(), "Name a river.", (), "The Nile.")
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a river. \n\n### Response:"
    )
    assert completion == " The Nile.</s>"


def test_alpaca_input_has_a_section_for_what_follows_an_empty_line() -> None:
    prompt, _ = render("alpaca_input", byte_tokenizer(), "Summarise.\n\nOne.\n\nTwo.")
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert prompt.endswith("### Instruction:\nSummarise. \n\n### Input:\nOne.\n\nTwo. \n\n### Response:")
    plain = render("alpaca_input", byte_tokenizer(), "Name a river.")
    assert plain == render("alpaca", byte_tokenizer(), "Name a river.")


def test_llama3_is_the_papers_without_a_newline_after_the_closing_token() -> None:
    prompt, completion = render("llama3", byte_tokenizer(), "Name a river.", (), "The Nile.")
    assert prompt == (
        "<|start_header_id|>user<|end_header_id|>\n\nName a river.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert completion == "The Nile.<|eot_id|>"


def test_chat_is_the_tokenizers_own_template_for_a_prompt() -> None:
    tokenizer = byte_tokenizer()
    asked = [*HISTORY, {"role": "user", "content": "How?"}]
    prompt, completion = render("chat", tokenizer, "How?", HISTORY, "Thus.")
    assert prompt == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert completion == "Thus.<|im_end|>"


def test_a_chat_template_that_knows_the_date_is_given_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|" + tokenizer.chat_template
    assert render("chat", tokenizer, "How?")[0].startswith("26 Jul 2024|<|im_start|>user")


def test_a_chat_template_that_answers_otherwise_than_it_asks_is_trained_and_asked_as_it_answers() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    prompt, completion = render("chat", tokenizer, "How?", (), "Thus.")
    assert prompt.endswith("<|im_start|>assistant\n<think></think>\n")
    assert completion == "Thus.<|im_end|>"


def test_auto_is_the_tokenizers_template_or_alpaca() -> None:
    tokenizer = byte_tokenizer()
    assert resolve("auto", tokenizer) == "chat"
    tokenizer.chat_template = None
    assert resolve("auto", tokenizer) == "alpaca"
    assert resolve("llama3", tokenizer) == "llama3"


@pytest.mark.parametrize(("name", "template"), [s for s in SETTINGS if s != ("pieces", "chat")])
def test_earlier_turns_and_a_system_message_come_first_and_in_order(name: str, template: str) -> None:
    prompt, _ = render(template, tokenizer_of(name), "How?", HISTORY)
    places = [prompt.index(text) for text in ("Be kind.", "Who?", "You.", "Why?", "So.", "How?")]
    assert places == sorted(places)


def test_a_chat_template_that_refuses_a_conversation_says_so() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    with pytest.raises(DataError, match=r"refuses a conversation of system, user, .*: no system"):
        render("chat", tokenizer, "How?", HISTORY)


# --- the user's own template ---------------------------------------------------------------------------------------


def test_a_file_is_a_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Q {a}: {instruction}\nA: {response}\n", encoding="utf-8")
    assert render(str(path), byte_tokenizer(), "{response}?", (), "{instruction}!") == (
        "Q {a}: {response}?\nA:",
        " {instruction}!</s>",
    )
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_text("Q {a}: {instruction}\nA: {response}", encoding="utf-8")
    other.write_text("{instruction} -> {response}", encoding="utf-8")
    assert identity(str(path)) == identity(str(same)) != identity(str(other))
    assert identity("alpaca") == "alpaca"


def test_a_files_own_closing_token_takes_the_place_of_eos(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{instruction}\n{response}<|im_end|>\n", encoding="utf-8")
    assert render(str(path), byte_tokenizer(), "a", (), "b") == ("a\n", "b<|im_end|>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q: {instruction}", r"mine.txt has 0 times the slot \{response\}"),
        ("A: {response}", r"mine.txt has 0 times the slot \{instruction\}"),
        ("{instruction} {response} {response}", r"2 times the slot \{response\}"),
        ("{response} {instruction}", r"slot \{response\} before the slot \{instruction\}"),
    ],
)
def test_a_file_needs_each_slot_once_and_in_order(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        check_name(str(path))


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"'task.template' is 'alpacca', allowed: alpaca, alpaca_input, alpaca_short, llama3"
    ):
        check_name("alpacca")
    for name in (*NAMES, "auto"):
        check_name(name)


def test_a_template_that_the_tokenizer_cannot_write_is_refused() -> None:
    tokenizer = piece_tokenizer()
    with pytest.raises(ModelError, match=r"no special token <\|start_header_id\|>"):
        render("llama3", tokenizer, "a")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template; allowed for it: alpaca"):
        render("chat", tokenizer, "a")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no EOS token"):
        render("alpaca", tokenizer, "a")


# --- the tokens ----------------------------------------------------------------------------------------------------


def check(name: str, template: str, case: Case) -> None:
    tokenizer = tokenizer_of(name)
    encoded = one(template, tokenizer, Sample(*case))
    asked = one(template, tokenizer, Sample(case.instruction))
    assert asked.ids.tolist() == encoded.ids[: encoded.prompt_tokens].tolist()
    assert asked.prompt_tokens == len(asked.ids)
    lead = " " if template in ("alpaca", "alpaca_input") or name == "pieces" else ""
    spoken = lead + case.response
    # A decoder of pieces takes off the blank that such tokenizers put before a text.
    assert learned(tokenizer, encoded) == (spoken[1:] if name == "pieces" else spoken)
    ids = encoded.ids.tolist()
    closing = tokenizer.convert_tokens_to_ids(closing_of(name, template))
    if name == "gpt2" and template.startswith("alpaca"):
        closing = tokenizer.eos_token_id
    assert ids[-1] == closing
    assert ids[encoded.prompt_tokens :].count(closing) == 1
    bos = tokenizer.bos_token_id
    if name in ("bytes", "pieces"):
        assert ids[0] == bos
        assert ids.count(bos) == 1
    else:
        assert bos not in ids[: encoded.prompt_tokens]


@pytest.mark.parametrize(("name", "template"), SETTINGS)
def test_exactly_the_response_and_the_closing_token_are_learned(name: str, template: str) -> None:
    odd = [case for key, case in ODD.items() if "special" not in key]
    for case in [*CASES, *odd]:
        check(name, template, case)


@pytest.mark.skipif(not HAS_DATA, reason=WHY)
@pytest.mark.parametrize("template", NAMES)
def test_exactly_the_response_and_the_closing_token_of_200_real_samples_are_learned(template: str) -> None:
    cases = dolly(DATA)
    assert len(cases) == 200
    for case in cases:
        check("gpt2", template, case)


@pytest.mark.parametrize(("name", "template"), [s for s in SETTINGS if s[0] != "slow"])
def test_the_mask_is_that_of_the_character_offsets_where_the_joint_text_has_the_same_tokens(
    name: str, template: str
) -> None:
    tokenizer = tokenizer_of(name)
    for case in CASES:
        prompt, completion = render(template, tokenizer, case.instruction, (), case.response)
        joint = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        encoded = one(template, tokenizer, Sample(*case))
        added = len(encoded.ids) - len(joint["input_ids"])
        assert encoded.ids[added:].tolist() == joint["input_ids"]
        given = sum(end <= len(prompt) for _, end in joint["offset_mapping"])
        assert encoded.prompt_tokens == given + added


def test_an_empty_response_is_the_closing_token_alone() -> None:
    tokenizer = byte_tokenizer()
    encoded = one("alpaca", tokenizer, Sample("Say nothing.", ""))
    assert encoded.ids[encoded.prompt_tokens :].tolist() == [tokenizer.eos_token_id]


def test_a_tokenizer_whose_bos_is_only_its_eos_gets_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with_bos = one("alpaca", tokenizer, Sample("a", "b")).ids.tolist()
    tokenizer.bos_token = "</s>"
    assert one("alpaca", tokenizer, Sample("a", "b")).ids.tolist() == with_bos[1:]


# --- too long ------------------------------------------------------------------------------------------------------

LONG = Sample(" ".join(f"word{i}" for i in range(300)), "The answer is here.")


@pytest.mark.parametrize(("name", "template"), SETTINGS)
def test_the_instructions_end_is_cut_and_the_template_stays(name: str, template: str) -> None:
    tokenizer = tokenizer_of(name)
    bare = one(template, tokenizer, Sample("", LONG.response))
    for limit in (len(bare.ids) + 40, len(bare.ids) + 41):
        encoded = one(template, tokenizer, LONG, limit)
        assert encoded.cut == ("prompt",)
        assert limit - 6 <= len(encoded.ids) <= limit
        assert encoded.ids[encoded.prompt_tokens :].tolist() == bare.ids[bare.prompt_tokens :].tolist()
        head = tokenizer.decode(encoded.ids[: encoded.prompt_tokens], skip_special_tokens=True)
        empty = tokenizer.decode(bare.ids[: bare.prompt_tokens], skip_special_tokens=True)
        assert "word0 word1" in head
        assert "word299" not in head
        assert head.endswith(empty[-5:])


def test_a_sample_that_fits_exactly_is_not_cut() -> None:
    whole = one("alpaca", byte_tokenizer(), LONG)
    assert whole.cut == ()
    assert one("alpaca", byte_tokenizer(), LONG, len(whole.ids)).ids.tolist() == whole.ids.tolist()
    assert one("alpaca", byte_tokenizer(), LONG, len(whole.ids) - 1).cut == ("prompt",)
    assert Encoder("alpaca", byte_tokenizer(), len(whole.ids) - 1, "drop").encode([LONG]) == [None]


def test_a_response_that_alone_is_too_long_loses_its_end_and_the_closing_token() -> None:
    tokenizer = byte_tokenizer()
    short = Sample("Count.", LONG.instruction)
    encoded = one("alpaca", tokenizer, short, 200)
    assert encoded.cut == ("response",)
    assert len(encoded.ids) == 200
    assert tokenizer.eos_token_id not in encoded.ids
    assert LONG.instruction.startswith(learned(tokenizer, encoded)[1:])
    both = one("alpaca", tokenizer, Sample(LONG.instruction, LONG.instruction), 200)
    assert both.cut == ("prompt", "response")
    assert len(both.ids) == 200
    room = 200 - one("alpaca", tokenizer, Sample("")).prompt_tokens
    assert abs((200 - both.prompt_tokens) - room / 2) < 8  # neither takes more than half from the other


def test_the_oldest_turns_are_dropped_before_the_instruction_is_cut() -> None:
    tokenizer = byte_tokenizer()
    sample = Sample("How is it done?", "Thus.", HISTORY)
    whole = one("chat", tokenizer, sample)
    cut = one("chat", tokenizer, sample, len(whole.ids) - 1)
    assert cut.cut == ("prompt",)
    kept = (HISTORY[0], *HISTORY[3:])
    assert cut.ids.tolist() == one("chat", tokenizer, sample._replace(history=kept)).ids.tolist()
    least = one("chat", tokenizer, sample._replace(history=()))
    assert one("chat", tokenizer, sample, len(least.ids)).ids.tolist() == least.ids.tolist()


def test_a_prompt_to_be_answered_may_fill_the_length() -> None:
    encoded = one("alpaca", byte_tokenizer(), Sample(LONG.instruction), 200)
    assert encoded.cut == ("prompt",)
    assert 195 <= len(encoded.ids) == encoded.prompt_tokens <= 200


def test_a_length_without_room_for_the_template_is_an_error_that_names_the_least() -> None:
    tokenizer = byte_tokenizer()
    least = len(one("alpaca", tokenizer, Sample("", "")).ids) + 2
    message = rf"'task.max_length' is {least - 1}, .* at least {least}"
    with pytest.raises(ModelError, match=message):
        Encoder("alpaca", tokenizer, least - 1)
    assert Encoder("alpaca", tokenizer, least).encode([Sample("a", "b")]) != [None]
