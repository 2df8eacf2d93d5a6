"""What is wrong with a figure, found from where its parts are: what everybody would see, and no pixel would say."""

from __future__ import annotations

import itertools
from typing import Any

from fastgpt.plots import FONT_SIZE, WIDTH


def faults(figure: Any) -> list[str]:
    """Texts that overlap, lie outside the picture or are too small, bars that do not begin at 0, and a wrong width."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    boxes = [(text, Text.get_window_extent(text)) for text in shown_texts(figure)]  # an annotation's has its line, too
    found = [] if figure.get_figwidth() == WIDTH else [f"is {figure.get_figwidth()} inches wide"]
    for text, box in boxes:
        if text.get_fontsize() < FONT_SIZE:
            found.append(f"{text.get_text()!r} is too small")
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            found.append(f"{text.get_text()!r} is cut off")
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        if box.padded(-1).overlaps(other_box.padded(-1)):
            found.append(f"{one.get_text()!r} is over {other.get_text()!r}")
    for axes in figure.axes:
        for bar in (bar for bars in axes.containers for bar in bars.patches):
            if 0 not in (bar.get_x(), bar.get_y()):
                found.append(f"a bar begins at {bar.get_x()}, {bar.get_y()}")
    return found


def shown_texts(figure: Any) -> list[Any]:
    """The texts that are drawn: not those of ticks that lie outside the panel."""
    from matplotlib.text import Text

    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not tick.get_visible() or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [text for text in texts if text.get_visible() and text.get_text().strip() and text not in hidden]
