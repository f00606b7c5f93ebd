"""Rich tables of what the API returns; the demo shows the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]
MISSING = "·"
"""Shown where there is no figure, which is not the same as 0."""


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A figure for a table cell."""
    if value is None:
        return MISSING
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def table(title: str, *columns: str, right: Sequence[int] = ()) -> Table:
    """A table in the house style; ``right`` lists the columns of figures."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return made


def add_row(made: Table, *cells: str) -> None:
    """Add a row of plain text: what prompts contain is no markup."""
    made.add_row(*(Text(cell) for cell in cells))


def last_turn(prompt: str | Sequence[Json]) -> str:
    """The text of a prompt's last turn."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def prompt_text(prompt: str | Sequence[Json], width: int = 60) -> str:
    """The last turn of a prompt on one line, cut to ``width`` characters."""
    line = " ".join(last_turn(prompt).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def diagnostics_table(prompts: Sequence[Any], data: Iterable[Json]) -> Table:
    """One row per prompt: class with its probability, then mean and reach per dimension."""
    items = sorted(data, key=lambda item: item["index"])
    dimensions = next((list(item["dimensions"]) for item in items if item["dimensions"]), [])
    columns = ["#", "class", "p", *(f"{name}\nmean / reach" for name in dimensions), "n", "prompt"]
    made = table("Diagnostics", *columns, right=[0, 2, *range(3, 4 + len(dimensions))])
    for item in items:
        if item["status"] != "ok":
            cells = [MISSING] * len(dimensions)
            label = f"failed: {(item.get('error') or {}).get('code')}"
        else:
            cells = [_mean_and_reach(item["dimensions"].get(name)) for name in dimensions]
            label = str(item["class"])
        text = prompt_text(prompts[item["index"]])
        add_row(
            made,
            str(item["index"]),
            label,
            number(item["class_probability"]),
            *cells,
            str(item.get("num_rollouts", MISSING)),
            text,
        )
    return made


def counts_table(title: str, counts: Json) -> Table:
    """Counts with their share, largest first."""
    total = sum(counts.values()) or 1
    made = table(title, "", "count", "share", right=[1, 2])
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        add_row(made, str(name), str(count), f"{100 * count / total:.0f} %")
    return made


def candidates_table(result: Json) -> Table:
    """The candidates of one rewrite with their gains (z) and what became of them."""
    made = table(
        "Candidates", "#", "strategy", "selection gain*", "confirmed gain", "verdict", "prompt",
        right=[0, 2, 3],
    )  # fmt: skip
    for index, item in enumerate(result["candidates"]):
        verdict = "accepted" if item["accepted"] else str(item["reason"])
        add_row(
            made,
            str(index),
            item["strategy"],
            number(item["selection_gain"], signed=True),
            number(gain_of(item), signed=True),
            verdict,
            prompt_text(item["prompt"], 80),
        )
    made.caption = "* biased: the best of several measurements. Only confirmed gains count."
    return made


def gain_of(candidate: Json) -> float | None:
    """The confirmed gain of a candidate in z, or ``None`` when it was not confirmed."""
    gain = candidate.get("gain")
    if isinstance(gain, Mapping):
        gain = gain.get("gain", gain.get("mean"))
    return gain


def _mean_and_reach(item: Json | None) -> str:
    return MISSING if item is None else f"{number(item['mean'])} / {number(item['reach'])}"
