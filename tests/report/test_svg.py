import math
import re
import xml.etree.ElementTree as ET

from sharpmoe.report.svg import Curve, _colour, line_chart

NASTY = '<script>"&'


def test_a_chart_is_well_formed_and_escapes_what_it_shows() -> None:
    chart = line_chart([Curve(name=NASTY, x=[1, 2], y=[0.5, 0.25]), Curve(name="b", x=[1], y=[1])], NASTY, NASTY)
    assert "<script" not in chart
    tree = ET.fromstring(str(chart).replace("&nbsp;", " "))
    assert tree.find("figcaption").text == NASTY
    assert len(list(tree.iter("polyline"))) == 2
    assert [key.text or key.find("i").tail for key in tree.iter("span")] == [NASTY, "b"]


def test_points_lie_where_their_values_are() -> None:
    chart = str(line_chart([Curve(name="a", x=[0, 5, 10], y=[0, 1, 2])], "t"))
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', chart)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.11)
    assert y0 > y1 > y2  # larger is higher
    turned = str(line_chart([Curve(name="a", x=[0, 10], y=[0, 2])], "t", descending=True))
    first, last = re.search(r'points="([^"]+)"', turned)[1].split()
    assert float(first.split(",")[0]) > float(last.split(",")[0])


def test_a_chart_of_single_points_is_in_words() -> None:
    curves = [Curve(name=NASTY, x=[100], y=[0.48175], errors=[0.0154]), Curve(name="b", x=[50], y=[2.0])]
    tree = ET.fromstring(str(line_chart(curves, "validation_live", "flow loss")))
    said = [NASTY + ": 0.4818 ± 0.015 (optimizer step 100)", "b: 2 (optimizer step 50)"]
    assert [line.text for line in tree.iter("p")] == said
    assert tree.find("svg") is None
    both = [curves[0], Curve(name="b", x=[1, 2], y=[1, 2])]
    assert ET.fromstring(str(line_chart(both, "t"))).find("svg") is not None


def test_no_two_of_many_curves_look_alike() -> None:
    looks = {_colour(number) for number in range(24)}
    assert len(looks) == 24


def test_constant_and_undefined_values_are_drawn() -> None:
    assert 'class="c0"' in line_chart([Curve(name="a", x=[3, 4], y=[0.0, 0.0])], "t")
    assert "nan" not in line_chart([Curve(name="a", x=[1, 2, 3], y=[1.0, math.nan, 1.0], errors=[0, 0, math.nan])], "t")
    assert not line_chart([Curve(name="a", x=[1], y=[math.inf])], "t")
    assert not line_chart([], "t")


def test_error_bars_are_inside_the_plane() -> None:
    chart = str(line_chart([Curve(name="a", x=[1, 2], y=[1, 1], errors=[0.5, 2.0])], "t"))
    ends = [float(y) for y in re.findall(r'y[12]="([\d.]+)" class="error', chart)]
    assert ends
    assert all(0 <= y <= 176 for y in ends)


def test_many_curves_are_dashed_after_the_colours_end() -> None:
    chart = str(line_chart([Curve(name=str(n), x=[1, 2], y=[n, n]) for n in range(10)], "t"))
    assert chart.count("dashed") == 2 * (2 + 2)  # in curve, its two marks and legend
