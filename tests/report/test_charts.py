"""Charts: what they must show of the numbers, read back out of the SVG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from litft.report.charts import BANDS, POINTS, Line, bar_chart, line_chart, number, swatch, thin

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def titles(svg: str) -> list[str]:
    return [node.text or "" for node in parsed(svg).iter("title")]


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in parsed(svg).iter("text")]


def test_a_line_says_its_numbers_and_has_an_axis_around_them() -> None:
    svg = line_chart([Line("loss", [(1, 4.0), (2, 3.5), (3, 1.25)])], label="loss")
    assert titles(svg) == ["step 1\nloss 4", "step 2\nloss 3.5", "step 3\nloss 1.25"]
    ticks = [float(text) for text in texts(svg) if re.fullmatch(r"[\d.]+", text)]
    assert min(ticks) <= 1.25 and max(ticks) >= 4 and "optimizer step" in texts(svg)
    heights = [float(pair.split()[1]) for pair in parsed(svg).find("path").get("d")[1:].split("L")]
    assert heights == sorted(heights)  # falls: y of SVG grows downward
    assert "from 4 to 1.25" in parsed(svg).get("aria-label")


def test_what_is_not_finite_leaves_a_gap() -> None:
    points = [(1, 2.0), (2, 1.5), (3, math.nan), (4, 1.0), (5, math.inf), (6, 0.5)]
    svg = line_chart([Line("loss", points)], label="loss")
    assert len(parsed(svg).findall("path")) == 1 and len(parsed(svg).findall("circle")) == 2
    assert "nan" not in svg and "inf" not in svg
    assert line_chart([Line("loss", [(1, math.nan)])], label="loss") == ""
    assert line_chart([], label="loss") == ""


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [5e11, 1e12], [-1.0, 1.0]])
def test_any_range_has_places_on_the_chart(values: list[float]) -> None:
    svg = line_chart([Line("x", list(enumerate(values)))], label="x")
    for node in parsed(svg).iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            assert -1 <= float(node.get(name, 0)) <= 361


def test_an_outlier_makes_the_axis_logarithmic() -> None:
    svg = line_chart([Line("norm", [(i, 1.0 + i % 3) for i in range(50)] + [(50, 1e6)])], label="norm")
    assert {"1", "1000k"} <= set(texts(svg)) or {"1", "1M"} <= set(texts(svg))


def test_thinning_keeps_both_ends_what_stands_out_and_gaps() -> None:
    points = [(float(i), math.sin(i / 5000)) for i in range(100_000)]
    points[50_000] = (50_000.0, 9.0)
    points[70_000] = (70_000.0, math.nan)
    few = thin(points)
    assert len(few) <= POINTS + 2 and few[0] == points[0] and few[-1] == points[-1]
    assert points[50_000] in few and any(math.isnan(y) for _, y in few)
    svg = line_chart([Line("loss", points)], label="loss")
    assert len(svg) < 40_000 and len(titles(svg)) <= BANDS


def test_bars_have_heights_as_their_counts() -> None:
    svg = bar_chart([0, 10, 20, 31], [4, 0, 2], label="lengths", x_label="tokens")
    assert titles(svg) == ["0 to 9 tokens: 4 rows", "10 to 19 tokens: 0 rows", "20 to 30 tokens: 2 rows"]
    heights = [float(node.get("height")) for node in parsed(svg).iter("rect")]
    assert heights[1] == 0 and heights[0] == pytest.approx(2 * heights[2], abs=0.2)


def test_names_are_escaped() -> None:
    svg = line_chart([Line("<script>&", [(1, 1.0), (2, 2.0)])], label='"><script>')
    assert "<script>" not in svg and titles(svg)[0] == "step 1\n<script>& 1"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.35, "0.35"), (2e-4, "2e-4"), (1234, "1234"), (12_000, "12k"), (3_500_000, "3.5M"), (-0.5, "-0.5")],
)
def test_numbers_of_an_axis_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_the_24_lines_of_a_comparison_differ() -> None:
    assert len({str(swatch(style)) for style in range(24)}) == 24
