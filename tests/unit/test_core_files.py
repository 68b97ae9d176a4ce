"""One rule from any text to a file name."""

from __future__ import annotations

import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from fedtailor.core.files import LONGEST_NAME, file_name
from fedtailor.storage.files import safe_path
from fedtailor.storage.round_store import adapter_files

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=400)
ALIKE = st.text(st.sampled_from("aAbB.%/\\~\n\0 é2eE\u0301"), max_size=60)
"""Names that differ little, or could be taken for another one's file name."""


def as_a_file_system_sees_it(name: str) -> str:
    return unicodedata.normalize("NFD", name).casefold()


@given(st.one_of(NAMES, ALIKE), st.one_of(NAMES, ALIKE))
@example("Ana", "ana")
@example("Jos\u00e9", "Jose\u0301")
@example(".", "%2e")
@example("", "%")
@example("a" * 300, "a" * 301)
@example("a" * 300, file_name("a" * 300))
def test_two_names_never_meet_even_where_case_and_unicode_forms_do_not_count(one: str, other: str) -> None:
    met = as_a_file_system_sees_it(file_name(one)) == as_a_file_system_sees_it(file_name(other))
    assert met == (one == other)


@given(st.one_of(NAMES, ALIKE))
@example("..")
@example("x" * 300)
def test_every_name_gives_a_short_and_harmless_path(name: str) -> None:
    found = file_name(name)
    assert safe_path(found) == found
    assert "/" not in found
    assert found.isascii()
    assert 0 < len(found) <= LONGEST_NAME


def test_ordinary_names_keep_the_file_names_that_old_runs_have() -> None:
    for client in ("seen/hau/00", "unseen/amh_ethi/7", "seen/closed_qa/user-7.b"):
        assert adapter_files(f"r8/{client}") == f"adapters/r8/{client}/"
