"""``report.html`` of a run: one self-contained page with tables and inline charts.

Made from ``summary.json`` alone (:func:`mora_serve.run_summary.summarise`), so that a page can be
made again from the file. All text from prompts and the configuration is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from mora_serve import svg
from mora_serve.demo_view import verdict
from mora_serve.page import columns, document, section, table
from mora_serve.tables import number, prompt_text

Json = Mapping[str, Any]
OTHER_CLASSES = {"multi": 3, "uncertain": 6}
"""Series of classes that exist whatever the dimensions are; the others are muted."""
SINGLE_SERIES = (0, 1, 2, 4, 5, 7)


def write_report(summary: Json, path: Path) -> None:
    """Write the page for ``summary`` to ``path``."""
    path.write_text(render(summary), "utf-8")


def render(summary: Json) -> str:
    """The whole page as HTML."""
    sections = [
        _headline(summary),
        _classes(summary),
        _planes(summary),
        _rewriting(summary),
        _training(summary),
        _evaluation(summary),
        _accepted(summary),
        _prompts(summary),
        _caveats(summary),
        _configuration(summary),
    ]
    return document(f"mora-serve run {summary['started']}", sections)


def class_series(name: str, dimensions: Sequence[str]) -> int:
    """Colour and shape of a class."""
    if name.startswith("single:"):
        dimension = name.removeprefix("single:")
        position = dimensions.index(dimension) if dimension in dimensions else 0
        return SINGLE_SERIES[position % len(SINGLE_SERIES)]
    return OTHER_CLASSES.get(name, svg.MUTED)


# --- sections -----------------------------------------------------------------------------------


def _headline(summary: Json) -> str:
    rewriting, training = summary["rewriting"], summary["training"]
    tiles = [
        ("prompts", str(len(summary["prompts"]))),
        ("rollouts drawn to classify", str(summary["presampling"]["num_rollouts"])),
        ("rewrites accepted", f"{rewriting['num_accepted']} of {rewriting['num_rewritten']}"),
        ("preference pairs", str(summary["pairs"]["count"])),
        ("DPO steps", str(training["num_steps"])),
    ]
    cells = "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in tiles)
    changes = [
        f"{escape(name)} {number(item['change'], signed=True)} ({verdict(item)})"
        for name, item in summary["evaluation"]["dimensions"].items()
    ]
    return (
        f"<h1>mora-serve run</h1><p class='sub'>{escape(summary['started'])} · seed "
        f"{summary['seed']} · {escape(summary['base'])} → {escape(summary['tuned'])}</p>"
        f"<div class='tiles'>{cells}</div>"
        f"<p>Mean reward of the same prompts after training, in z: {'; '.join(changes)}.</p>"
    )


def _classes(summary: Json) -> str:
    dimensions = summary["dimensions"]
    bars = [(k, v, class_series(k, dimensions)) for k, v in summary["classes"].items()]
    names = list(summary["classes"])
    rows = [
        [kind, *(str(counts.get(name, 0)) for name in names)]
        for kind, counts in summary["classes_by_kind"].items()
    ]
    return section(
        "Classes",
        "<p>Which rewards can answers to a prompt reach? <em>single</em>: exactly one dimension, "
        "the "
        "others out of reach; <em>multi</em>: two or more; <em>flat</em>: none; "
        "<em>uncertain</em>: "
        "still undecided after the last round of rollouts.</p>",
        columns(svg.bar_chart(bars), table(["kind of prompt", *names], rows)),
    )


def _planes(summary: Json) -> str:
    dimensions, bounds = summary["dimensions"], summary["bounds"]
    charts = [
        svg.scatter(
            _points(summary, a, b),
            x_title=a,
            y_title=b,
            x_bound=bounds.get(a),
            y_bound=bounds.get(b),
        )
        for a, b in combinations(dimensions, 2)
    ]
    return section(
        "Reward planes",
        "<p>Each mark is a prompt at its expected ceiling (z): what the best quarter of its "
        "answers "
        "reaches. Dashed: the bound that a ceiling has to pass to count as reachable. The class "
        "asks "
        "for a probability, so marks near a line may be uncertain.</p>",
        _class_legend(summary) + columns(*charts),
    )


def _rewriting(summary: Json) -> str:
    dimensions, rewriting = summary["dimensions"], summary["rewriting"]
    accepted = [p for p in summary["prompts"] if p.get("rewrite")]
    rows = [
        [
            name, number(d["mean_before"]), number(d["mean_after"]), number(d["ceiling_before"]),
            number(d["ceiling_after"]), number(d["confirmed_change"], signed=True),
        ]
        for name, d in rewriting["dimensions"].items()
    ]  # fmt: skip
    head = ["dimension", "mean before", "after", "ceiling before", "after", "confirmed change"]
    verdicts = [
        (k, v, 3 if k == "accepted" else svg.MUTED) for k, v in rewriting["verdicts"].items()
    ]
    charts = [
        svg.scatter(
            _points(summary, a, b, muted=True),
            arrows=_arrows(accepted, a, b, dimensions),
            x_title=a,
            y_title=b,
            x_bound=summary["bounds"].get(a),
            y_bound=summary["bounds"].get(b),
        )
        for a, b in combinations(dimensions, 2)
    ]
    arrows = (
        "<p>Accepted rewrites, from the original prompt (dot) to the rewritten one (head), at the "
        "expected ceiling.</p>" + columns(*charts)
        if accepted
        else "<p>No rewrite was accepted in this run.</p>"
    )
    return section(
        "Rewriting",
        f"<p>{rewriting['num_rewritten']} prompts had candidates "
        f"({rewriting['num_candidates']} in all); the best one of each was confirmed on fresh "
        f"rollouts. Mean confirmed gain of the accepted: "
        f"{number(rewriting['mean_gain'], signed=True)}"
        " z on the dimensions they were to open.</p>",
        columns(svg.bar_chart(verdicts) if verdicts else "", table(head, rows))
        + "<p class='note'>The values before come from the sample that chose the class, so before "
        "and "
        "after differ by more than the truth; the confirmed change stands on fresh rollouts of "
        "both "
        "prompts.</p>" + arrows,
    )


def _training(summary: Json) -> str:
    training, pairs = summary["training"], summary["pairs"]
    charts = []
    for name, zero in (("loss", False), ("margin", True)):
        values = [(p["step"], p[name]) for p in training["curve"] if p[name] is not None]
        if values:
            series = [(name, values)]
            charts.append(svg.line_chart(series, x_title="step", y_title=name, zero=zero))
    return section(
        "Training",
        f"<p>DPO on {pairs['count']} pairs (mean margin {number(pairs['mean_margin'])} z), "
        f"{training['num_steps']} steps, {training['steps_while_batch_ran']} of them logged while "
        f"the "
        f"batch still ran. Loss {number(training['loss_first'], 4)} → "
        f"{number(training['loss_last'], 4)} (0.6931 is no preference at all).</p>",
        columns(*charts) if charts else "<p>The job logged no metrics.</p>",
    )


def _evaluation(summary: Json) -> str:
    evaluation = summary["evaluation"]
    items = evaluation["dimensions"]
    intervals = [
        svg.Interval(
            name, d["change"], d["low"], d["high"], class_series(f"single:{name}", [*items])
        )
        for name, d in items.items()
        if d["low"] is not None
    ]
    rows = [
        [
            name, number(d["before"]), number(d["after"]), number(d["change"], signed=True),
            number(d["se"]), verdict(d),
        ]
        for name, d in items.items()
    ]  # fmt: skip
    return section(
        "Rewards before and after training",
        f"<p>The original {evaluation['num_prompts']} prompts, {evaluation['n']} fresh rollouts "
        f"each "
        "under the base and the tuned version; mean reward in z. Intervals: 95 %, bootstrap over "
        "prompts. An interval that contains 0 is within noise.</p>",
        columns(
            svg.interval_chart(intervals, x_title="change of mean reward (z)"),
            table(["dimension", "before", "after", "change", "se", ""], rows),
        ),
    )


def _accepted(summary: Json) -> str:
    rows = [
        [prompt_text(p["prompt"], 400), prompt_text(p["rewrite"]["prompt"], 700),
         ", ".join(p["rewrite"]["targets"]), number(p["rewrite"]["gain"], signed=True)]
        for p in summary["prompts"]
        if p.get("rewrite")
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["original", "accepted rewrite", "meant to open", "gain"]
    return section("Accepted rewrites", "", table(head, rows, wide=True))


def _prompts(summary: Json) -> str:
    dimensions = summary["dimensions"]
    rows = [
        [
            p["id"], prompt_text(p["prompt"], 120), p["class"], number(p.get("class_probability")),
            *(number((p["dimensions"].get(k) or {}).get("mean")) for k in dimensions),
            str(p.get("num_rollouts") or ""), p.get("verdict") or "",
        ]
        for p in summary["prompts"]
    ]  # fmt: skip
    head = [
        "id",
        "prompt",
        "class",
        "p",
        *(f"mean {k}" for k in dimensions),
        "rollouts",
        "rewriting",
    ]
    return (
        f"<section><details><summary>All {len(rows)} prompts</summary>"
        f"{table(head, rows, wide=True)}</details></section>"
    )


def _caveats(summary: Json) -> str:
    share_cut = summary["presampling"]["share_cut"]
    cut = "unknown" if share_cut is None else f"{100 * share_cut:.0f} %"
    items = [
        "Rewards are what small reward models say, calibrated on the base policy; they are not "
        "human "
        "judgements, and z is not a percentage.",
        f"Answers cut by the token limit score wrongly; here {cut} of the answers were cut.",
        "One run on few prompts: a class is an estimate with a probability, and most changes "
        "after a "
        "short training are within noise.",
        "The prompts scored after training are those that were trained on; nothing here speaks of "
        "other prompts.",
        "Engines keep the distribution, not the bytes: the same seed gives similar figures, not "
        "equal "
        "ones.",
    ]
    return section("Caveats", "", f"<ul>{''.join(f'<li>{escape(i)}</li>' for i in items)}</ul>")


def _configuration(summary: Json) -> str:
    facts = {k: summary[k] for k in ("version", "batch_id", "job_id", "seed", "timings_s", "usage")}
    facts["hyperparameters"] = summary["training"]["hyperparameters"]
    if summary["configuration"] is not None:
        facts["configuration"] = summary["configuration"]
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    return (
        "<section><details><summary>Configuration</summary>"
        f"<pre>{escape(text)}</pre></details></section>"
    )


# --- pieces -------------------------------------------------------------------------------------


def _points(summary: Json, a: str, b: str, *, muted: bool = False) -> list[svg.Point]:
    """The prompts that were measured on both dimensions, by class or all in the quiet colour."""
    found = []
    for prompt in summary["prompts"]:
        x, y = (_ceiling(prompt["dimensions"].get(k)) for k in (a, b))
        if x is not None and y is not None:
            label = f"{prompt['class']}: {prompt_text(prompt['prompt'], 80)}"
            series = svg.BACKDROP if muted else class_series(prompt["class"], summary["dimensions"])
            found.append(svg.Point(x, y, label, series))
    return found


def _arrows(accepted: Iterable[Json], a: str, b: str, dimensions: Sequence[str]) -> list[svg.Arrow]:
    found = []
    for prompt in accepted:
        before = [_ceiling(prompt["dimensions"].get(k)) for k in (a, b)]
        after = [_ceiling(prompt["rewrite"]["dimensions"].get(k)) for k in (a, b)]
        if None not in before and None not in after:
            label = prompt_text(prompt["rewrite"]["prompt"], 100)
            series = class_series(prompt["class"], dimensions)
            found.append(svg.Arrow(tuple(before), tuple(after), label, series))  # type: ignore[arg-type]
    return found


def _ceiling(item: Json | None) -> float | None:
    return None if item is None else item["expected_ceiling"]


def _class_legend(summary: Json) -> str:
    dimensions = summary["dimensions"]
    items = "".join(
        f"<span>{svg.swatch(class_series(name, dimensions))}{escape(name)}</span>"
        for name in summary["classes"]
        if name not in {"unknown", "failed"}
    )
    return f"<div class='legend'>{items}</div>"
