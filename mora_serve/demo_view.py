"""What a run of the demo shows on a terminal: progress while it runs, tables when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mora_serve.tables import add_row, counts_table, number, table

Json = Mapping[str, Any]
QUIET_INTERVAL_S = 20.0
"""How often progress is a line of its own where there is no terminal."""


class ConsoleView:
    """Steps as headlines with the time; progress as a bar, without a terminal as a rare line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._last_line = 0.0
        self._title = ""
        self._bar = Progress(
            TextColumn("    "),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end_bar()
        self._bar.stop()

    def step(self, title: str) -> None:
        self._end_bar()
        self._title, self._last_line = title, time.monotonic()
        self._print(f"[bold]{self._clock()} {_plain(title)}[/]")

    def note(self, text: str) -> None:
        self._print(f"      {_plain(text)}")

    def progress(self, done: int, total: int, detail: str) -> None:
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=total, detail=detail)
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif time.monotonic() - self._last_line > QUIET_INTERVAL_S:
            self._last_line = time.monotonic()
            self.note(f"{done}/{total} {detail}".rstrip())

    def _end_bar(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:2d}:{seconds:02d}"


def summary_tables(summary: Json) -> Iterator[Table]:
    """The run's figures as tables."""
    yield counts_table("Classes of the prompts", summary["classes"])
    yield rewriting_table(summary)
    if summary["rewriting"]["verdicts"]:
        yield counts_table(
            "Rewritten prompts: accepted, or why not", summary["rewriting"]["verdicts"]
        )
    yield _training_table(summary)
    yield evaluation_table(summary)


def rewriting_table(summary: Json) -> Table:
    """Means and ceilings before and after, over the accepted rewrites."""
    rewriting = summary["rewriting"]
    made = table(
        f"Rewriting: {rewriting['num_accepted']} of {rewriting['num_rewritten']} prompts accepted "
        "(z, mean over the accepted)",
        "dimension", "mean before", "after", "ceiling before", "after", "confirmed change",
        right=[1, 2, 3, 4, 5],
    )  # fmt: skip
    for name, item in rewriting["dimensions"].items():
        add_row(
            made,
            name,
            number(item["mean_before"]),
            number(item["mean_after"]),
            number(item["ceiling_before"]),
            number(item["ceiling_after"]),
            number(item["confirmed_change"], signed=True),
        )
    made.caption = (
        "Before: the sample that chose the class, which flatters a change. "
        "Confirmed: fresh rollouts of both prompts."
    )
    return made


def evaluation_table(summary: Json) -> Table:
    """Mean reward of the same prompts under both versions."""
    evaluation = summary["evaluation"]
    made = table(
        f"Rewards before and after training (z, {evaluation['num_prompts']} prompts, "
        f"{evaluation['n']} rollouts each)",
        "dimension", "before", "after", "change", "se", "95 % interval", "",
        right=[1, 2, 3, 4, 5],
    )  # fmt: skip
    for name, item in evaluation["dimensions"].items():
        interval = f"{number(item['low'], signed=True)} … {number(item['high'], signed=True)}"
        add_row(
            made,
            name,
            number(item["before"]),
            number(item["after"]),
            number(item["change"], signed=True),
            number(item["se"]),
            interval,
            verdict(item),
        )
    return made


def verdict(item: Json) -> str:
    """Whether a change is more than noise, in words."""
    if item["change"] is None:
        return "not measured"
    if item["within_noise"]:
        return "within noise"
    return "higher" if item["change"] > 0 else "lower"


def _training_table(summary: Json) -> Table:
    training, pairs = summary["training"], summary["pairs"]
    made = table("Pairs and training", "", "", right=[1])
    for name, value in (
        ("preference pairs", str(pairs["count"])),
        ("mean margin (z)", number(pairs["mean_margin"])),
        ("DPO steps", str(training["num_steps"])),
        ("steps while the batch still ran", str(training["steps_while_batch_ran"])),
        ("loss, first", number(training["loss_first"], 4)),
        ("loss, last", number(training["loss_last"], 4)),
        ("policy version", summary["tuned"]),
    ):
        add_row(made, name, value)
    return made


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
