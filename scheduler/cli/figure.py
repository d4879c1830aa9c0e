"""What all pictures drawn by matplotlib share. matplotlib is an optional extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from loractl.common.errors import LoractlError, UsageError


def require_matplotlib(command: str) -> None:
    """Raise LoractlError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LoractlError(f"loractl {command} --plot needs matplotlib", "pip install 'loractl[plot]'")


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG. Raises UsageError if the file can't be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    try:
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png")
    except OSError as error:
        raise UsageError(f"--plot {path} can't be written: {error.strerror}", "choose another folder") from error


def without_box(axes: Any) -> None:
    """Draw only the sides of the axes' frame that are read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
