"""Tables of an evaluation for a terminal, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from mora_serve.tables import MISSING, add_row, number, table

Json = Mapping[str, Any]


def evaluation_tables(found: Json) -> Iterator[Table]:
    """Rewards, changes against the first version, and what explains them."""
    yield _rewards(found)
    for item in found["comparisons"]:
        yield _changes(item, found["percent_missing"])
    yield _answers(found)


def interval(estimate: Json | None, digits: int = 2, *, signed: bool = False) -> str:
    """``+0.12 (+0.03 … +0.21)``."""
    if estimate is None or estimate["value"] is None:
        return MISSING
    if estimate["low"] is None:
        return number(estimate["value"], digits, signed=signed)
    low, middle, high = (
        number(estimate[name], digits, signed=signed) for name in ("low", "value", "high")
    )
    return f"{middle} ({low} … {high})"


def share(estimate: Json | None) -> str:
    """A share as percent with its interval."""
    if estimate is None or estimate["value"] is None:
        return MISSING
    if estimate["low"] is None:
        return f"{100 * estimate['value']:.0f} %"
    low, middle, high = (f"{100 * estimate[name]:.0f}" for name in ("low", "value", "high"))
    return f"{middle} % ({low} … {high})"


def classes(counts: Json) -> str:
    """``multi 12, single:helpful 3``."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _rewards(found: Json) -> Table:
    names = [version["name"] for version in found["versions"]]
    made = table(
        f"Mean reward (z) on {found['num_prompts']} prompts, {found['sampling']['n']} answers each",
        "dimension", *names, *(f"ceiling {name}" for name in names),
        right=range(1, 1 + 2 * len(names)),
    )  # fmt: skip
    for name in found["versions"][0]["rewards"]:
        add_row(
            made,
            name,
            *(interval(version["rewards"][name]) for version in found["versions"]),
            *(interval(version["ceilings"].get(name)) for version in found["versions"]),
        )
    made.caption = "95 % intervals: bootstrap over prompts. Ceilings at equal numbers of scores."
    return made


def _changes(item: Json, percent_missing: str | None) -> Table:
    made = table(
        f"{item['name']} against {item['first']}",
        "dimension", "change (z)", "at equal length", "win rate", "percent", "ceiling", "",
        right=range(1, 6),
    )  # fmt: skip
    for name, change in item["changes"].items():
        add_row(
            made,
            name,
            interval(change["change"], signed=True),
            interval(change["adjusted"], signed=True),
            share(change["win_rate"]),
            interval(change["percent"], 1, signed=True),
            interval(change["ceiling"], signed=True),
            change["verdict"],
        )
    percent = percent_missing or "percent: change of the mean pool quantile, not the paper's scale"
    made.caption = (
        "No difference: the interval of the change contains 0. At equal length: less the slope of "
        f"z on log tokens within prompts and versions. {percent}"
    )
    return made


def _answers(found: Json) -> Table:
    made = table(
        "Answers", "version", "tokens", "cut", "failed", "KL per token", "KL per answer", "classes",
        right=range(1, 6),
    )  # fmt: skip
    for version, kl in zip(found["versions"], found["versions_kl"], strict=True):
        add_row(
            made,
            version["name"],
            interval(version["num_tokens"], 1),
            share(version["share_cut"]),
            str(version["num_failed"]),
            interval(kl and kl["per_token"], 4),
            interval(kl and kl["per_answer"], 3),
            classes(version["classes"]),
        )
    reference = next((kl["reference"] for kl in found["versions_kl"] if kl), None)
    made.caption = (
        "KL was not measured: it needs --base-model and --temperature"
        if reference is None
        else f"KL to {reference} in nats: Schulman's k3 on the version's own answers"
    )
    return made
