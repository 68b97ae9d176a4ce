"""One reader of tables: the same rows from every kind of file, cells as they are meant, places that can be found."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from fedtailor.core.errors import DataError
from fedtailor.tasks.rows import Row, is_table, read_rows

FRAME = pd.DataFrame({"client": [1, 2], "text": ["Tɔ́ŋgbɛ̂; a, b", 'two\nlines "quoted"']})
WANTED = FRAME.to_dict("records")


def values(path: Path) -> list[dict[str, object]]:
    return [dict(row.values) for row in read_rows(path)]


@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, zipped: bool) -> None:
    contents = {
        "a.jsonl": FRAME.to_json(orient="records", lines=True).encode(),
        "b.ndjson": FRAME.to_json(orient="records", lines=True).encode("utf-16"),
        "c.json": FRAME.to_json(orient="records", indent=2).encode("utf-8-sig"),
        "d.parquet": FRAME.to_parquet(index=False),
        "e.csv": FRAME.to_csv(index=False).encode(),
        "f.csv": FRAME.to_csv(index=False, sep=";").encode("utf-8-sig"),
        "g.tsv": FRAME.to_csv(index=False, sep="\t").encode("utf-16"),
        "h.csv": FRAME.to_csv(index=False, sep="|").encode(),
        "i.jsonl": "\n\n".join(json.dumps(row, indent=2) for row in WANTED).encode(),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}{'.gz' * zipped}"
        path.write_bytes(gzip.compress(content) if zipped else content)
        found = [{**row, "client": int(str(row["client"]))} for row in values(path)]
        assert found == WANTED, name


def test_what_pandas_makes_of_missing_values_and_of_the_numbers_beside_them(tmp_path: Path) -> None:
    frame = pd.DataFrame({"client": [3, None], "score": [0.5, float("nan")], "text": ["a", None]})
    frame.to_parquet(tmp_path / "a.parquet", index=False)
    frame.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    (tmp_path / "c.json").write_text('[{"client": 3.0, "score": 0.5, "text": "a"}, {"client": NaN, "score": NaN}]')
    for name in ("a.parquet", "b.jsonl", "c.json"):
        first, second = values(tmp_path / name)
        assert (first, type(first["client"])) == ({"client": 3, "score": 0.5, "text": "a"}, int)
        assert (second["client"], second["score"], second.get("text")) == (None, None, None)


def test_cells_of_separated_files_are_texts_and_names_of_columns_have_no_blanks_around_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n\n text ; n ;;\nNA;1.0;;\n\n;;;\n", encoding="utf-8")
    assert list(read_rows(path)) == [
        Row(f"{path}, line 4", {"text": "NA", "n": "1.0", "": ""}),
        Row(f"{path}, line 6", {"text": "", "n": "", "": ""}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text,label\nHello, world,sports\n", r"line 2: 3 columns, expected 2; .* holds ',' or a line break"),
        ("a.csv", b"text,text\na,b\n", "line 1: the column 'text' occurs twice"),
        ("a.csv", b'text\n"a"b\n', 'line 2: damaged or truncated CSV: .*written ""'),
        ("a.csv", b"text,label\na,b\nc,d,e\n", "line 3: 3 columns, expected 2"),
        ("a.csv", b"text\n", "holds no row"),
        ("a.csv", b"  \n \n", "holds no row"),
        ("a.jsonl", b"\n  \n", "holds no row"),
        ("a.csv", "text\nmédecin\n".encode("latin-1"), r"line 2: not UTF-8: byte 0xe9 at position 6 \(from 0\)"),
        ("a.csv", codecs.BOM_UTF8 + b"text\n\xe9\n", r"line 2: not UTF-8: byte 0xe9 at position 8 "),
        ("a.csv", "text\na\n".encode("utf-16-le"), "line 1: a zero byte at position 1 .*UTF-16 is read where"),
        ("a.jsonl", codecs.BOM_UTF16_LE + b"{", "line 1: not UTF-16: .*truncated data"),
        ("a.jsonl", b'{\n "a": 1\n}\n\n{\n "a": ]\n}\n', "line 5: damaged JSON: .*line 6 column 7"),
        ("a.json", b'[{"a": 1}] [', r"damaged JSON: '\[' follows the end of its value"),
        ("a.jsonl", b'{"a": 1}\n7\n', "line 2: a row must be an object with named fields, found int"),
        ("a.json", b'[{"a": 1}, "b"]', "row 1: a row must be an object with named fields, found str"),
        ("a.parquet.gz", gzip.compress(b"PAR1 not really", mtime=0), "cannot be read as Parquet"),
        ("a.docx", b"a", r"not one of \.jsonl, .*\.parquet \(each also with \.gz\)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(str(path))
    assert is_table(path) == (name != "a.docx")
