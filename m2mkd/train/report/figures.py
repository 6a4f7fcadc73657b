"""The report's figures, drawn with matplotlib as SVG whose colours follow the page's theme.

Every colour here is a placeholder that becomes a CSS variable of the page, so one picture serves
light and dark. Letters: C classes, E experts.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from m2mkd.train.report.record import Curve

# Placeholder -> CSS variable.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505", "#0a0606")
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _PAPER: "--paper",
    **{color: f"--s{i + 1}" for i, color in enumerate(SERIES)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of classes may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


class Plot:
    """One figure in the making; `svg` holds its text once the `plotting` block has ended."""

    def __init__(self, figure: Figure, axes: Any) -> None:
        self.figure = figure
        self.axes = axes
        self.svg = ""


@contextmanager
def plotting(
    label: str, width: float, height: float, *, rows: int = 1, ratios: Sequence[float] | None = None
) -> Iterator[Plot]:
    """Opens a figure of `width` x `height` inches; `label` describes it to screen readers."""
    style: Any = {**_STYLE, "svg.hashsalt": label}
    with mpl.rc_context(style), warnings.catch_warnings():
        # The browser draws the text, with fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        grid = {"height_ratios": ratios} if ratios else None
        plot = Plot(figure, figure.subplots(rows, 1, sharex=rows > 1, gridspec_kw=grid))
        yield plot
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plot.svg = _themed(buffer.getvalue(), label)


def loss_curves(title: str, curves: Sequence[Curve], *, color: str, y_limits: Any = None) -> str:
    """Training loss against steps; several curves are seeds."""
    with plotting(f"Training loss of {title}", 3.1, 2.15) as plot:
        axes: Axes = plot.axes
        for curve in curves:
            axes.plot(
                curve.steps, curve.values, color=color, alpha=0.9 if len(curves) == 1 else 0.6
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if y_limits is not None:
            axes.set_ylim(*y_limits)
    return plot.svg


def accuracy_curves(
    label: str, series: Sequence[tuple[str, str, Sequence[Curve]]], lines: dict[str, float]
) -> str:
    """Validation accuracy by epoch.

    Args:
        label: What the figure shows.
        series: Name, colour and one curve per seed.
        lines: Named levels, drawn dashed.
    """
    with plotting(label, 5.4, 3.3) as plot:
        axes: Axes = plot.axes
        for name, color, curves in series:
            for i, curve in enumerate(curves):
                axes.plot(
                    curve.steps,
                    curve.values,
                    color=color,
                    marker="o",
                    markersize=3,
                    alpha=0.9 if len(curves) == 1 else 0.65,
                    label=name if i == 0 else None,
                )
        for name, level in lines.items():
            axes.axhline(level, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        _legend_above(axes, columns=2)
    return plot.svg


def accuracy_dots(rows: Sequence[tuple[str, str, Sequence[float], float]]) -> str:
    """Accuracies as dots, one row each.

    Args:
        rows: Name, colour, one accuracy per seed, and half the width of the range within which
            chance alone could move the mean, in points.
    """
    with plotting("Accuracy of every network", 5.4, 0.75 + 0.36 * len(rows)) as plot:
        axes: Axes = plot.axes
        for y, (_, color, values, half) in enumerate(rows):
            mean = float(np.mean(values))
            axes.plot([mean - half, mean + half], [y, y], color=color, linewidth=5, alpha=0.25)
            axes.plot(values, [y] * len(values), "o", color=color, markersize=6, alpha=0.75)
            if len(values) > 1:
                axes.plot([mean], [y], "|", color=_INK, markersize=13, markeredgewidth=1.8)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("top-1 accuracy, %")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return plot.svg


def hybrids(teacher: Any, student: Any, lines: dict[str, float]) -> str:
    """Accuracy of the meta model with one module of teacher or student in it.

    Args:
        teacher: [seeds, modules], per cent.
        student: The same.
        lines: Named levels, drawn dashed.
    """
    with plotting("Accuracy of the hybrids", 5.4, 3.3) as plot:
        axes: Axes = plot.axes
        both = (
            ("with a teacher module", SERIES[1], "s"),
            ("with a student module", SERIES[0], "o"),
        )
        for (name, color, marker), values in zip(both, (teacher, student), strict=True):
            matrix = np.asarray(values, dtype=float)
            x = np.arange(matrix.shape[1]) + (-0.12 if marker == "s" else 0.12)
            for i, row in enumerate(matrix):
                axes.plot(
                    x,
                    row,
                    marker,
                    color=color,
                    markersize=6,
                    alpha=0.9 if len(matrix) == 1 else 0.65,
                    label=f"meta model {name}" if i == 0 else None,
                )
        styles = ((0, (4, 3)), (0, (1, 2)))
        for (name, level), style in zip(lines.items(), styles, strict=False):
            axes.axhline(level, color=_MUTED, linestyle=style, linewidth=1.4, label=name)
        count = np.asarray(student).shape[1]
        axes.set_xticks(range(count), [str(i) for i in range(count)])
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_xlabel("module")
        axes.set_ylabel("top-1 accuracy, %")
        _legend_above(axes, columns=2)
    return plot.svg


def reliability(bins: Sequence[Sequence[float]]) -> str:
    """Reliability diagram: accuracy by confidence, and how many images have that confidence."""
    width = 1.0 / len(bins)
    left = np.arange(len(bins)) * width
    counts, _, accuracy = np.asarray(bins, dtype=float).T
    has_any = counts > 0
    with plotting("Reliability diagram", 4.6, 3.9, rows=2, ratios=(3.2, 1)) as plot:
        upper, lower = plot.axes
        upper.bar(
            left[has_any],
            accuracy[has_any],
            width * 0.9,
            align="edge",
            color=SERIES[0],
            alpha=0.85,
            label="accuracy",
        )
        upper.plot(
            [0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), label="perfectly calibrated"
        )
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        upper.legend(loc="upper left")
        share = counts / max(1.0, counts.sum())
        lower.bar(left, share, width * 0.9, align="edge", color=_MUTED, alpha=0.6)
        lower.set(xlabel="confidence", ylabel="images", ylim=(0, max(share.max() * 1.15, 1e-3)))
        lower.yaxis.set_major_locator(MaxNLocator(3))
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return plot.svg


def confusion(matrix_CC: Any, names: Sequence[str]) -> str:
    """Confusion matrix, rows true classes, as shares of each row in per cent."""
    counts = np.asarray(matrix_CC, dtype=float)
    shares = counts / np.maximum(1.0, counts.sum(axis=1, keepdims=True))
    size = min(6.4, 2.2 + 0.36 * len(names))
    has_text = len(names) <= 16
    with plotting("Confusion matrix", size, size * 0.94) as plot:
        axes: Axes = plot.axes
        for (i, j), share in np.ndenumerate(shares):
            if share <= 0:
                continue
            color = SERIES[0] if i == j else SERIES[1]
            # Square roots: a confusion of a few per cent must still be seen.
            _cell(axes, i, j, color, float(np.sqrt(share)))
            if has_text and share >= 0.005:
                ink = _PAPER if share > 0.3 else _INK
                axes.text(
                    j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink
                )
        _frame_cells(axes, len(names), len(names))
        shown = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
        size_of_text = 9 if has_text else 6.5
        rotation = 0 if max(map(len, shown)) <= 2 else 90
        axes.set_xticks(range(len(names)), shown, rotation=rotation, fontsize=size_of_text)
        axes.set_yticks(range(len(names)), shown, fontsize=size_of_text)
        axes.set(xlabel="predicted", ylabel="true")
    return plot.svg


def expert_load(layers: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Share of the routed tokens that each expert of each layer takes.

    Args:
        layers: Name and shares by expert, [E], summing to 1.
    """
    most = max(len(shares) for _, shares in layers)
    has_text = most <= 16
    width = min(9.5, 1.6 + (0.52 if has_text else 0.2) * most)
    with plotting("Load of the experts", max(3.4, width), 0.8 + 0.34 * len(layers)) as plot:
        axes: Axes = plot.axes
        for i, (_, shares) in enumerate(layers):
            for j, share in enumerate(shares):
                relative = share * len(shares)  # 1: the even share
                _cell(axes, i, j, SERIES[0], min(1.0, 0.06 + 0.42 * relative))
                if has_text:
                    ink = _PAPER if relative > 1.35 else _INK
                    axes.text(
                        j,
                        i,
                        f"{100 * share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8.5,
                        color=ink,
                    )
        _frame_cells(axes, len(layers), most)
        axes.set_yticks(range(len(layers)), [name for name, _ in layers])
        step = max(1, most // 16)
        axes.set_xticks(range(0, most, step), [str(i) for i in range(0, most, step)])
        axes.set_xlabel("expert")
    return plot.svg


def severity_curves(series: Sequence[tuple[str, str, Sequence[float]]], clean: float) -> str:
    """Accuracy against the severity of corruptions, 0 being clean images."""
    with plotting("Accuracy under corruption", 5.4, 3.3) as plot:
        axes: Axes = plot.axes
        for i, (name, color, values) in enumerate(series):
            is_mean = name == "mean"
            axes.plot(
                range(len(values) + 1),
                [clean, *values],
                color=_INK if is_mean else color,
                linewidth=2.6 if is_mean else 1.2,
                # There are fewer colours than kinds.
                linestyle="--" if i >= len(SERIES) and not is_mean else "-",
                alpha=1.0 if is_mean else 0.8,
                marker="o",
                markersize=3,
                label=name,
            )
        axes.set_xlabel("severity")
        axes.set_ylabel("top-1 accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend_above(axes, columns=3)
    return plot.svg


def _cell(axes: Axes, row: int, column: int, color: str, alpha: float) -> None:
    axes.add_patch(
        Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, color=color, alpha=alpha, linewidth=0)
    )


def _frame_cells(axes: Axes, rows: int, columns: int) -> None:
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(labelcolor=_INK)


def _legend_above(axes: Axes, *, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, fontsize=8.5, borderaxespad=0.2
    )


def _themed(svg: str, label: str) -> str:
    """Cuts an SVG document down to an element for a page, with the page's colours."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # matplotlib numbers ids from 1 in every figure; only those that something refers to may stay.
    wanted = set(re.findall(r"#([\w.-]+)[\")]", svg))
    svg = re.sub(
        r' id="([^"]*)"', lambda found: found.group(0) if found.group(1) in wanted else "", svg
    )
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    size = float(width.group(1)) * 4 / 3 if width else 400.0
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    head = f'<svg role="img" aria-label="{label}" style="max-width:{size:.0f}px"'
    return re.sub(r"\n\s*", "\n", svg.replace("<svg", head, 1))
