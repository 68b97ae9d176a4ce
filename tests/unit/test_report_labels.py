"""Labels in any script: what figures call languages and groups, fonts that have the letters, and no boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fedtailor.report import names, style
from fedtailor.report.style import Drawing, save, styled
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES
from fedtailor.tasks.xnli import XNLI_LANGUAGES

UNKNOWN = chr(0x10FFFD)


@pytest.mark.parametrize("code", [*MASAKHANEWS_LANGUAGES, *XNLI_LANGUAGES])
def test_every_language_of_the_paper_has_an_english_and_an_own_name(code: str) -> None:
    assert names.language_name(code) not in ("", code)
    assert names.own_name(code)
    assert style.language_label(code).startswith(f"{code} · ")


def test_right_to_left_languages_are_known() -> None:
    assert [names.text_direction(code) for code in ("ar", "ur", "amh", "eng", "q??")] == ["rtl", "rtl", *["ltr"] * 3]


def test_figures_name_known_languages_in_english_whatever_fonts_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_font_for", lambda letters: None)
    assert style.language_label("amh") == "amh · Amharic"
    assert style.language_label("ልደታ") == "???"


def test_letters_without_a_font_are_replaced() -> None:
    assert not style.can_draw(UNKNOWN)
    assert style.drawable(f"a{UNKNOWN}b") == "a?b"
    assert style.class_label(UNKNOWN, 3) == "class 3"
    assert style.class_label("здоровье", 3) == "здоровье"


def test_no_label_that_is_said_to_be_drawable_draws_boxes(tmp_path: Path) -> None:
    shown = [style.language_label(code) for code in (*MASAKHANEWS_LANGUAGES, *XNLI_LANGUAGES)]
    shown += [style.class_label(text, k) for k, text in enumerate(("ስፖርት", "صحة", "विज्ञान", "健康", "สุขภาพ"))]
    with styled(shown), warnings.catch_warnings():
        # matplotlib warns of every glyph that no font has.
        warnings.simplefilter("error")
        figure = Figure()
        figure.suptitle(shown[0], weight="bold")
        for k, text in enumerate(shown):
            figure.text(0.1, k / len(shown), text)
        save(Drawing("labels", "", "", figure), tmp_path)


def test_latin_cyrillic_greek_and_arabic_need_no_further_font() -> None:
    texts = ["Èdè Yorùbá", "русский", "Ελληνικά", "Tiếng Việt", "العربية"]
    assert style.families(texts) == [style.MAIN]
