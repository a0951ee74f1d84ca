"""The figures: accuracy over the bytes read and over density, densities, times and speed-ups, where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..grids import grids
from ..rows import Group
from . import density, quality, time


@dataclass(frozen=True)
class Figure:
    """A picture of a leaderboard. `file`: .svg for those of many panels, which would be large as .png too; `parts`:
    what of the groups it can show; `draw`: a matplotlib figure of these."""

    file: str
    caption: str
    parts: Callable[[Sequence[Group]], list[Any]]
    draw: Callable[[list[Any]], Any]


FIGURES = (
    Figure("pareto.png", "Accuracy over bytes read per token", quality.with_panels, quality.pareto),
    Figure("time.png", "Time of a decode step over the bytes it reads, both ÷ dense", time.settings, time.over_bytes),
    Figure(
        "quality.svg",
        "Accuracy over density, variants and controls of each method",
        quality.with_curves,
        quality.curves,
    ),
    Figure(
        "density.svg",
        "Density by layer and token, and what sequences read together",
        density.with_profiles,
        density.profiles,
    ),
    Figure("grid.png", "Speed-up over batch and context", grids, time.over_batch),
    Figure("breakdown.png", "Where the time of a decode step goes", time.traced, time.bars),
)


def write(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Writes every figure that has something to show as .svg, and where its `file` is one as .png: byte for byte the
    same for the same records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    files: list[Path] = []
    for figure in FIGURES:
        if parts := figure.parts(groups):
            path = folder / figure.file
            with plt.rc_context({"svg.hashsalt": path.stem, "font.size": 9}):
                drawn = figure.draw(parts)
                if path.suffix == ".png":
                    drawn.savefig(path, dpi=100)
                    with Image.open(path) as image:  # half the bytes, and lines keep their colours
                        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
                    small.save(path, optimize=True)
                drawn.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
                plt.close(drawn)
            files += dict.fromkeys((path, path.with_suffix(".svg")))
    return files


def shown(groups: Sequence[Group]) -> list[Figure]:
    """The figures that these groups have."""
    return [figure for figure in FIGURES if figure.parts(groups)]
