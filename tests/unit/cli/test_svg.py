"""Chart pieces: ticks, degenerate data, labels that fit."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve import svg

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(1.0, abs(low)):
        return
    ticks = svg.nice_ticks(low, high)
    slack = 1e-6 * (high - low) + 1e-9
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= 7


@given(st.lists(st.tuples(finite, finite), max_size=12))
def test_every_coordinate_is_finite_and_inside(points: list[tuple[float, float]]) -> None:
    marks = [svg.Point(x, y, "p", index % 9 - 2) for index, (x, y) in enumerate(points)]
    chart = svg.scatter(marks, x_title="a", y_title="b")
    assert "nan" not in chart
    assert "inf" not in chart
    for x in re.findall(r'<circle class="mark[^>]* cx="([-\d.]+)"', chart):
        assert 0 <= float(x) <= 330


def test_a_single_value_has_an_axis() -> None:
    chart = svg.line_chart([("loss", [(1, 0.5)])], x_title="step", y_title="loss")
    assert chart.count("<circle") == 1


def test_bars_are_proportional() -> None:
    chart = svg.bar_chart([("a", 10, 0), ("b", 5, 1)])
    wide, narrow = (float(w) for w in re.findall(r'<rect[^>]*width="([\d.]+)"', chart))
    assert wide == pytest.approx(2 * narrow, abs=0.2)


def test_row_labels_get_room_for_their_length() -> None:
    name = "single:something_long"
    chart = svg.bar_chart([(name, 1, 0)])
    x = float(re.search(r'<text class="tick" x="([\d.]+)"', chart)[1])  # type: ignore[index]
    assert x > 6 * len(name)


def test_a_long_name_is_shortened_to_leave_room_and_shows_whole_under_the_pointer() -> None:
    name = "policy-mine-0123456789ab0123456789ab-stage-3"
    chart = svg.interval_chart([svg.Interval(name, 0.1, -0.2, 0.4)], x_title="z", width=330)
    assert f"<title>{name}</title>policy-mine-…9ab-stage-3</text>" in chart
    start, end = re.search(r'class="whisker k0" x1="([\d.]+)" [^>]*x2="([\d.]+)"', chart).groups()  # type: ignore[union-attr]
    assert float(end) - float(start) > 60


@given(finite, st.floats(0.01, 1e6), st.integers(120, 480))
def test_the_numbers_of_an_axis_tell_a_scale_without_overlapping(
    low: float, span: float, width: int
) -> None:
    rows = [svg.Interval("a", low, low, low + span)]
    chart = svg.interval_chart(rows, x_title="z", width=width)
    places = re.findall(r'class="tick" x="([-\d.]+)" y="[\d.]+" text-anchor="middle"', chart)
    steps = [float(b) - float(a) for a, b in pairwise(places)]
    assert steps
    assert all(step > 15 for step in steps)


def test_labels_are_escaped() -> None:
    assert "<b>" not in svg.scatter([svg.Point(0, 0, "<b>")], x_title="<b>", y_title="<b>")


def test_change_too_short_for_a_head_is_a_ring() -> None:
    far = svg.Arrow((0, 0), (1, 1), "far")
    still = svg.Arrow((0.5, 0.5), (0.5, 0.5), "still")
    chart = svg.scatter((), arrows=[far, still], x_title="a", y_title="b")
    assert chart.count('class="ring') == 1
    assert chart.count('class="arrow') == 1


def test_arrow_head_ends_at_the_value_after() -> None:
    chart = svg.scatter((), arrows=[svg.Arrow((0, 0), (1, 0), "")], x_title="a", y_title="b")
    tip = re.search(r'<polygon points="([\d.]+),([\d.]+)', chart)
    start = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert tip
    assert start
    assert float(tip[1]) > float(start[1])
    assert math.isclose(float(tip[2]), float(start[2]), abs_tol=0.2)
