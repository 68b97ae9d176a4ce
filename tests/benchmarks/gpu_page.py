"""The page of `make bench-gpu`, made anew from the JSON lines whenever there are more of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_run import Part
from page import number, table

Line = Mapping[str, Any]


def write_page(results: Path, parts: Sequence[Part]) -> None:
    """Writes ``gpu.md`` beside the lines, as a whole."""
    lines = [json.loads(text) for text in results.read_text("utf-8").splitlines() if text.endswith("}")]
    page = results.with_suffix(".md")
    draft = page.with_suffix(".tmp")
    draft.write_text(render(lines, parts), encoding="utf-8")
    draft.replace(page)


def render(lines: Sequence[Line], parts: Sequence[Part]) -> str:
    """The page: machine, what each part answered and how it ended, then every part's tables.

    Args:
        lines: the head first.
        parts: in the order of the page.
    """
    head, own = lines[0], {part.name: [line for line in lines[1:] if line["part"] == part.name] for part in parts}
    shown = [part for part in parts if own[part.name]]
    blocks = ["# A GPU hour in short", _machine(head)]
    if head["quick"]:
        blocks.append("**Quick: the shapes are small, and the figures mean nothing.**")
    if shown:
        blocks.append(table(["part", "ended", "s", "answer"], [_summary(part, own[part.name]) for part in shown]))
    for part in shown:
        blocks += _part(part, own[part.name])
    return "\n\n".join(blocks) + "\n"


def _machine(head: Line) -> str:
    cards = [
        f"- {card['name']}, {card['memory'] / 1e9:.0f} GB, {card['processors']} multiprocessors, compute capability "
        f"{card['capability']}"
        for card in head["cards"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    return "\n".join([
        *(cards or [f"- no card: measured on the CPU ({head['cpu']})"]),
        f"- {versions}" + (f"; CUDA {head['cuda']}, driver {head['driver'] or 'unknown'}" if cards else ""),
        f"- {head['when']}; `{head['command']}`",
    ])  # fmt: skip


def _summary(part: Part, lines: Sequence[Line]) -> list[str]:
    ended = [line for line in lines if "status" in line]
    answers = "; ".join(line["answer"] for line in lines if "answer" in line)
    if not ended:
        return [part.name, "at work", "–", answers or "–"]
    last = ended[-1]
    status = last["status"] if last["status"] in ("ok", "does not apply") else f"**{last['status']}**"
    wrong = "" if last["status"] in ("ok",) else last["error"]
    return [part.name, status, f"{last['seconds']:.0f}", _cell("; ".join(filter(None, [answers, wrong])) or "–")]


def _part(part: Part, lines: Sequence[Line]) -> list[str]:
    blocks, tables = [f"## {part.name}", part.asks], dict[str, list[Line]]()
    for line in lines:
        if "table" in line:
            tables.setdefault(line["table"], []).append(line["cells"])
    for title, rows in tables.items():
        header = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_cell(row.get(key)) for key in header] for row in rows]
        blocks.append(f"**{title[0].upper()}{title[1:]}**\n\n{table(header, cells)}")
    for line in lines:
        if line.get("status") in ("failed", "deadline"):
            blocks.append(f"```text\n{line.get('traceback', '').strip() or 'it printed nothing'}\n```")
    return blocks if len(blocks) > 2 else []


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1e}" if 0 < abs(value) < 0.005 else number(value)
