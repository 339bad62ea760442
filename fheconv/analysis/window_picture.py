"""Draws the window of a lookup: where accumulators lie, and what the lookup makes of each.

`fheconv.plots` imports it, and says how to install matplotlib.
"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fheconv.analysis.drawing import LIMIT, OBSERVED, WINDOW
from fheconv.basics.arrays import Array, ArrayLike
from fheconv.basics.errors import InvalidArgumentError
from fheconv.networks.bounds import layer_bounds
from fheconv.networks.integers import IntegerNetwork, Lookup, QuantizedLayer

BARS, POINTS = 60, 2000


def window(
    network: IntegerNetwork,
    images: ArrayLike,
    layer: str | None = None,
    channel: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw a histogram of one channel's accumulators, the window of its lookup, and the worst case.

    `images` (N, C, *S) are float images, such as those of calibration. The line is the activation that the
    lookup gives to every accumulator, also outside the window. Without `layer`, it is the first layer that
    has a lookup.

    Raises `InvalidArgumentError` for a layer that has no lookup, and for a channel that it does not have.

    Example:
        >>> import fheconv, numpy as np, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Conv2d(2, 1, 3))
        >>> images = np.random.default_rng(0).random((40, 1, 8, 8))
        >>> config = fheconv.QuantConfig(overflow="defined", rounding_bits=4)
        >>> window(fheconv.quantize(model, images, config), images).get_xlabel()
        "accumulator of layer '0', channel 0"
    """
    number, chosen, table = _looked_up(network, layer)
    if not 0 <= channel < chosen.shape[0]:
        raise InvalidArgumentError(
            f"channel is {channel!r}; layer {chosen.name!r} has the channels 0 to {chosen.shape[0] - 1}."
        )
    accumulators = chosen.accumulate(network.tensors(network.quantize_input(images)[0])[:number])[:, channel]
    bounds = layer_bounds(chosen, network.shapes)
    worst = int(bounds.channel_minimum[channel]), int(bounds.channel_maximum[channel])
    held = table.window(channel)
    if ax is None:
        ax = plt.subplots(figsize=(9, 4.2), layout="constrained")[1]
    ax.axvspan(*held, color=WINDOW, zorder=0, label=f"window: {held[1] - held[0] + 1:,} accumulators")
    inside = (accumulators >= held[0]) & (accumulators <= held[1])
    ax.hist(
        accumulators.ravel(),
        bins=BARS,
        color=OBSERVED,
        label=f"accumulators of these images, {inside.mean():.2%} inside",
    )
    ends = min(worst[0], held[0]), max(worst[1], held[1])
    for end in worst:
        ax.axvline(end, color=LIMIT, linestyle="--")
    ax.plot(
        [], [], color=LIMIT, linestyle="--", label=f"worst case of any image: {worst[0]:,} to {worst[1]:,}"
    )
    ax.set_xlabel(f"accumulator of layer {chosen.name!r}, channel {channel}")
    ax.set_ylabel("accumulators")
    ax.set_yticks([])
    line = ax.twinx()
    x = np.unique(np.linspace(*ends, POINTS).astype(np.int64))
    line.plot(x, _activations(table, x, channel), color="black", linewidth=1, drawstyle="steps-mid")
    line.set_ylabel("activation that the lookup gives")
    ax.set_ylim(bottom=0)
    how = "proved: no image leads outside" if table.proved else "outside, the table turns around"
    ax.set_title(f"Window of a lookup: {table.column_bits} of {table.bits} bits looked up; {how}", loc="left")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)
    return ax


def _looked_up(network: IntegerNetwork, name: str | None) -> tuple[int, QuantizedLayer, Lookup]:
    """Return the layer of that name, with its number and its lookup."""
    if not isinstance(network, IntegerNetwork):
        raise InvalidArgumentError(f"network is {network!r}; it must be what fheconv.quantize returns.")
    found = {
        one.name: (number, one, one.lookup)
        for number, one in enumerate(network.layers, 1)
        if isinstance(one, QuantizedLayer) and one.lookup is not None
    }
    chosen = found.get(next(iter(found), "") if name is None else name)
    if chosen is None:
        raise InvalidArgumentError(
            f"layer is {name!r}, and must be one that has a lookup: {', '.join(found) or 'there is none'}."
        )
    return chosen


def _activations(table: Lookup, x: Array, channel: int) -> Array:
    """Return the real activations for accumulators (n,) of a channel, at its first position."""
    which = np.broadcast_to(table.which, (len(table.minimum), *table.which.shape[1:]))[channel].flat[0]
    integers = table.rows(x - table.minimum[channel], np.full(x.shape, which))
    return (integers - table.output.zero_point) * table.output.scale
