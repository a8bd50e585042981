"""What all figures of a page have in common: axes, colours that everyone can tell apart, the <svg> itself.

A figure takes its ink and its grid from the page, so that it reads on light and on dark.
"""

from __future__ import annotations

import io
import re
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's colours, which people with any common colour blindness can tell apart.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
GREY = "#7F7F7F"
GRID = "#E4E4E4"
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9,
    "columnspacing": 1.2,
    "handlelength": 1.6,
    "handletextpad": 0.5,
}
_OF_THE_PAGE = {"#000000": "currentColor", GRID.lower(): "var(--line)", BLUE.lower(): "var(--blue)"}


def new_figure(width: float = 4.8, height: float = 3.2) -> Figure:
    """An empty figure, in inches. Not pyplot's: nothing is registered globally and no display is needed."""
    return Figure(figsize=(width, height), layout="constrained")


def add_axes(figure: Figure, *place: int) -> Axes:
    """Axes with a light grid; ``place`` is matplotlib's rows, columns and number."""
    return plain(figure.add_subplot(*place))


def plain(axes: Axes) -> Axes:
    """The same axes, without a box and with a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def svg_element(figure: Figure, prefix: str, description: str) -> Markup:
    """The figure as an <svg> element that takes the width it is given."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names of elements must differ between the figures of a page, and be the same on every rendering.
    ids = {old: f"{prefix}-{n}" for n, old in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(r'(\bid="|#)([^"\s;)]+)(?=["\)])', lambda m: m[1] + ids.get(m[2], m[2]), svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\n\s*", "\n", svg)
    for fixed, of_the_page in _OF_THE_PAGE.items():
        svg = svg.replace(fixed, of_the_page)
    # Letters have no colour of their own where they are black.
    opening = Markup(' role="img" fill="currentColor" aria-label="{}"').format(description)
    return Markup(svg.replace("<svg", f"<svg{opening}", 1))
