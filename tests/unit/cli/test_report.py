"""The report page: well formed, self-contained, escaped, with every section and chart."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mora_serve.report import class_series, render, write_report
from mora_serve.run_summary import summarise
from tests.unit.cli.made_up_run import DIMENSIONS, made_up_run

VOID = {"meta", "br", "circle", "line", "rect", "polygon", "polyline", "hr"}


class Page(HTMLParser):
    """Counts elements, checks nesting and collects text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.classes: list[str] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.classes += (dict(attrs).get("class") or "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert [tag] == self.open[-1:], f"</{tag}> closes another element"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def html() -> str:
    return render(summarise(made_up_run()))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_needs_nothing_from_outside(html: str, page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "use"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "action"} & {name for name, _ in page.attributes}
    assert "@import" not in html
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_prompt_text_is_escaped_everywhere(html: str, page: Page) -> None:
    assert "<script" not in html
    assert "alert('x')" in page.text


def test_every_section_is_there(page: Page) -> None:
    for title in (
        "Classes", "Reward planes", "Rewriting", "Training", "Rewards before and after training",
        "Accepted rewrites", "Caveats", "Configuration",
    ):  # fmt: skip
        assert title in page.text


def test_a_plane_for_each_pair_of_dimensions_twice_and_both_curves(page: Page) -> None:
    # 3 planes by class, 3 with arrows, class counts, verdicts, loss, margin, intervals
    assert page.classes.count("chart") == 11


def test_planes_show_measured_prompts_and_arrows_accepted_rewrites(page: Page) -> None:
    assert page.classes.count("backdrop") == 3 * 5
    assert page.classes.count("arrow") == 3


def test_arrow_is_drawn_from_before_to_after() -> None:
    summary = summarise(made_up_run())
    html = render(summary)
    arrow = re.search(r'<g class="arrow k0">.*?<circle cx="([\d.]+)".*?x2="([\d.]+)"', html)
    assert arrow
    # helpful falls from 1.2 to 1.1, so the arrow of the first plane points to the left
    assert float(arrow[2]) < float(arrow[1])


def test_noise_is_called_noise(page: Page) -> None:
    assert "higher" in page.text
    assert "within noise" in page.text


def test_dark_and_light_are_both_styled(html: str) -> None:
    assert "prefers-color-scheme: dark" in html


def test_every_series_class_used_has_a_style(html: str, page: Page) -> None:
    used = {name for name in page.classes if re.fullmatch(r"k\d|muted|backdrop", name)}
    for name in used:
        assert re.search(rf"\.{name}\b", html.partition("</style>")[0])


def test_run_without_accepted_rewrites_and_without_metrics_renders() -> None:
    summary: dict[str, Any] = summarise(made_up_run())
    for prompt in summary["prompts"]:
        prompt["rewrite"] = None
    summary["training"]["curve"] = []
    text = Page(render(summary)).text
    assert "No rewrite was accepted" in text
    assert "logged no metrics" in text


def test_any_number_of_dimensions_renders() -> None:
    summary: dict[str, Any] = summarise(made_up_run())
    summary["dimensions"] = ["helpful", "harmless"]
    assert Page(render(summary)).classes.count("chart") == 7


def test_single_classes_differ_in_colour_and_shape() -> None:
    series = [class_series(f"single:{name}", DIMENSIONS) for name in DIMENSIONS]
    assert len({*series, class_series("multi", DIMENSIONS)}) == 4
    assert class_series("flat", DIMENSIONS) < 0


def test_page_is_written_as_utf8(tmp_path: Path) -> None:
    write_report(summarise(made_up_run()), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes().startswith(b"<!doctype html>")
