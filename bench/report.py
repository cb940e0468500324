"""What a reader gets: the table on the terminal, the JSON file, and with --keep the pages below docs/."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.chart import bars
from bench.results import MEASURES, TARGETS, Results, Target

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
SECTION = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- end of results -->)", re.DOTALL)
HEADER = ("measure", "median", "ratio", "target", "held")
# What the chart shows, and whether it is ours.
CHART = (
    ("plain", "plain FastAPI + SQLAlchemy", False),
    ("pgbench", "PostgreSQL alone (pgbench)", False),
    ("separate", "buydesk, separate services", True),
    ("orders_64", "buydesk, one process", True),
    ("echo", "HTTP alone, nothing stored", False),
)
# Whose CPU time per order is worth telling.
CPU_OF = ("orders_64", "separate")

Row = tuple[str, str, str, str, str]


def rows(results: Results) -> list[Row]:
    """The table: each measure with its median and with every target it is held against."""
    found: list[Row] = []
    for name, measure in MEASURES.items():
        value = results.value(name)
        if value is None:
            continue
        title = measure.title + _which(results, name)
        shown = f"{_number(value)} {measure.unit}".strip()
        targets = [target for target in TARGETS if target.over == name]
        found += [(title, shown, *_judged(results, target)) for target in targets] or [(title, shown, "", "", "")]
    return found


def text_table(results: Results) -> str:
    """For the terminal."""
    all_rows = [HEADER, *rows(results)]
    widths = [max(len(row[column]) for row in all_rows) for column in range(len(HEADER))]
    kind = "QUICK: everything once and tiny; targets are shown, not judged" if results.is_quick else "medians of rounds"
    lines = [f"buydesk, {kind}", ""]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in all_rows
    ]
    return "\n".join([*lines, "", *_cpu_lines(results), *_proof_lines(results)])


def write_json(results: Results, path: Path) -> None:
    """All of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results.document(), indent=1) + "\n")


def write_chart(results: Results, path: Path) -> None:
    """What of the chart was measured."""
    values = [(label, results.value(name), is_ours) for name, label, is_ours in CHART]
    known = [(label, value, is_ours) for label, value, is_ours in values if value is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bars("Orders per second, each committed to disk (HTTP alone stores none)", known))


def keep(results: Results, docs: Path = DOCS) -> None:
    """Makes these results the ones that docs/benchmarks.md tells of."""
    write_json(results, docs / "benchmarks.json")
    write_chart(results, docs / "benchmarks.svg")
    page = docs / "benchmarks.md"
    section = markdown(results)
    text, found = SECTION.subn(lambda marks: f"{marks[1]}\n{section}\n{marks[2]}", page.read_text(encoding="utf-8"))
    if found != 1:
        raise ValueError(f"{page.name} must have one section for results")
    page.write_text(text, encoding="utf-8")


def markdown(results: Results) -> str:
    """The section of the page that is written anew by every run that is kept."""
    lines = [
        f"Run of {results.facts.get('date')} at commit {results.facts.get('commit')}; all samples are in "
        "[benchmarks.json](benchmarks.json).",
        "",
        "![Orders per second](benchmarks.svg)",
        "",
        _markdown_row(HEADER),
        "|---|---|---|---|---|",
        *map(_markdown_row, rows(results)),
        "",
        *_proof_lines(results),
        "",
        *_cpu_lines(results, "- "),
        "",
        "The machine:",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in _machine(results).items()),
    ]
    return "\n".join(lines) + "\n"


def _which(results: Results, name: str) -> str:
    """Of a measure that is the best of several: which one was."""
    best = results.best(name)
    if best is None or best == name:
        return ""
    unit = "clients" if "pgbench" in name else "connections"
    return f" ({best.rpartition('_')[2]} {unit})"


def _judged(results: Results, target: Target) -> tuple[str, str, str]:
    ratio, held = results.ratio(target), results.held(target)
    wanted = ("≥ " if target.at_least else "≤ ") + _number(target.limit)
    if target.is_aim:
        wanted = f"aim {wanted}"
    if ratio is None:
        return "not measured", wanted, ""
    shown = "" if target.under is None else f"{ratio:.2f} ({target.title})"
    return shown, wanted, "yes" if held else "NO"


def _cpu_lines(results: Results, before: str = "") -> list[str]:
    lines = []
    cpu = results.document()["cpu_us_per_order"]
    for name in CPU_OF:
        best = results.best(name)
        if best in cpu:
            parts = sorted(cpu[best].items(), key=lambda part: -part[1])
            told = ", ".join(f"{part} {us:.0f}" for part, us in parts if us >= 0.5)
            lines.append(f"{before}CPU µs an order, {MEASURES[name].title}: {told}")
    return lines


def _proof_lines(results: Results) -> list[str]:
    return [
        f"Proved from the database: {results.orders_proved:,} orders of {results.runs_proved} runs were answered with "
        f"201 and are there exactly once; {results.orders_unanswered:,} were under way when their run ended; "
        f"{results.replays_proved:,} repeats added none."
    ]


def _machine(results: Results) -> Mapping[str, Any]:
    durable = ", ".join(f"{name} {value}" for name, value in results.facts.get("durable", {}).items())
    return {**results.facts.get("machine", {}), "postgresql": f"{results.facts.get('postgresql')} ({durable})"}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _markdown_row(row: tuple[str, ...]) -> str:
    return f"| {' | '.join(row)} |"
