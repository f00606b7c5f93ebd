"""``report.html`` of an evaluation, made from ``evaluation.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from mora_serve import svg
from mora_serve.evaluation_tables import classes, interval, share
from mora_serve.page import columns, document, section, table

Json = Mapping[str, Any]

CHART_WIDTH = 330
"""Of a chart that stands beside two others: text keeps its size."""


def write_page(found: Json, path: Path) -> None:
    """Write the page of an evaluation to ``path``."""
    path.write_text(render(found), "utf-8")


def render(found: Json) -> str:
    """The whole page as HTML."""
    sections = [
        _headline(found),
        _rewards(found),
        *(_changes(item, found["percent_missing"]) for item in found["comparisons"]),
        _lengths(found),
        _classes(found),
        _divergence(found),
        _caveats(found),
    ]
    return document("mora-serve evaluation", sections)


def _headline(found: Json) -> str:
    names = " · ".join(escape(version["name"]) for version in found["versions"])
    verdicts = [
        f"{escape(item['name'])}: "
        + ", ".join(f"{escape(k)} {change['verdict']}" for k, change in item["changes"].items())
        for item in found["comparisons"]
    ]
    return (
        f"<h1>Evaluation</h1><p class='sub'>{names} · {found['num_prompts']} prompts, "
        f"{found['sampling']['n']} answers each · seed {found['sampling']['seed']}</p>"
        f"<p>{'<br>'.join(verdicts)}</p>"
    )


def _intervals(found: Json, pick: Any) -> list[svg.Interval]:
    """One row per version with the estimate that ``pick`` takes of it, where it is measured."""
    rows = []
    for place, version in enumerate(found["versions"]):
        estimate = pick(version)
        if estimate["low"] is not None:
            bounds = (estimate["value"], estimate["low"], estimate["high"])
            rows.append(svg.Interval(version["name"], *bounds, place))
    return rows


def _rewards(found: Json) -> str:
    names = list(found["versions"][0]["rewards"])
    charts = [
        f"<p>{escape(k)}</p>"
        + svg.interval_chart(
            _intervals(found, lambda v, k=k: v["rewards"][k]), x_title="z", width=CHART_WIDTH
        )
        for k in names
    ]
    versions = found["versions"]
    head = ["dimension", *(version["name"] for version in versions)]
    rows = [[k, *(interval(version["rewards"][k]) for version in versions)] for k in names]
    rows += [
        [f"{k}, ceiling", *(interval(version["ceilings"][k]) for version in versions)]
        for k in versions[0]["ceilings"]
    ]
    intro = (
        "<p>Mean calibrated reward over prompts, and the mean ceiling at equal numbers of scores; "
        "intervals: 95 %, bootstrap over prompts. They overlap more than differences do, since all "
        "versions answer the same prompts.</p>"
    )
    return section("Rewards", intro, columns(*charts) + table(head, rows))


def _changes(item: Json, percent_missing: str | None) -> str:
    bars = [
        svg.Interval(k, v["change"]["value"], v["change"]["low"], v["change"]["high"], place)
        for place, (k, v) in enumerate(item["changes"].items())
        if v["change"]["low"] is not None
    ]
    head = ["dimension", "change", "at equal length", "win rate", "percent", "ceiling", ""]
    rows = [
        [
            k, interval(v["change"], signed=True), interval(v["adjusted"], signed=True),
            share(v["win_rate"]), interval(v["percent"], 1, signed=True),
            interval(v["ceiling"], signed=True), v["verdict"],
        ]
        for k, v in item["changes"].items()
    ]  # fmt: skip
    percent = percent_missing or (
        "Percent is the change of the mean quantile in the calibrator's pool (0 to 100), which is "
        "not the scale of the MORA paper."
    )
    intro = (
        "<p>Paired by prompt. At equal length: less the slope of z on log tokens, within prompts "
        f"and versions, times the change in mean log tokens. {escape(percent)}</p>"
    )
    chart = svg.interval_chart(bars, x_title="change of mean reward (z)") if bars else ""
    title = f"{item['name']} against {item['first']}"
    return section(title, intro, columns(chart) + table(head, rows))


def _lengths(found: Json) -> str:
    chart = svg.interval_chart(_intervals(found, lambda v: v["num_tokens"]), x_title="mean tokens")
    rows = [
        [v["name"], interval(v["num_tokens"], 1), share(v["share_cut"]), str(v["num_answers"])]
        for v in found["versions"]
    ]
    head = ["version", "mean tokens", "cut", "answers"]
    return section("Length of answers", "", columns(chart, table(head, rows)))


def _classes(found: Json) -> str:
    names = list(dict.fromkeys(name for v in found["versions"] for name in v["classes"]))
    charts = [
        f"<p>{escape(v['name'])}: {escape(classes(v['classes']))}</p>"
        + svg.bar_chart([(n, v["classes"].get(n, 0), i) for i, n in enumerate(names)])
        for v in found["versions"]
    ]
    intro = "<p>What the prompts' answers reach under each version, from one round of n.</p>"
    return section("Class mix", intro, columns(*charts))


def _divergence(found: Json) -> str:
    rows = [
        [version["name"], *_divergence_cells(kl)]
        for version, kl in zip(found["versions"], found["versions_kl"], strict=True)
        if kl is not None
    ]
    if not rows:
        return section("KL to the reference", "<p>Not measured.</p>", "")
    intro = (
        "<p>In nats, on the version's own answers at the sampling temperature: Schulman's k3, with "
        "k1 as a check. Ends of answers are not part of it.</p>"
    )
    head = ["version", "reference", "per token (k3)", "per answer (k3)", "per answer (k1)", "se"]
    return section("KL to the reference", intro, table(head, rows))


def _divergence_cells(kl: Json) -> Sequence[str]:
    return [
        str(kl["reference"]), interval(kl["per_token"], 4), interval(kl["per_answer"], 3),
        interval(kl["per_answer_k1"], 3), f"{kl['per_answer']['se'] or 0:.4f}",
    ]  # fmt: skip


def _caveats(found: Json) -> str:
    facts = {
        name: found[name]
        for name in ("version", "sampling", "scorers", "calibrator", "num_resamples")
    }
    items = [
        "Every interval is 95 % on its own: of many figures some leave out 0 by chance.",
        "Rewards are what reward models say. A policy trained against a scorer can please it "
        "without being better: use another one here where there is one.",
        "Engines keep the distribution, not the bytes: the same seed gives similar figures.",
    ]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    return section("Caveats", "", f"<ul>{listed}</ul><pre>{escape(text)}</pre>")
