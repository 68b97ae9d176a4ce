"""The page: ``bench.md`` from the raw numbers of ``bench.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from real_work import LABELS
from targets import TARGETS, speed

Results = Mapping[str, Any]


def page(results: Results, figure: str | None) -> str:
    """All parts that were measured, as Markdown."""
    parts = ["# Benchmarks", _machine(results["machine"]), "## Targets", _targets(results)]
    if figure:
        parts.append(f"![Clients per second by system and regime.]({figure})")
    sections = {
        "peers": _peers, "null": _null, "scale": _scale, "start": _start, "lanes": _lanes, "memory": _memory,
        "real": _real, "profile": _profile, "flops": _flops,
    }  # fmt: skip
    for name, make in sections.items():
        if name in results:
            parts += make(results)
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def number(value: float | None, digits: int = 3) -> str:
    """Three digits that count, without an exponent for ordinary sizes; a dash for what was not measured.

    >>> number(1234.5), number(0.01234), number(12.34)
    ('1,234', '0.0123', '12.3')
    """
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    after = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{after}f}"


def _machine(found: Mapping[str, Any]) -> str:
    peaks = "; ".join(
        f"{kind}: " + ", ".join(f"{n} thread{'s' * (n != '1')} {p / 1e9:,.0f} GFLOP/s" for n, p in by.items())
        for kind, by in found["peaks"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join(
        [
            f"- {found['cpu']}; {found['cores']} cores, {found['memory_gb']:.0f} GB; {found['system']}",
            f"- Python {found['python']}, {versions}",
            f"- measured peak of a 1,024 x 1,024 matrix product, {peaks}",
            f"- {found['when']}; load average before the run {found['load']:.2f}",
        ]
    )


def _targets(results: Results) -> str:
    return table(["target", "goal", "measured", ""], [target.line(results) for target in TARGETS])


def _peers(results: Results) -> list[str]:
    parts = [
        "## The same job through every system",
        "FedAvg of LoRA (r = 8 on every linear layer of a BERT classifier), one epoch of Adam per client and round. "
        "All systems read the same weights, texts, cohorts and order of rows. *Ratio*: to the faster plain loop in "
        "fp32. *Peak*: counted floating-point operations against the measured peak of all cores in the row's type. "
        "*Parity*: distance of the final parameters to the plain loop's, divided by the way the plain loop went. "
        "*First step*: from the start of the process. *First round*: not in the other columns. *Memory*: highest sum "
        "over all processes, pages that they share counted in each. per_client rounds have 8 clients, and a plain "
        "loop of their own for parity. Systems were measured one after the other, each in fresh processes.",
    ]
    for block in results["peers"]["regimes"]:
        parts += [_regime_title(block["regime"]), _regime_table(results, block)]
    return parts


def _regime_title(regime: Mapping[str, Any]) -> str:
    least, most = regime["sizes"]
    return (
        f"### {regime['name'].capitalize()}: {regime['tokens'] * regime['batch']:,} tokens a step, hidden "
        f"{regime['hidden']}\n\n{regime['cohort']} of {regime['population']} clients a round, {least} to {most} steps "
        f"each, {regime['layers']} layers, texts of {regime['tokens']} tokens, {regime['rounds']} rounds."
    )


def _regime_table(results: Results, block: Mapping[str, Any]) -> str:
    header = [
        "system", "clients/s (slowest–fastest round)", "ratio", "% of peak", "parity", "first step, s",
        "first round, s", "memory, MB", "repeats",
    ]  # fmt: skip
    base = speed(results, block["regime"]["name"], "plain", "plain_all")
    rows = []
    for row in block["rows"]:
        if row["missing"]:
            rows.append([row["label"], row["missing"], *["–"] * (len(header) - 2)])
            continue
        peak = max(results["machine"]["peaks"][row["dtype"]].values())
        apart = row.get("parity")
        parity = "–" if apart is None else f"{apart:.0e}" if apart else "0"
        spread = f"{number(row['clients_per_s'])} ({number(row['slowest'])}–{number(row['fastest'])})"
        rows.append(
            [
                row["label"], spread, number(base and row["clients_per_s"] / base),
                f"{100 * row['flops_per_s'] / peak:.1f}", parity, f"{row['first_step_s']:.1f}",
                f"{row['round_s'][0]:.2f}", f"{row['peak_mb']:,.0f}", str(row["repeats"]),
            ]
        )  # fmt: skip
    return table(header, rows)


def _null(results: Results) -> list[str]:
    rows = []
    for row in results["null"]["rows"]:
        cells = [row["cohorts"].get(n) for n in ("10", "100", "1000")]
        shown = [f"{number(c['ms_per_client'])} ({number(c['p90_ms_per_client'])})" if c else "–" for c in cells]
        rounds = f"{number(cells[1]['round_ms'])}" if cells[1] else row["missing"]
        rows.append([row["label"], *shown, rounds, "/".join(str(c["repeats"]) if c else "–" for c in cells)])
    header = ["system", "10 clients", "100 clients", "1,000 clients", "whole round of 100, ms", "repeats"]
    return [
        "## A round that trains nothing, ms per client",
        "Median (90th percentile); 10,000 shared parameters, one metric per client. Ours samples, broadcasts, sums, "
        "writes Parquet and safetensors, reads them back, hashes and commits; the others keep nothing on disk.",
        table(header, rows),
    ]


def _scale(results: Results) -> list[str]:
    found = results["scale"]

    def lines(part: str, *keys: str) -> list[list[str]]:
        return [[_cell(row, key) for key in keys] for row in found[part]]

    size = ["population", "cohort", "ms_per_client", "clients_per_s", "driver_mb", "peak_mb", "repeats"]
    header = ["population", "cohort", "ms per client", "clients/s", "driver, MB", "all processes, MB", "repeats"]
    return [
        "## Scale (ours, Ray, lanes)",
        table(
            ["regime", "actors", "clients/s", "repeats"],
            lines("actors", "regime", "actors", "clients_per_s", "repeats"),
        ),
        "One or two steps of 64 tokens per client, two actors:",
        table(header, lines("population", *size) + lines("cohort", *size)),
    ]


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return row.get("missing", "–") if key == "clients_per_s" else "–"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else number(value)


def _start(results: Results) -> list[str]:
    header = ["", "median", "least", "most", "unit"]
    note = f"The smallest job of the peers' part; load average at the end {results['start']['load']:.1f}."
    return ["## Start (ours)", note, table(header, results["start"]["rows"])]


def _real(results: Results) -> list[str]:
    rows = results["real"]["rows"]
    lines = []
    for row in rows:
        speed_of = f"{row['per_s']:,.0f}" if "per_s" in row else row["missing"]
        seen = [
            speed_of,
            _of_peak(results, row, min(row.get("seconds", [math.inf]))),
            f"{row['loss']:.3f}" if row.get("loss") else "",
        ]
        lines.append(
            [f"{row['model']}: {LABELS[row['work']]}", row["side"], f"{row['dtype']}, {row['attention']}", *seen]
        )
    header = ["work", "side", "type, attention", "tokens/s", "% of peak", "mean loss"]
    what = (
        "One thread each, the same rows in the same order; tokens that are read in training, written in answers. *% of "
        "peak*: matrix products and attention that were done, padding included, against the measured peak of a product "
        "in the row's type."
    )
    return ["## Real weights, real texts", what, table(header, lines)]


def _of_peak(results: Results, row: Mapping[str, Any], seconds: float) -> str:
    """Operations of a row on one thread, in % of the measured peak in its type."""
    if "flops" not in row:
        return "–"
    return f"{100 * row['flops'] / seconds / results['machine']['peaks'][row['dtype']]['1']:.0f}"


def _profile(results: Results) -> list[str]:
    known = [row for row in results["profile"]["rows"] if "missing" not in row]
    kinds = list(known[0]["shares"]) if known else []
    lines = []
    for row in results["profile"]["rows"]:
        shown = [f"{row['model']}: {row['work']}", f"{row['dtype']}, {row['attention']}"]
        if "missing" in row:
            lines.append([*shown, row["missing"], *[""] * (1 + len(kinds))])
            continue
        seen = [f"{row['per_s']:,.0f}", _of_peak(results, row, row["cpu"])]
        lines.append([*shown, *seen, *[f"{100 * row['shares'][kind]:.0f}" for kind in kinds]])
    header = ["work", "type, attention", "tokens per CPU-second", "% of peak", *[f"{kind}, %" for kind in kinds]]
    what = (
        "One thread. *% of peak*: matrix products and attention, as torch counts them, against the measured peak of a "
        "product in the row's type. The other columns are shares of the operators' time; *products* are those with "
        "weights that all lanes share, *batched products* the low-rank ones and eager attention's."
    )
    return ["## What a step on real weights is made of", what, table(header, lines)]


def _flops(results: Results) -> list[str]:
    header = ["method", "TFLOPs a round", "published", "ratio", "published", "goal", ""]
    what = (
        "PF2LoRA's Table 22: RoBERTa-base, 8 clients, 10 steps of 16 rows of 512 tokens. Counted by torch on one step "
        "of one row, attention by the math kernel, and scaled; matrix products and attention only, no softmax or GELU. "
        "*Ratio*: to HOMLoRA."
    )
    return ["## Operations of a round", what, table(header, results["flops"]["rows"])]


def _lanes(results: Results) -> list[str]:
    header = ["method", "one at a time, s", "lanes, s", "ratio"]
    return ["## Lanes in one process, 16 clients, 64 tokens a step", table(header, results["lanes"]["rows"])]


def _memory(results: Results) -> list[str]:
    header = ["clients", "driver, peak MB", "actor, peak MB", "s"]
    return ["## A whole experiment against its population (Ray, two actors)", table(header, results["memory"]["rows"])]
