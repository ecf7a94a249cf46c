"""One figure, drawn twice: for light and for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

MANY_KINDS = 12
SIZE = (4.8, 3.1)
DPI = 150

# Okabe and Ito's palette, which colour-blind readers can tell apart, lightened for dark pages.
COLOURS = {
    "light": ("#0072b2", "#b35900", "#007d5a", "#a8457d", "#5d5d5d", "#8a6d00", "#56b4e9"),
    "dark": ("#6cc0f5", "#f0a04b", "#46c8a2", "#e79ac3", "#b8b8b8", "#e8cf5a", "#a5d8ff"),
}
INK = {"light": "#1b1f24", "dark": "#e6e8eb"}
PAPER = {"light": "#ffffff", "dark": "#1c2026"}
MARKERS = ("o", "s", "^", "D", "x", "v", "P")


@dataclass(frozen=True)
class Plot:
    """A figure: file name, title, what a reader who cannot see it should know, two PNGs."""

    name: str
    title: str
    text: str
    light: bytes
    dark: bytes


Draw = Callable[[Axes, Sequence[str]], None]


def draw(name: str, title: str, text: str, paint: Draw, size: tuple[float, float] = SIZE) -> Plot:
    """Draw one figure for both kinds of page."""
    images = [_image(paint, theme, size) for theme in ("light", "dark")]
    return Plot(name, title, text, *images)


def _image(paint: Draw, theme: str, size: tuple[float, float]) -> bytes:
    ink, paper = INK[theme], PAPER[theme]
    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), paper),
        "axes.edgecolor": ink,
        "axes.grid": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "text.parse_math": False,
    }
    with rc_context(style):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot(), COLOURS[theme])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def logarithmic(axes: Axes, *names: str) -> None:
    """Make axes logarithmic where they hold positive data.

    Ticks are plain text, for TeX is off: names of models may hold what it reads.
    """
    for name in names:
        if not math.isfinite(getattr(axes.dataLim, f"minpos{name}")):
            continue
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
