"""Labels in any script: languages by their own names, fonts that have the letters, and no boxes."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

import pytest
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure

from fedtailor.report import fonts, names
from fedtailor.report import style as labels
from fedtailor.report.style import Drawing, save, styled
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES, XNLI_LANGUAGES

UNKNOWN = chr(0x10FFFD)


@pytest.mark.parametrize("code", [*MASAKHANEWS_LANGUAGES, *XNLI_LANGUAGES])
def test_every_language_of_the_paper_has_an_english_and_an_own_name(code: str) -> None:
    assert names.language_name(code) not in ("", code)
    assert names.own_name(code)
    assert labels.language_label(code).startswith(f"{code} · ")


def test_right_to_left_languages_are_known() -> None:
    assert [names.text_direction(code) for code in ("ar", "ur", "amh", "eng", "q??")] == ["rtl", "rtl", *["ltr"] * 3]


def test_a_script_without_a_font_falls_back_to_the_english_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "can_draw", lambda text: text.isascii())
    assert labels.language_label("amh") == "amh · Amharic"
    monkeypatch.setattr(labels, "can_draw", lambda text: True)
    monkeypatch.setattr(labels, "drawable", lambda text: text)
    assert labels.language_label("amh") == "amh · አማርኛ"


def test_letters_without_a_font_are_replaced() -> None:
    assert not fonts.can_draw(UNKNOWN)
    assert fonts.drawable(f"a{UNKNOWN}b") == "a?b"
    assert labels.class_label(UNKNOWN, 3) == "class 3"
    assert labels.class_label("здоровье", 3) == "здоровье"


def test_no_label_that_is_said_to_be_drawable_draws_boxes(tmp_path: Path) -> None:
    shown = [labels.language_label(code) for code in (*MASAKHANEWS_LANGUAGES, *XNLI_LANGUAGES)]
    shown += [labels.class_label(text, k) for k, text in enumerate(("ስፖርት", "صحة", "विज्ञान", "健康", "สุขภาพ"))]
    with styled(shown), warnings.catch_warnings():
        # matplotlib warns of every glyph that no font has.
        warnings.simplefilter("error")
        figure = Figure()
        figure.suptitle(shown[0], weight="bold")
        for k, text in enumerate(shown):
            figure.text(0.1, k / len(shown), text)
        save(Drawing("labels", "", "", figure), tmp_path)


def test_a_page_brings_the_letters_that_readers_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    main = fonts.font_manager.findfont(fonts.MAIN)
    monkeypatch.setattr(fonts, "_missing", lambda text: frozenset(text))
    monkeypatch.setattr(fonts, "_font_for", lambda letters: main)
    ((_, data),) = fonts.embedded(["اردو"])
    assert set("اردو") == {chr(code) for code in TTFont(io.BytesIO(base64.b64decode(data))).getBestCmap()}
    assert fonts.embedded(["اردو"]) == fonts.embedded(["اردو"])


def test_latin_cyrillic_greek_and_arabic_need_no_further_font() -> None:
    texts = ["Èdè Yorùbá", "русский", "Ελληνικά", "Tiếng Việt", "العربية"]
    assert fonts.families(texts) == [fonts.MAIN]
    assert fonts.embedded(texts) == []
