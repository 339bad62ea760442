"""Quantizes a network layer by layer, each layer on the results of the quantized layers before it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fheconv.basics.arrays import Array, channel_means
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import CalibrationError
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.quantization import CalibratedInput, Quantization
from fheconv.quantizer.activations import activation_quantizations, input_quantization
from fheconv.quantizer.building import Building
from fheconv.quantizer.draft import Draft
from fheconv.quantizer.equalization import equalized
from fheconv.quantizer.evidence import beside_others, middle, trust_in_mean
from fheconv.quantizer.factors import balanced
from fheconv.quantizer.rounding.methods import Method, chosen_method
from fheconv.quantizer.rows import IntegerTerms
from fheconv.quantizer.steps import Aim
from fheconv.quantizer.trained import trained_weights, warn_of_losses, with_own_widths
from fheconv.quantizer.weights import FittedWeights, round_nearest

# How often weights are rounded, each time with coarser steps for channels that do not fit the window.
TRIES = 2
# Weights of more bits are compared with fewer bits, down to this many.
ENOUGH = 4
# Coarser steps leave this much of the window free.
FREE = 1.02


def quantize_network(
    network: Network, images: Array, calibrated: CalibratedInput, config: QuantConfig
) -> IntegerNetwork:
    """Quantize a network as `config` says, by calibration images (N, C, *S).

    What training for integers has left is kept: scales and zero-points, and weights unless the configuration
    names a method to round them. Raises the errors of `fheconv.quantize`.
    """
    image = input_quantization(calibrated, config, network.image)
    given = images
    if config.overflow == "defined":
        images = beside_others(given, image)
    floats = network.tensors(images)
    if (even := balanced(network, floats)) is not network:
        network, floats = even, even.tensors(images)
    method = chosen_method(network, config)
    if method.by_output and not network.trained:
        network = equalized(network, floats, config)
        floats = network.tensors(images)
    quantizations = activation_quantizations(network, floats, image, config)
    building = Building(network, config, quantizations, calibrated, images)
    anew: list[str] = []
    for layer in network.layers:
        if isinstance(layer, Maximum):
            building.add_maximum(layer)
            continue
        inputs = building.inputs(layer)
        if network.trained and config.method == "auto":
            limit = building.width_limit(layer)
            own = trained_weights(layer, inputs, network.shapes, building.output, limit)
            if own is not None:
                building.add(building.draft(layer, own, layer.bias))
                continue
            anew.append(layer.name)
        if not method.by_output:
            bits = config.of_layer("weight_bits", layer.name)
            rounded = round_nearest(
                layer, inputs, network.shapes, bits, method.round, per_channel=config.per_channel
            )
            building.add(building.draft(layer, rounded, layer.bias))
        else:
            building.add(_best_draft(layer, building, method, floats))
    if network.trained:
        warn_of_losses(network, anew)
    quantized = building.network()
    if images is not given:  # alike as they are, they tell as much as one
        evidence = tuple(one if one is None else min(one, 1.0) for one in quantized.evidence)
        quantized = replace(quantized, evidence=evidence)
    return with_own_widths(quantized) if network.trained else quantized


def _best_draft(layer: Layer, building: Building, method: Method, floats: Sequence[Array]) -> Draft:
    """Return a layer with weights rounded so that its outputs change little.

    Before windows that need no proof, several widths are tried, of windows and of weights: greater integers
    need not be better ones. The least error of activations wins.
    """
    inputs, bits = building.inputs(layer), building.config.of_layer("weight_bits", layer.name)
    fitted = FittedWeights(layer, inputs, building.source.shapes, floats, building.tensors)
    budget = building.budget(layer)

    def made(bits: int, finest: Array | None) -> Draft:
        rounded = fitted.rounded(bits, method.round, budget, finest)
        bias = layer.bias + _mean_error(layer, rounded, inputs, building.tensors, floats)
        return building.draft(layer, rounded, bias)

    drafts = [
        _fitting(partial(made, tried), aim)
        for tried in range(min(bits, ENOUGH), bits + 1)
        for aim in building.aims(fitted, tried, floats)
    ] or [made(bits, None)]
    if len(drafts) == 1:
        return drafts[0]
    meant = floats[len(building.tensors)]
    return min(drafts, key=lambda draft: building.error(draft, meant))


def _fitting(made: Callable[[Array], Draft], aim: Aim) -> Draft:
    """Return a draft whose window has at most `aim.most` steps, or the last of a few tries.

    `made` rounds the weights, with no finer steps than it is given.
    """
    finest, draft = aim.finest, made(aim.finest)
    for _ in range(TRIES - 1):
        if draft.reached is None or (over := draft.reached.span / aim.most).max() <= 1:
            break
        step = np.abs(draft.step.reshape(len(over), -1)).max(axis=1)
        finest = np.where(over > 1, np.maximum(finest, FREE * over * step), finest)
        draft = made(finest)
    return draft


def _mean_error(
    layer: Layer,
    rounded: IntegerTerms,
    inputs: Sequence[Quantization],
    tensors: Sequence[Array],
    floats: Sequence[Array],
) -> Array:
    """Return the mean error (C, *1) of the sums with rounded weights.

    The bias corrects the error at no cost (Nagel et al. 2019). The mean is over the calibration images, and
    over uniform inputs if those are few or alike. Sums are linear, so that means of inputs are enough.
    """
    meant, delivered = [*floats], [*tensors]
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        for source, q, images in zip(layer.sources, inputs, rounded.evidence, strict=True):
            share = trust_in_mean(images)
            uniform = (1 - share) * middle(q)
            meant[source] = share * floats[source].mean(axis=0, keepdims=True) + uniform * q.scale
            steps = tensors[source].mean(axis=0, keepdims=True) - q.zero_point
            delivered[source] = share * steps + uniform
        sums = replace(layer, terms=rounded.terms, bias=np.zeros(layer.shape)).sums(delivered)
        error: Array = layer.sums(meant) - layer.bias - rounded.step * sums
    if not np.isfinite(error).all():
        raise CalibrationError(
            f"The sums of layer {layer.name!r} on the calibration images are not finite; rescale the "
            "weights or the images."
        )
    return channel_means(error)
