"""Figures with panels, drawn without pyplot: a notebook that calls a program keeps its own way to show figures."""

from __future__ import annotations

from typing import Any


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """(a matplotlib Figure of `size` inches, its axes [rows, columns]); `figure.savefig(path)` writes it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
