"""Pictures of budgets, images and filter matrices, with matplotlib (the extra `plots`).

Each function draws into a figure of its own, or into `ax`, and returns what it drew on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse

from fheconv.arrays import Array, as_array
from fheconv.budget import BudgetReport
from fheconv.config import check_integer
from fheconv.errors import InvalidArgumentError, MissingExtraError
from fheconv.tuning import TuneResult

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.plots needs matplotlib ({error}); install it with: pip install "fheconv[plots]".'
    ) from error

FITS, OVER, OBSERVED, LIMIT = "#a9c8e8", "#f2b0a6", "#1f4e79", "#a01c1c"
# matplotlib's own red and blue maps have a grey middle; here zero is white.
SIGNED = ("#053061", "#4393c3", "#ffffff", "#d6604d", "#67001f")
# A limit that many times above the tallest bar is written down, because drawn it would flatten the bars.
FAR = 4
# A picture of the filter matrix with more entries than this shows colours only, no numbers.
WRITTEN = 400
# The most rows and columns of dots in a picture of the filter matrix: its lines are one entry thin, and
# would vanish if a larger one were only scaled down.
DOTS = 250


def picture_endings() -> list[str]:
    """Return the endings of the picture files that matplotlib can write."""
    return sorted(Figure().canvas.get_supported_filetypes())


def budget(report: BudgetReport, ax: Axes | None = None) -> Axes:
    """Draw the proved range of every output channel, what calibration observed of it, and the limit.

    Ranges are in offset form, as the circuit holds them: each bar stands on its channel's attainable
    minimum, its height is the greatest value the channel's accumulator takes there, and the number of
    bits is written on top. Bars that pass the limit are red.

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
    """Draw each layer's bits, and its share of what all lookups cost, of a network's budget.

    Bars are the widths of the accumulators, dark what calibration observed, dots the bits that are looked up.
    Widths that are observed only, not proved, are hatched. Raises `InvalidArgumentError` if `report` is no
    budget report.
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


def images(pictures: Mapping[str, Any], *, common: bool = False) -> Figure:
    """Draw pictures, each (M, N) or (1, M, N), side by side under their titles.

    Data without negative values is grey; with negative values it is red and blue, and zero is white.
    Each picture has a scale of its own, or all have one with `common=True`.

    Raises `InvalidArgumentError` if there is no picture, or for one of another shape.
    """
    _check_mapping(pictures, "pictures", "array")
    arrays = {title: _picture(value, title) for title, value in pictures.items()}
    figure, axes = plt.subplots(
        1, len(arrays), figsize=(3.1 * len(arrays), 2.9), layout="constrained", squeeze=False
    )
    everything = np.concatenate([array.ravel() for array in arrays.values()])
    for ax, (title, array) in zip(axes[0], arrays.items(), strict=True):
        colours, scale = _colours(everything if common else array)
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
    """Draw what `fheconv.filter_matrix` returned, dense or csr: zero white, negative blue, positive red.

    `block` is (width of the image, width of the output): lines then separate the blocks, in each of
    which one row of the image meets one row of the output. A small matrix has its numbers written in;
    of a large one a dot shows the largest weight of a few neighbours.

    Raises `InvalidArgumentError` if it has not two axes, or `block` is not two positive integers.
    """
    matrix = _matrix(matrix, "matrix")
    _check_block(block)
    rows, columns = matrix.shape
    written = rows * columns <= WRITTEN
    if ax is None:
        height = max(0.35 * rows, 1.5) if written else 5.0
        width = min(max(height * columns / rows, 1.5), 10.0)
        ax = plt.subplots(figsize=(width + 1.5, min(height, 7.0) + 0.8), layout="constrained")[1]
    dots = _dots(matrix)
    colours, scale = _colours(dots, signed=True)
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
    matrices: Mapping[str, Any], *, blocks: Mapping[str, tuple[int, int]] | None = None
) -> Figure:
    """Draw filter matrices side by side under their titles, all with entries of one size.

    `blocks` may hold a `block` for each title (see `filter_matrix`).

    Raises `InvalidArgumentError` if there is no matrix, or for one that has not two axes.
    """
    _check_mapping(matrices, "matrices", "matrix")
    if blocks is not None and not isinstance(blocks, Mapping):
        raise InvalidArgumentError(f"blocks is {blocks!r}; it must be {{title: block}}.")
    for block in (blocks or {}).values():
        _check_block(block)
    drawable = {title: _matrix(value, f"The matrix {title!r}") for title, value in matrices.items()}
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


def front(result: TuneResult, ax: Axes | None = None) -> Axes:
    """Draw what `fheconv.tune` found: accuracy against what the objective makes small, and the front.

    Raises `InvalidArgumentError` if `result` is not a tune result, or an empty one.
    """
    if not isinstance(result, TuneResult) or not result.points:
        raise InvalidArgumentError(
            f"{type(result).__name__} is no TuneResult with points; give what tune found."
        )
    if ax is None:
        ax = plt.subplots(figsize=(8, 5), layout="constrained")[1]
    values = [point.value(result.objective) for point in result.points]
    ax.scatter(values, [100 * point.accuracy for point in result.points], color=FITS, label="tried")
    best = result.front
    x, y = [p.value(result.objective) for p in best], [100 * p.accuracy for p in best]
    ax.plot(x, y, color=OBSERVED, marker="o", label="front")
    named = {str(point.setting): at for point, at in zip(best, zip(x, y, strict=True), strict=True)}
    for name, at in named.items():  # the dearest point of each
        ax.annotate(name, at, xytext=(5, -10), textcoords="offset points", fontsize=8)
    ax.axhline(100 * result.float_accuracy, color=LIMIT, linestyle="--", label="float")
    ax.set_xscale("log")
    units = {"latency": "seconds", "complexity": "complexity", "key_bytes": "bytes of keys"}
    ax.set_xlabel(
        f"{units[result.objective]} of one encrypted image"
        if result.objective != "key_bytes"
        else units["key_bytes"]
    )
    ax.set_ylabel("right answers, %")
    ax.legend(loc="lower right")
    return ax


def _check_report(report: Any) -> None:
    if not isinstance(report, BudgetReport):
        raise InvalidArgumentError(
            f"report is {report!r}; it must be a BudgetReport, such as network.budget() returns."
        )


def _check_mapping(value: Any, name: str, kind: str) -> None:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{name} is a {type(value).__name__}; it must be {{title: {kind}}}.")
    if not value:
        raise InvalidArgumentError(f"{name} is empty; give at least one, as {{title: {kind}}}.")


def _check_block(block: Any) -> None:
    if block is None:
        return
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise InvalidArgumentError(
            f"block={block!r} must be two integers, (width of the image, width of the output)."
        )
    for name, width in zip(("block[0]", "block[1]"), block, strict=True):
        check_integer(name, width, 1)


def _matrix(value: Any, name: str) -> Any:
    matrix = value if scipy.sparse.issparse(value) else as_array(value, name)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise InvalidArgumentError(f"{name} has shape {matrix.shape}; it must have two axes, none of them 0.")
    return matrix


def _dots(matrix: Any) -> Array:
    """Return the matrix in at most DOTS rows and columns, each dot the largest weight under it."""
    step = -(-max(matrix.shape) // DOTS)
    entries = scipy.sparse.coo_array(matrix)
    at = entries.row // step, entries.col // step
    positive, negative = np.zeros((2, *(-(-size // step) for size in matrix.shape)))
    np.maximum.at(positive, at, entries.data)
    np.minimum.at(negative, at, entries.data)
    return np.where(positive >= -negative, positive, negative)


def _label_channels(ax: Axes, report: BudgetReport, x: Array) -> None:
    """Write the numbers of the channels under the bars, and the names of the layers."""
    numbers = [channel.channel for layer in report.layers for channel in layer.channels]
    every = 1 + (len(numbers) - 1) // 32
    ax.set_xticks(x[::every], [str(number) for number in numbers[::every]])
    ax.set_xlabel(f"output channel of {', then '.join(repr(layer.name) for layer in report.layers)}")


def _picture(value: Any, title: str) -> Array:
    array = as_array(value, f"The picture {title!r}")
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise InvalidArgumentError(
            f"The picture {title!r} has shape {array.shape}; a picture is (M, N) or (1, M, N), so take one "
            "image and one channel."
        )
    return array.astype(np.float64)


def _colours(values: Array, *, signed: bool | None = None) -> tuple[str | Colormap, Normalize]:
    """Return a map of colours and the scale for values: grey, or diverging around a white zero."""
    low, high = float(values.min()), float(values.max())
    if low < 0 if signed is None else signed:
        end = max(-low, high) or 1.0
        return LinearSegmentedColormap.from_list("signed", SIGNED), Normalize(-end, end)
    return "gray", Normalize(low, high if high > low else low + 1.0)
