"""The style of every picture: labels that do not overlap, lines told apart without colours, and nothing left behind."""

from __future__ import annotations

import io
import math
import random
import subprocess
import sys
from itertools import pairwise

import pytest

from fastgpt import plots
from figures import faults, shown_texts

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([-3.0], [0.0]),
        ([12.0], [10.0]),
        ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),
        ([5.0, 5.0], [4.0, 6.0]),
        ([9.5, 2.0, 9.0], [10.0, 2.0, 8.0]),
        ([4.0, 5.5, 6.0], [25 / 6 - 1, 25 / 6 + 1, 25 / 6 + 3]),  # around their mean, 5.17
        ([0.0, 0.1, 2.5], [0.0, 2.0, 4.0]),
    ],
)
def test_places_are_moved_apart_no_farther_than_they_must(wanted, expected):
    assert plots.apart(wanted, 2.0, 0.0, 10.0) == pytest.approx(expected)


def test_places_keep_their_order_and_distance():
    draw = random.Random(0)
    for n in range(1, 30):
        wanted = [draw.uniform(0, 100) for _ in range(n)]
        places = plots.apart(wanted, 3.0, 0.0, 100.0)
        in_order = [places[i] for i in sorted(range(n), key=lambda i: wanted[i])]
        assert all(b - a >= 3.0 - 1e-9 for a, b in pairwise(in_order))
        assert in_order[0] >= 0.0 and in_order[-1] <= 100.0 + 1e-9


def test_lines_are_told_apart_without_their_colours():
    styles = [(style["marker"], style["linestyle"]) for style in map(plots.line_style, range(32))]
    assert len(set(styles)) == 32
    assert len({plots.line_style(n)["color"] for n in range(len(plots.PALETTE))}) == len(plots.PALETTE)


@plots.styled
def _ten_lines(height: float):
    figure, [[axes]] = plots.panels(height)
    for number in range(10):
        axes.plot([0, 1, 2], [3, 2, 1 + number / 100], label=f"line ${number}", **plots.line_style(number))
    axes.plot([0, 1], [2, math.nan], label="ends early")
    axes.plot([0], [math.nan], label="is nowhere")
    plots.label_ends(axes)
    return figure


def test_labels_at_the_ends_of_lines_do_not_overlap():
    figure = _ten_lines(3.4)
    assert faults(figure) == []
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [*(f"line ${n}" for n in range(10)), "ends early"]


@plots.styled
def _points(n: int):
    figure, [[axes]] = plots.panels(3.0)
    draw = random.Random(1)
    points = [((draw.gauss(0, 1), draw.gauss(0, 1)), f"${i}", plots.INK) for i in range(n)]
    axes.plot([x for (x, _), *_ in points], [y for (_, y), *_ in points], "o")
    plots.label_points(axes, points)
    return figure


@pytest.mark.parametrize("n", [1, 60, 200])
def test_labels_of_points_do_not_overlap(n):
    figure = _points(n)
    assert faults(figure) == []
    written = [text.get_text() for text in figure.axes[0].texts]
    assert "$0" in written, "the first ones have the choice"
    assert len(written) == n if n < 100 else 50 < len(written) < n, "what finds no place is left out"


def test_a_picture_is_small_and_1200_pixels_wide():
    from PIL import Image

    data = plots.png(_ten_lines(3.0))
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and image.size == (1200, 600) and len(data) < 60_000
    assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_a_letter_that_the_font_lacks_is_no_warning(recwarn):
    figure = _points(1)
    figure.axes[0].set_title("\u2403")
    plots.styled(plots.label_points)(figure.axes[0], [((0.0, 0.0), "\u2403", plots.INK)])
    assert plots.png(figure) and not recwarn.list


def test_settings_of_other_figures_are_neither_used_nor_changed():
    import matplotlib

    with matplotlib.rc_context({"font.size": 3.0, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        figure = _ten_lines(3.4)
        assert faults(figure) == [] and {text.get_fontsize() for text in shown_texts(figure)} == {plots.FONT_SIZE}
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_by_what_draws_and_pyplot_by_nothing():
    code = (
        "import sys, fastgpt.plots as p, fastgpt.report, fastgpt.training.run_folder as r\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.png(r.loss_figure('run', []))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_an_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotError, match=r"pip install 'fastgpt-kernels\[plot\]'"):
        _ten_lines(3.0)


def test_what_is_above_a_panel_is_hollow_on_its_edge():
    @plots.styled
    def draw():
        _, [[axes]] = plots.panels(3.0)
        told = plots.plot_up_to(axes, 2.0, [1, 2, 3, 4], [1.0, 5.0, math.nan, 2.0], label="a", **plots.line_style(0))
        return axes, told, plots.plot_up_to(axes, 2.0, [1], [2.0], label="b", **plots.line_style(1))

    axes, told, is_told_of_the_other = draw()
    line, hollow, other = axes.lines
    assert told and not is_told_of_the_other and other.get_ydata().tolist() == [2.0]
    assert [y for y in line.get_ydata() if not math.isnan(y)] == [1.0, 2.0]
    assert hollow.get_xydata().tolist() == [[2, 2.0], [3, 2.0]] and hollow.get_markerfacecolor() == "white"
