"""Predicts on clear integers how failing lookups change a network's results.

A lookup on encrypted values reads its table at the accumulator plus Gaussian noise. Most of the noise comes
from the key switch and the modulus switch before the lookup (Bergerat et al. 2023, "Parameter Optimization
and Larger Precision for (T)FHE", section 3). Concrete chooses parameters for which the noise leaves a column
of the table with a probability of at most p_error, and hardly less. That gives the size of the noise.

An exact lookup that fails reads a neighbouring column. A lookup with a rounded accumulator may also miss by
one column if the accumulator lies near the middle between two columns. A value that leaves the table comes
back with the opposite sign, as on the torus.

The noise of decryption is left out: it changes an integer only in networks whose lookups have few bits.

Example:
    >>> round(noise_deviation(0.05), 3)
    0.255
"""

import math
from statistics import NormalDist

import numpy as np

from fheconv.basics.arrays import Array, ArrayLike, along_channels, as_array
from fheconv.basics.checks import check_integer
from fheconv.basics.errors import InvalidArgumentError
from fheconv.networks.bounds import layer_bounds, without_bias
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import AnyLayer, IntegerNetwork, Lookup, comparison


def noise_deviation(p_error: float) -> float:
    """Return the standard deviation of the noise with which a lookup fails with probability `p_error`.

    The unit is one column of the table. A lookup fails when the noise is more than half a column. Raises
    `InvalidArgumentError` unless 0 <= p_error < 1.
    """
    if not 0 <= p_error < 1:
        raise InvalidArgumentError(f"p_error={p_error!r} must be at least 0 and less than 1.")
    return 0.0 if p_error == 0 else -0.5 / NormalDist().inv_cdf(p_error / 2)


def failing_lookups(lookups: int, p_error: float) -> str:
    """Return in words how many lookups of an image fail, if each does with probability `p_error`.

    Example:
        >>> failing_lookups(280, 0.05), failing_lookups(280, 1e-6)
        ('about 14 for an image', 'one image of 3,600 has one')
    """
    expected = lookups * p_error
    if expected >= 0.5:
        count = f"{expected:,.0f}" if expected >= 10 else f"{expected:.1f}"
        return f"about {count} for an image"
    if expected < 1e-9:
        return "fewer than one image of a billion has one"
    images = 1 / expected
    rounded = round(images, 1 - math.floor(math.log10(images)))  # an estimate does not have more digits
    return f"one image of {rounded:,.0f} has one"


def noisy(
    network: IntegerNetwork,
    q: Array,
    p_error: float,
    rng: np.random.Generator,
    *,
    one_parameter_set: bool = False,
) -> Array:
    """Return the last accumulators (N, K, *Out) for integer images (N, *input_shape), with failing lookups.

    p_error: the failure probability of one lookup. A circuit's own is `circuit.cost.p_error`, which is a
        little less than the probability that was asked for.
    one_parameter_set: all lookups have the parameters of the widest lookup, so that narrower ones hardly
        fail. This is Concrete's strategy MONO. By default, Concrete gives each width its own parameters, with
        which it fails with probability `p_error`.

    Raises `InvalidArgumentError` for a p_error outside [0, 1).
    """
    deviation = noise_deviation(p_error)
    lookups = [_lookup_of(layer, network) for layer in network.layers]
    widest = max((lookup.column_bits for lookup in lookups if lookup and not _constant(lookup)), default=0)
    tensors = [q]
    for layer, lookup in zip(network.layers, lookups, strict=True):
        if lookup is None:
            tensors.append(layer.output(tensors))
            continue
        own = deviation * 2.0 ** (lookup.column_bits - widest) if one_parameter_set else deviation
        if isinstance(layer, Maximum):
            first, *others = layer.candidates(tensors[layer.source])
            for other in others:
                first = first + _look_up(lookup, other - first, own, rng)
            tensors.append(first)
        else:
            tensors.append(_look_up(lookup, layer.accumulate(tensors), own, rng))
    return _decrypted(network, tensors[-1])


def accuracies(
    network: IntegerNetwork,
    images: ArrayLike,
    labels: ArrayLike,
    p_error: float,
    *,
    draws: int = 8,
    seed: int = 0,
    one_parameter_set: bool = False,
) -> Array:
    """Return the share of float images (N, *input_shape) that get the right class, for each draw (draws,).

    `labels` (N,) are the right classes. Each draw has its own noise, and the mean over the draws is the
    predicted accuracy. See `noisy` for the other arguments. Raises `InvalidArgumentError` if the network
    gives no vector of scores or labels are missing, `InputRangeError` like `network`.
    """
    check_integer("draws", draws, 1)
    q, batched = network.quantize_input(images)
    expected = as_array(labels, "labels")
    if not batched or len(network.output_shape) != 1 or expected.shape != (len(q),) or not len(q):
        raise InvalidArgumentError(
            f"labels have shape {expected.shape}, for {len(q)} images with results of shape "
            f"{network.output_shape}; give a batch of images, a label (n,) for each, and a network whose "
            "results are one score for each class."
        )
    rng = np.random.default_rng(seed)
    results = (noisy(network, q, p_error, rng, one_parameter_set=one_parameter_set) for _ in range(draws))
    return np.array([(network.dequantize(y).argmax(axis=1) == expected).mean() for y in results])


def _lookup_of(layer: AnyLayer, network: IntegerNetwork) -> Lookup | None:
    """Return the lookup of a layer, or None for the last layer."""
    return comparison(network.quantizations[layer.source]) if isinstance(layer, Maximum) else layer.lookup


def _constant(lookup: Lookup) -> bool:
    """Return True if the table is constant. Concrete replaces such a lookup by its value."""
    return bool(np.ptp(lookup.tables) == 0)


def _look_up(lookup: Lookup, accumulators: Array, deviation: float, rng: np.random.Generator) -> Array:
    """Return the activations of accumulators with noise whose standard deviation is `deviation` columns.

    The noise is rounded to whole steps of the accumulator. Before approximate rounding, Concrete adds half a
    step, so a value in the middle between two columns is half a step away from being rounded down.
    """
    if _constant(lookup):
        return np.full(accumulators.shape, lookup.tables.flat[0])
    steps = deviation * 2**lookup.dropped_bits
    noise = np.rint(steps * rng.standard_normal(accumulators.shape)).astype(np.int64)
    return lookup(accumulators + noise)


def _decrypted(network: IntegerNetwork, accumulators: Array) -> Array:
    """Return the last accumulators as decryption gives them: modulo one bit more than their width."""
    bounds = layer_bounds(without_bias(network.last), network.shapes)
    start = along_channels(bounds.channel_minimum, accumulators.ndim - 1) + network.last.bias
    return start + (accumulators - start) % 2 ** (max(bounds.offset_bits, 1) + 1)
