"""Draws budgets, images and filter matrices, with matplotlib (the extra `plots`).

Each function draws into a new figure, or into `ax` if it is given, and returns the axes or the figure.

Example:
    >>> filter_matrix([[1, 0], [2, 1]]).figure.savefig("matrix.png")
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fheconv.analysis.budget_report import BudgetReport
from fheconv.basics.arrays import Array, ArrayLike
from fheconv.basics.errors import InvalidArgumentError, MissingExtraError

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fheconv.analysis import drawing
    from fheconv.analysis.drawing import FITS, LIMIT, OBSERVED, OVER
    from fheconv.analysis.front_picture import front as front
    from fheconv.analysis.window_picture import window as window
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.plots needs matplotlib ({error}); install it with: pip install "fheconv[plots]".'
    ) from error

# A limit more than this many times above the tallest bar is written as text: a line would flatten the bars.
FAR = 4
# A picture of a filter matrix with more entries than this shows colours only, no numbers.
WRITTEN = 400


def picture_endings() -> list[str]:
    """Return the endings of the picture files that matplotlib can write."""
    return sorted(Figure().canvas.get_supported_filetypes())


def budget(report: BudgetReport, ax: Axes | None = None) -> Axes:
    """Draw the proved range of every output channel, the range that calibration observed, and the limit.

    Ranges are in offset form, as the circuit holds them. Each bar begins at its channel's attainable minimum,
    and its height is the channel's span. The number of bits is written on top. Bars above the limit are red.

    Raises `InvalidArgumentError` if `report` is not a budget report.
    """
    _check_report(report)
    channels = [channel for layer in report.layers for channel in layer.channels]
    # One free place between layers.
    gaps = [number for number, layer in enumerate(report.layers) for _ in layer.channels]
    x = np.arange(len(channels)) + np.array(gaps)
    if ax is None:
        width = min(5.0 + 0.2 * len(channels), 14.0)
        ax = plt.subplots(figsize=(width, 4), layout="constrained")[1]
    over = [report.limit is not None and channel.offset_bits > report.limit for channel in channels]
    for colour, wanted, label in (
        (FITS, False, "proved range"),
        (OVER, True, "proved, over the limit"),
    ):
        chosen = [(at, c.span) for at, c, passes in zip(x, channels, over, strict=True) if passes is wanted]
        if chosen:
            at, spans = zip(*chosen, strict=True)
            ax.bar(at, spans, width=0.8, color=colour, label=label)
    seen = [(at, *c.observed, c.minimum) for at, c in zip(x, channels, strict=True) if c.observed]
    if seen:
        at, low, high, minimum = np.array(seen).T
        ax.bar(
            at, high - low, bottom=low - minimum, width=0.4, color=OBSERVED, label="observed in calibration"
        )
    tallest = max(channel.span for channel in channels)
    size = 9 if len(channels) <= 32 else 7
    for at, channel in zip(x, channels, strict=True):
        ax.annotate(
            f"{channel.offset_bits} bits" if len(channels) <= 12 else str(channel.offset_bits),
            (at, channel.span),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=size,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )
    top = max(tallest, 1)
    if report.limit is not None:
        steps = 2**report.limit - 1
        label = f"limit: {report.limit} bits, {steps:,} steps"
        if steps <= FAR * top:
            ax.axhline(steps, color=LIMIT, linestyle="--", label=label)
            top = max(top, steps)
        else:
            ax.plot([], [], color=LIMIT, linestyle="--", label=f"{label} (far above)")
    ax.set_ylim(0, 1.1 * top)
    # A single bar is not as wide as the picture.
    margin = max(0.7, 2.5 - x[-1] / 2)
    ax.set_xlim(-margin, x[-1] + margin)
    _label_channels(ax, report, x)
    ax.set_ylabel("steps above the channel's minimum")
    ax.set_title(f"Accumulator budget: {report.accumulator_bits} bits proved", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize=9)
    return ax


def layers(report: BudgetReport) -> Figure:
    """Draw the bits of each layer, and each layer's share of what all lookups cost.

    Bars are the widths of the accumulators, the dark part is the width that calibration observed, and dots
    are the widths of the lookups. Widths that are observed only, not proved, are hatched. Raises
    `InvalidArgumentError` if `report` is not a budget report.
    """
    _check_report(report)
    names = [layer.name for layer in report.layers]
    x = np.arange(len(names))
    figure, (bits, cost) = plt.subplots(
        2, 1, figsize=(min(4.0 + 0.7 * len(names), 14.0), 5.0), sharex=True, layout="constrained"
    )
    over = [report.limit is not None and one.accumulator_bits > report.limit for one in report.layers]
    bars = bits.bar(
        x,
        [layer.accumulator_bits for layer in report.layers],
        color=[OVER if passes else FITS for passes in over],
        label="accumulator",
    )
    for bar, layer in zip(bars, report.layers, strict=True):
        if not layer.proved:
            bar.set(hatch="//", edgecolor="white")
    seen = [
        (at, layer.observed_bits) for at, layer in zip(x, report.layers, strict=True) if layer.observed_bits
    ]
    if seen:
        bits.bar(*zip(*seen, strict=True), width=0.35, color=OBSERVED, label="observed in calibration")
    looked_up = [(at, one.lookup_bits) for at, one in zip(x, report.layers, strict=True) if one.lookup_bits]
    if looked_up:
        at, widths = zip(*looked_up, strict=True)
        bits.plot(at, widths, "o", color=LIMIT, label="looked up")
    if report.limit is not None:
        bits.axhline(report.limit, color=LIMIT, linestyle="--", label=f"limit: {report.limit} bits")
    bits.set_ylabel("bits")
    bits.set_title(f"{report.lookups:,} lookups an image", loc="left")
    bits.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    cost.bar(x, [100 * layer.cost_share for layer in report.layers], color=FITS)
    for at, layer in zip(x, report.layers, strict=True):
        if layer.lookups:
            cost.annotate(
                f"{layer.lookups:,}",
                (at, 100 * layer.cost_share),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    cost.set_ylabel("% of predicted cost")
    cost.margins(y=0.15)
    cost.set_xticks(x, names, rotation=45 if len(names) > 6 else 0)
    cost.set_xlabel("layer; the number of its lookups is on top")
    for ax in (bits, cost):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def images(pictures: Mapping[str, ArrayLike], *, common: bool = False) -> Figure:
    """Draw pictures, each (M, N) or (1, M, N), side by side under their titles.

    Data without negative values is grey. Data with negative values is red and blue, and zero is white.
    Each picture has its own scale. With `common=True`, all pictures share one scale.

    Raises `InvalidArgumentError` if there is no picture, or for a picture of another shape.
    """
    drawing.check_mapping(pictures, "pictures", "array")
    arrays = {title: drawing.as_picture(value, title) for title, value in pictures.items()}
    figure, axes = plt.subplots(
        1, len(arrays), figsize=(3.1 * len(arrays), 2.9), layout="constrained", squeeze=False
    )
    everything = np.concatenate([array.ravel() for array in arrays.values()])
    for ax, (title, array) in zip(axes[0], arrays.items(), strict=True):
        colours, scale = drawing.colours(everything if common else array)
        drawn = ax.imshow(array, cmap=colours, norm=scale, interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
        if not common:
            figure.colorbar(drawn, ax=ax, shrink=0.85)
    if common:
        figure.colorbar(drawn, ax=axes[0].tolist(), shrink=0.85)
    return figure


def filter_matrix(matrix: Any, ax: Axes | None = None, *, block: tuple[int, int] | None = None) -> Axes:
    """Draw a matrix that `fheconv.filter_matrix` returned, dense or csr.

    Zero is white, negative weights are blue, positive weights are red. `block` is (width of the image, width
    of the output). If it is given, lines separate the blocks, each of which connects one row of the image
    with one row of the output. In a small matrix the numbers are written. In a large matrix a dot shows the
    largest weight of a few neighbours.

    Raises `InvalidArgumentError` if the matrix does not have two axes, or `block` is not two positive
    integers.
    """
    matrix = drawing.as_matrix(matrix, "matrix")
    drawing.check_block(block)
    rows, columns = matrix.shape
    written = rows * columns <= WRITTEN
    if ax is None:
        height = max(0.35 * rows, 1.5) if written else 5.0
        width = min(max(height * columns / rows, 1.5), 10.0)
        ax = plt.subplots(figsize=(width + 1.5, min(height, 7.0) + 0.8), layout="constrained")[1]
    dots = drawing.dots(matrix)
    colours, scale = drawing.colours(dots, signed=True)
    edges = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    drawn = ax.imshow(dots, cmap=colours, norm=scale, interpolation="nearest", extent=edges)
    if written:
        ax.set_xticks(range(columns))
        ax.set_yticks(range(rows))
        for (row, column), value in np.ndenumerate(dots):
            if value:
                text = "white" if abs(scale(value) - 0.5) > 0.35 else "black"
                ax.text(column, row, f"{value:g}", ha="center", va="center", fontsize=8, color=text)
    else:
        ax.figure.colorbar(drawn, ax=ax, shrink=0.85, label="weight")
    if block is not None:
        width_of_line = 1.0 if written else 0.4
        for edge in range(block[0], rows, block[0]):
            ax.axhline(edge - 0.5, color="silver", linewidth=width_of_line)
        for edge in range(block[1], columns, block[1]):
            ax.axvline(edge - 0.5, color="silver", linewidth=width_of_line)
    ax.set_xlabel("output (flattened)")
    ax.set_ylabel("image (flattened)")
    ax.set_title(f"Filter matrix, {rows} × {columns}", loc="left", fontsize=10)
    return ax


def filter_matrices(
    matrices: Mapping[str, ArrayLike], *, blocks: Mapping[str, tuple[int, int]] | None = None
) -> Figure:
    """Draw filter matrices side by side under their titles. Entries have the same size in all of them.

    `blocks` may hold a `block` for each title (see `filter_matrix`).

    Raises `InvalidArgumentError` if there is no matrix, or for one that does not have two axes.
    """
    drawing.check_mapping(matrices, "matrices", "matrix")
    if blocks is not None and not isinstance(blocks, Mapping):
        raise InvalidArgumentError(f"blocks is {blocks!r}; it must be {{title: block}}.")
    for block in (blocks or {}).values():
        drawing.check_block(block)
    drawable = {title: drawing.as_matrix(value, f"The matrix {title!r}") for title, value in matrices.items()}
    tallest = max(matrix.shape[0] for matrix in drawable.values())
    entry = min(0.3, 8.0 / tallest)
    widths = [max(entry * matrix.shape[1], 1.3) for matrix in drawable.values()]
    figure, axes = plt.subplots(
        1,
        len(drawable),
        figsize=(sum(widths) + 0.6 * len(widths), entry * tallest + 1.0),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    for ax, (title, matrix) in zip(axes[0], drawable.items(), strict=True):
        filter_matrix(matrix, ax, block=None if blocks is None else blocks.get(title))
        ax.set_title(title, loc="center", fontsize=10)
        ax.set_title("", loc="left")
        ax.set_anchor("N")
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
    return figure


def _check_report(report: Any) -> None:
    if not isinstance(report, BudgetReport):
        raise InvalidArgumentError(
            f"report is {report!r}; it must be a BudgetReport, such as network.budget() returns."
        )


def _label_channels(ax: Axes, report: BudgetReport, x: Array) -> None:
    """Write the numbers of the channels under the bars, and the names of the layers."""
    numbers = [channel.channel for layer in report.layers for channel in layer.channels]
    every = 1 + (len(numbers) - 1) // 32
    ax.set_xticks(x[::every], [str(number) for number in numbers[::every]])
    ax.set_xlabel(f"output channel of {', then '.join(repr(layer.name) for layer in report.layers)}")
