"""Small inline SVG charts: scatter with arrows, lines, bars and intervals.

Pure functions from numbers to markup. Colours come from CSS classes of the page (``k0`` to ``k7``,
``muted``, ``grid``, ``bound`` ...), so that a chart is readable in light and dark. All text is
escaped. Sizes are in CSS pixels; charts scale with their column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46, 14, 12, 40
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
RADIUS = 4.0
LABEL_CHARS = 24
"""Longest label of a row: ids of versions are twice as long, and tell by both of their ends."""
TICK_WIDTH = 36
"""Room that the number at a tick needs."""
MUTED = -1
"""Series in the quiet colour."""
BACKDROP = -2
"""Series that is there for orientation only."""


@dataclass(frozen=True, slots=True)
class Point:
    """A marker, for example ``Point(0.2, 1.4, "multi: how to fold a sheet", series=3)``."""

    x: float
    y: float
    label: str
    """Shown when the pointer rests on it."""
    series: int = 0
    """Colour and shape, or one of ``MUTED`` and ``BACKDROP``."""


@dataclass(frozen=True, slots=True)
class Arrow:
    """From a value before to one after, both in data units."""

    start: tuple[float, float]
    end: tuple[float, float]
    label: str
    series: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A row of an interval chart: an estimate with its bounds."""

    name: str
    value: float
    low: float
    high: float
    series: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps data to pixels along one direction."""

    low: float
    high: float
    start: float
    """Pixel of ``low``; larger than ``end`` for an axis that points up."""
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    arrows: Sequence[Arrow] = (),
    x_bound: float | None = None,
    y_bound: float | None = None,
    width: int = 330,
    height: int = 300,
) -> str:
    """Points and arrows in a plane; ``x_bound`` and ``y_bound`` are drawn as dashed lines."""
    xs = [p.x for p in points] + [v for a in arrows for v in (a.start[0], a.end[0])]
    ys = [p.y for p in points] + [v for a in arrows for v in (a.start[1], a.end[1])]
    x = _axis([*xs, *_given(x_bound)], MARGIN_LEFT, width - MARGIN_RIGHT)
    y = _axis([*ys, *_given(y_bound)], height - MARGIN_BOTTOM, MARGIN_TOP)
    body = [*_frame(x, y, x_title, y_title)]
    if x_bound is not None:
        body.append(_line(x.at(x_bound), y.start, x.at(x_bound), y.end, "bound"))
    if y_bound is not None:
        body.append(_line(x.start, y.at(y_bound), x.end, y.at(y_bound), "bound"))
    body += [marker(x.at(p.x), y.at(p.y), p.series, p.label) for p in points]
    body += [_arrow(arrow, x, y) for arrow in arrows]
    return _svg(width, height, f"{y_title} against {x_title}", body)


def line_chart(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_title: str,
    y_title: str,
    zero: bool = False,
    width: int = 480,
    height: int = 240,
) -> str:
    """One polyline per ``(name, [(x, y), ...])``, with dots; names are the page's to explain."""
    xs = [x for _, values in series for x, _ in values]
    ys = [y for _, values in series for _, y in values] + ([0.0] if zero else [])
    x = _axis(xs, MARGIN_LEFT, width - MARGIN_RIGHT, pad=0.02)
    y = _axis(ys, height - MARGIN_BOTTOM, MARGIN_TOP)
    body = [*_frame(x, y, x_title, y_title)]
    if zero and y.low <= 0 <= y.high:
        body.append(_line(x.start, y.at(0), x.end, y.at(0), "bound"))
    for index, (name, values) in enumerate(series):
        path = " ".join(f"{_n(x.at(a))},{_n(y.at(b))}" for a, b in values)
        body.append(f'<polyline class="line k{index}" points="{path}"/>')
        body += [
            f'<circle class="dot k{index}" cx="{_n(x.at(a))}" cy="{_n(y.at(b))}" r="2.4">'
            f"<title>{escape(f'{name} {b:.3f} at {a:g}')}</title></circle>"
            for a, b in values
        ]
    return _svg(width, height, f"{y_title} by {x_title}", body)


def bar_chart(bars: Sequence[tuple[str, float, int]], *, width: int = 480) -> str:
    """Horizontal bars ``(name, count, series)`` with their counts."""
    left, row, top = _label_width([shortened(name) for name, _, _ in bars]), 26, 4
    height = top + row * len(bars) + 4
    largest = max((count for _, count, _ in bars), default=0.0) or 1.0
    room = width - left - 44
    body = []
    for index, (name, count, series) in enumerate(bars):
        middle = top + row * index + row / 2
        length = room * count / largest
        body += [
            _row_label(name, left, middle),
            f'<rect class="bar {_series(series)}" x="{left}" y="{_n(middle - 8)}" rx="2" '
            f'width="{_n(max(length, 1.0))}" height="16">'
            f"<title>{escape(name)}: {count:g}</title></rect>",
            f'<text class="value" x="{_n(left + length + 6)}" y="{_n(middle + 4)}">'
            f"{count:g}</text>",
        ]
    return _svg(width, height, "counts", body)


def interval_chart(rows: Sequence[Interval], *, x_title: str, width: int = 480) -> str:
    """Estimates with intervals, one row each, around a line at zero."""
    left, row = _label_width([shortened(r.name) for r in rows]), 30
    bottom = MARGIN_TOP + row * max(len(rows), 1)
    values = [v for r in rows for v in (r.low, r.high)]
    x = _axis([*values, 0.0], left, width - MARGIN_RIGHT - 20)
    body = [*_x_ticks(x, bottom, MARGIN_TOP, x_title)]
    body.append(_line(x.at(0), MARGIN_TOP, x.at(0), bottom, "bound"))
    for index, item in enumerate(rows):
        middle = MARGIN_TOP + row * index + row / 2
        tip = f"{item.name}: {item.value:+.3f} ({item.low:+.3f} to {item.high:+.3f})"
        body += [
            _row_label(item.name, left, middle),
            _line(
                x.at(item.low), middle, x.at(item.high), middle, f"whisker {_series(item.series)}"
            ),
            marker(x.at(item.value), middle, item.series, tip),
        ]
    return _svg(width, bottom + MARGIN_BOTTOM, x_title, body)


def marker(x: float, y: float, series: int, label: str = "") -> str:
    """A marker whose shape repeats what its colour says."""
    r = RADIUS
    shape = SHAPES[series % len(SHAPES)] if series >= 0 else "circle"
    points = {
        "triangle": [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
        "cross": [
            (-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4),
            (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4),
        ],
    }.get(shape)  # fmt: skip
    title = f"<title>{escape(label)}</title>" if label else ""
    style = f'class="mark {_series(series)}"'
    if points is None:
        return f'<circle {style} cx="{_n(x)}" cy="{_n(y)}" r="{r}">{title}</circle>'
    corners = " ".join(f"{_n(x + r * a)},{_n(y + r * b)}" for a, b in points)
    return f'<polygon {style} points="{corners}">{title}</polygon>'


def shortened(name: str) -> str:
    """``name``, without its middle where it is too long for a row's label."""
    if len(name) <= LABEL_CHARS:
        return name
    tail = LABEL_CHARS // 2 - 1
    return f"{name[: LABEL_CHARS - tail - 1]}…{name[-tail:]}"


def _row_label(name: str, left: float, middle: float) -> str:
    """The label of a row, left of its plot; the whole name shows under the pointer."""
    return (
        f'<text class="tick" x="{left - 8}" y="{_n(middle + 4)}" text-anchor="end">'
        f"<title>{escape(name)}</title>{escape(shortened(name))}</text>"
    )


def swatch(series: int) -> str:
    """A marker on its own, for legends."""
    size = 'width="14" height="14"'
    return f'<svg class="swatch" {size} aria-hidden="true">{marker(7, 7, series)}</svg>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between ``low`` and ``high``, about ``count`` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _axis(values: Sequence[float], start: float, end: float, pad: float = 0.07) -> Axis:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    room = pad * (high - low)
    return Axis(low - room, high + room, start, end)


def _frame(x: Axis, y: Axis, x_title: str, y_title: str) -> list[str]:
    parts = _x_ticks(x, y.start, y.end, x_title)
    for tick in nice_ticks(y.low, y.high):
        level = y.at(tick)
        parts.append(_line(x.start, level, x.end, level, "grid"))
        parts.append(
            f'<text class="tick" x="{_n(x.start - 6)}" y="{_n(level + 4)}" text-anchor="end">'
            f"{tick:g}</text>"
        )
    middle = (y.start + y.end) / 2
    parts.append(
        f'<text class="axis" x="12" y="{_n(middle)}" text-anchor="middle" '
        f'transform="rotate(-90 12 {_n(middle)})">{escape(y_title)}</text>'
    )
    return parts


def _x_ticks(x: Axis, bottom: float, top: float, title: str) -> list[str]:
    parts = []
    for tick in _fitting_ticks(x):
        place = x.at(tick)
        parts.append(_line(place, bottom, place, top, "grid"))
        parts.append(
            f'<text class="tick" x="{_n(place)}" y="{_n(bottom + 16)}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="axis" x="{_n(middle)}" y="{_n(bottom + 34)}" text-anchor="middle">'
        f"{escape(title)}</text>"
    )
    return parts


def _fitting_ticks(x: Axis) -> list[float]:
    """Two ticks at least, since one alone tells no scale, and otherwise as many as have room."""
    room = max(1, min(5, int((x.end - x.start) / TICK_WIDTH)))
    tried = (nice_ticks(x.low, x.high, count) for count in range(room, 6))
    return next((ticks for ticks in tried if len(ticks) > 1), [])


def _arrow(arrow: Arrow, x: Axis, y: Axis) -> str:
    """A line with a head of fixed size; a change too short for a head is a ring."""
    x1, y1 = x.at(arrow.start[0]), y.at(arrow.start[1])
    x2, y2 = x.at(arrow.end[0]), y.at(arrow.end[1])
    length = math.hypot(x2 - x1, y2 - y1)
    title = f"<title>{escape(arrow.label)}</title>"
    kind = _series(arrow.series)
    if length < 7:
        return f'<circle class="ring {kind}" cx="{_n(x2)}" cy="{_n(y2)}" r="4">{title}</circle>'
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    bx, by = x2 - 8 * dx, y2 - 8 * dy
    head = (
        f"{_n(x2)},{_n(y2)} {_n(bx - 4 * dy)},{_n(by + 4 * dx)} {_n(bx + 4 * dy)},{_n(by - 4 * dx)}"
    )
    return (
        f'<g class="arrow {kind}">{title}'
        f'<circle cx="{_n(x1)}" cy="{_n(y1)}" r="2.6"/>'
        f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(bx)}" y2="{_n(by)}"/>'
        f'<polygon points="{head}"/></g>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
        f'aria-label="{escape(title)}" style="max-width:{_n(width)}px">{"".join(body)}</svg>'
    )


def _label_width(names: Sequence[str]) -> int:
    """Room for row labels at 12 px, which average under 7 px a character."""
    return 18 + 7 * max((len(name) for name in names), default=0)


def _series(series: int) -> str:
    if series >= 0:
        return f"k{series % 8}"
    return "muted" if series == MUTED else "muted backdrop"


def _given(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
