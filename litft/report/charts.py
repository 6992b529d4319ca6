"""Charts as SVG text: no script, no request, colours from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 34
POINTS = 400
"""Points a line is thinned to: about one for each pixel of a chart."""
BANDS = 80
"""Places of a chart that say their numbers when pointed at."""
COLOURS = 8
"""Of the style sheet (Okabe and Ito's, told apart by the colour-blind); further lines are dashed."""
FLAT = 50.0
"""How often the median the largest value is from which a logarithmic axis shows more."""

Point = tuple[float, float]


@dataclass
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend and the numbers.
        points: x and y, in the order of x; a y that is no finite number leaves a gap.
        style: which colour and dashes.
        dots: mark each point, where there are few.
    """

    name: str
    points: list[Point]
    style: int = 0
    dots: bool = False


def line_chart(lines: Sequence[Line], *, label: str, x_label: str = "optimizer step") -> Markup:
    """Lines over a common axis.

    Args:
        lines: at least one with a finite point.
        label: what the chart shows, for who hears the page.
        x_label: under the axis.

    Returns:
        An `<svg>` that scales with its container.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return Markup("")
    values = sorted(y for _, y in finite)
    low_x, high_x = min(x for x, _ in finite), max(x for x, _ in finite)
    logarithmic = values[0] > 0 and values[-1] > FLAT * values[len(values) // 2]
    ticks = _log_ticks(values[0], values[-1]) if logarithmic else _ticks(values[0], values[-1], 4)
    scale = math.log10 if logarithmic else float
    x_of = _Scale(low_x, high_x, LEFT, WIDTH - RIGHT)
    y_of = _Scale(scale(min(ticks[0], values[0])), scale(max(ticks[-1], values[-1])), HEIGHT - BOTTOM, TOP)
    parts = [_y_axis([(y_of(scale(tick)), number(tick)) for tick in ticks])]
    x_ticks = [tick for tick in _ticks(low_x, high_x, 6, whole=True) if low_x <= tick <= high_x]
    parts.append(_x_axis([(x_of(tick), number(tick)) for tick in x_ticks], x_label))
    for line in lines:
        for run in _stretches(thin(line.points)):
            places = [(x_of(x), y_of(scale(y))) for x, y in run]
            parts.append(_path(places, line))
    parts += _bands(lines, x_of)
    return _svg(parts, f"{label}, from {number(finite[0][1])} to {number(finite[-1][1])}")


def bar_chart(edges: Sequence[int], counts: Sequence[int], *, label: str, x_label: str) -> Markup:
    """A histogram; bars are equally wide, whatever their range.

    Args:
        edges: of the ranges, one more than `counts`.
        counts: in each range.
        label: what the chart shows, for who hears the page.
        x_label: under the axis.

    Returns:
        An `<svg>` that scales with its container.
    """
    ticks = _ticks(0, max(counts), 4, whole=True)
    y_of = _Scale(0, max(ticks[-1], *counts), HEIGHT - BOTTOM, TOP)
    x_of = _Scale(0, len(counts), LEFT, WIDTH - RIGHT)
    every = -(-len(edges) // 6)
    shown = [(x_of(i), number(edges[i])) for i in range(0, len(edges), every)]
    parts = [_y_axis([(y_of(tick), number(tick)) for tick in ticks]), _x_axis(shown, x_label)]
    for i, count in enumerate(counts):
        left, right, top = x_of(i) + 1, x_of(i + 1) - 1, y_of(count)
        said = f"{edges[i]:,} to {edges[i + 1] - 1:,} tokens: {count:,} row{'s' * (count != 1)}"
        parts.append(
            f'<g class="bar"><rect class="f0" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"/><title>{escape(said)}</title></g>'
        )
    return _svg(parts, label)


def swatch(style: int) -> Markup:
    """A short piece of a line, for a legend."""
    line = f'<line class="{_classes(style)}" x1="1" y1="6" x2="27" y2="6"/>'
    return Markup(f'<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{line}</svg>')


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most about `most` of the points, such that what stands out stays.

    Of each stretch of the line its lowest and its highest point are kept, and of the whole line both ends.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / (most - 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        if len(finite) < len(stretch):  # a gap stays a gap
            kept.add(next(i for i in stretch if not math.isfinite(points[i][1])))
    return [points[i] for i in sorted(kept)]


def number(value: float) -> str:
    """A number as short as an axis needs it: 12k, 0.35, 2e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            unit = 1e3 if name == "k" else unit
            return f"{value / unit:.4g}{name}"
    if size < 1e-2:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


class _Scale:
    """From a range of numbers to one of the chart; a single number lies in the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.size, self.start, self.room = low, high - low, start, end - start

    def __call__(self, value: float) -> float:
        return self.start + self.room * ((value - self.low) / self.size if self.size else 0.5)


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers from `low` or just below up to `high` or just above, about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around a range, at most about six."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = -(-(last - first) // 6) or 1
    return [10.0**power for power in range(first, last + every, every)]


def _stretches(points: Sequence[Point]) -> list[list[Point]]:
    """The line between its gaps."""
    found: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def _path(places: Sequence[Point], line: Line) -> str:
    drawn = ""
    if len(places) > 1:
        way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        drawn = f'<path class="{_classes(line.style)}" d="{way}"/>'
    if len(places) == 1 or (line.dots and len(places) <= 40):
        colour = f"f{line.style % COLOURS}"
        drawn += "".join(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    return drawn


def _classes(style: int) -> str:
    return f"line s{style % COLOURS} d{style // COLOURS % 3}"


def _bands(lines: Sequence[Line], x_of: _Scale) -> list[str]:
    """Upright stripes over the chart that say the lines' numbers there, by way of their titles."""
    steps = sorted({x for line in lines for x, y in line.points if math.isfinite(y)})
    size = -(-len(steps) // BANDS)
    firsts = steps[::size]
    middles = [(x_of(a) + x_of(b)) / 2 for a, b in itertools.pairwise(firsts)]
    bounds = [LEFT, *middles, WIDTH - RIGHT]
    values = [dict(line.points) for line in lines]
    found = []
    for i, step in enumerate(firsts):
        inside = steps[i * size : (i + 1) * size]
        said = [f"step {step:g}"]
        for line, known in zip(lines, values, strict=True):
            value = next((known[x] for x in inside if math.isfinite(known.get(x, math.nan))), None)
            said += [f"{line.name} {value:.5g}"] if value is not None else []
        width = bounds[i + 1] - bounds[i]
        title = escape("\n".join(said))
        found.append(
            f'<rect class="band" x="{bounds[i]:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{title}</title></rect>'
        )
    return found


def _y_axis(ticks: Sequence[tuple[float, str]]) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        for y, text in ticks
    )


def _x_axis(ticks: Sequence[tuple[float, str]], label: str) -> str:
    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = [f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{end}" y2="{bottom}"/>']
    for x, text in ticks:
        anchor = "end" if x > end - 12 else "middle"
        drawn.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{text}</text>')
    drawn.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>')
    return "".join(drawn)


def _svg(parts: Sequence[str], label: str) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return Markup(head + "".join(parts) + "</svg>")


__all__ = ["COLOURS", "Line", "bar_chart", "line_chart", "number", "swatch", "thin"]
