"""ONNX's own test cases of its convolutions, clear and encrypted: a second, independent oracle."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as onnx_cases
import pytest
from onnx.reference import ReferenceEvaluator

import fheconv
from tests.support.notebooks import cell

DEFORMS = "reads between pixels, at positions that are inputs themselves: data multiplied by data"
ACTIVATES = "applies an activation to the result, and there are none here"
CANNOT = {
    "test_basic_deform_conv_with_padding": DEFORMS,
    "test_basic_deform_conv_without_padding": DEFORMS,
    "test_deform_conv_with_mask_bias": DEFORMS,
    "test_deform_conv_with_multiple_offset_groups": DEFORMS,
    "test_causal_conv_with_state_silu": ACTIVATES,
    "test_causal_conv_with_state_swish_alias": ACTIVATES,
    "test_causal_conv_with_state_silu_with_past_state": ACTIVATES,
    "test_causal_conv_with_state_silu_fp16": ACTIVATES,
}
PASS = (
    "test_basic_conv_with_padding",
    "test_basic_conv_without_padding",
    "test_conv_with_strides_padding",
    "test_conv_with_strides_no_padding",
    "test_conv_with_strides_and_asymmetric_padding",
    "test_conv_with_autopad_same",
    "test_convtranspose",
    "test_convtranspose_1d",
    "test_convtranspose_3d",
    "test_convtranspose_output_shape",
    "test_convtranspose_pad",
    "test_convtranspose_kernel_shape",
    "test_convtranspose_pads",
    "test_convtranspose_dilations",
    "test_convtranspose_autopad_same",
    "test_convtranspose_group_2",
    "test_convtranspose_group_2_image_3",
    "test_convinteger_without_padding",
    "test_convinteger_with_padding",
    "test_qlinearconv",
    "test_causal_conv_with_state_basic",
    "test_causal_conv_with_state_with_bias",
    "test_causal_conv_with_state_with_past_state",
    "test_causal_conv_with_state_decode_step",
    "test_causal_conv_with_state_kernel_size_one",
    "test_causal_conv_with_state_with_bias_and_past_state",
    "test_causal_conv_with_state_b1_c1_degenerate",
    "test_causal_conv_with_state_short_input_no_past_state",
    "test_causal_conv_with_state_fp16",
)


def collected() -> dict[str, Any]:
    """Every case of every module of onnx's node tests that has "conv" in its name; importing makes them."""
    for module in pkgutil.iter_modules(onnx_cases.__path__):
        if "conv" in module.name:
            importlib.import_module(f"{onnx_cases.__name__}.{module.name}")
    return {case.name: case for case in onnx_cases._NodeTestCases}


CASES = collected()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case as fheconv's arguments; `finish` turns the convolution's result into the case's output."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    options: dict[str, Any]
    finish: Callable[[np.ndarray], np.ndarray]


def inputs_of(case: Any) -> dict[str, np.ndarray]:
    names = [name for name in case.model.graph.node[0].input if name]
    return dict(zip(names, case.data_sets[0][0], strict=True))


def problem(case: Any, values: dict[str, np.ndarray]) -> Problem:
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given = {i: values[name] for i, name in enumerate(node.input) if name}
    if node.op_type == "CausalConvWithState":
        return causal(given)
    if node.op_type == "QLinearConv":
        x, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero, *rest = given.values()
        step = (x_scale * w_scale / y_scale).reshape(-1, *[1] * (x.ndim - 2))
        limits = np.iinfo(y_zero.dtype)
        correct, weight = without_zero_point(weight, w_zero)

        def finish(y: np.ndarray) -> np.ndarray:
            y = correct(y) + (rest[0].reshape(-1, *[1] * (x.ndim - 2)) if rest else 0)
            return np.clip(np.rint(y * step + y_zero), limits.min, limits.max).astype(y_zero.dtype)

        return direct(attributes, x.astype(int) - x_zero, weight, None, finish)
    if node.op_type == "ConvInteger":
        correct, weight = without_zero_point(given[1], given.get(3, 0))
        return direct(attributes, given[0].astype(int) - given.get(2, 0), weight, None, correct)
    if node.op_type == "ConvTranspose":
        return transposed(attributes, given[0], given[1], given.get(2))
    assert node.op_type == "Conv"
    return direct(attributes, given[0], given[1], given.get(2), lambda y: y)


def without_zero_point(weight: np.ndarray, zero: Any) -> tuple[Callable[[Any], Any], np.ndarray]:
    """Weights minus a zero-point may need nine bits. One more filter, of ones, keeps them at eight:
    Σ(w − zero)·x = Σw·x − zero·Σx, as gemmlowp has it."""
    zero = np.asarray(zero).astype(int).reshape(-1, *[1] * (weight.ndim - 2))
    return lambda y: y[:, :-1] - zero * y[:, -1:], np.concatenate([weight, np.ones_like(weight[:1])])


def halves(attributes: dict[str, Any], total: list[int]) -> list[tuple[int, int]]:
    """ONNX's automatic padding: the odd one at the end for SAME_UPPER, else at the start."""
    upper = attributes.get("auto_pad") == b"SAME_UPPER"
    return [(t // 2, t - t // 2) if upper else (t - t // 2, t // 2) for t in total]


def per_axis(attributes: dict[str, Any], name: str, axes: int, default: int) -> list[int]:
    return attributes.get(name, [default] * axes)


def pairs(attributes: dict[str, Any], axes: int) -> list[tuple[int, int]]:
    pads = per_axis(attributes, "pads", 2 * axes, 0)
    return list(zip(pads[:axes], pads[axes:], strict=True))


def shared(attributes: dict[str, Any], weight: np.ndarray) -> tuple[list[int], dict[str, Any]]:
    """The kernel's extents, and the options that direct and transposed convolutions have."""
    kernel, axes = weight.shape[2:], weight.ndim - 2
    assert tuple(attributes.get("kernel_shape", kernel)) == kernel
    assert attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID", b"SAME_UPPER", b"SAME_LOWER")
    options = {
        "stride": per_axis(attributes, "strides", axes, 1),
        "dilation": per_axis(attributes, "dilations", axes, 1),
        "groups": attributes.get("group", 1),
    }
    return [(k - 1) * d + 1 for k, d in zip(kernel, options["dilation"], strict=True)], options


def direct(attributes: dict[str, Any], x: Any, weight: Any, bias: Any, finish: Any) -> Problem:
    extents, options = shared(attributes, weight)
    padding = pairs(attributes, x.ndim - 2)
    if attributes.get("auto_pad", b"").startswith(b"SAME"):
        sizes = zip(x.shape[2:], options["stride"], extents, strict=True)
        padding = halves(attributes, [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in sizes])
    return Problem(x=x, weight=weight, bias=bias, options={**options, "padding": padding}, finish=finish)


def transposed(attributes: dict[str, Any], x: Any, weight: Any, bias: Any) -> Problem:
    extents, options = shared(attributes, weight)
    extra = per_axis(attributes, "output_padding", x.ndim - 2, 0)
    padding = pairs(attributes, x.ndim - 2)
    sizes = attributes.get("output_shape")
    if sizes is None and attributes.get("auto_pad", b"").startswith(b"SAME"):
        sizes = np.multiply(x.shape[2:], options["stride"]).tolist()
    if sizes is not None:
        full = (np.array(x.shape[2:]) - 1) * options["stride"] + extra + extents
        padding = halves(attributes, (full - sizes).tolist())
        # A result larger than all that the input reaches: the rest is output padding.
        extra = [more + max(-after, 0) for more, (_, after) in zip(extra, padding, strict=True)]
        padding = [(before, max(after, 0)) for before, after in padding]
    options = {**options, "padding": padding, "output_padding": extra, "transposed": True}
    return Problem(x=x, weight=weight, bias=bias, options=options, finish=lambda y: y)


def causal(given: dict[int, np.ndarray]) -> Problem:
    """A depthwise convolution over the past followed by the present, or by zeros if there is no past."""
    x, weight, past = given[0], given[1], given.get(3)
    padding = [(weight.shape[2] - 1, 0)] if past is None else 0
    x = x if past is None else np.concatenate([past, x], axis=2)
    options = {"padding": padding, "groups": len(weight)}
    return Problem(x=x, weight=weight, bias=given.get(2), options=options, finish=lambda y: y)


def rounded(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Integers as they are, other numbers rounded to quarters and taken as integers."""
    if all(np.array_equal(v, np.rint(v)) for v in values.values()):
        return values
    return {name: np.rint(4 * v).astype(v.dtype) for name, v in values.items()}


def bits(values: np.ndarray) -> int:
    """The width of the narrowest signed integers that hold `values`, unsigned if none is negative."""
    low, high = int(values.min()), int(values.max())
    return max(2, max(high, ~low).bit_length() + (low < 0))


def convolved(p: Problem, product: bool) -> np.ndarray:
    options = dict(p.options)
    if not product and options.pop("transposed", False):
        return fheconv.conv_transpose(p.x, p.weight, p.bias, **options)
    if not product:
        return fheconv.conv(p.x, p.weight, p.bias, **options)
    matrix = fheconv.filter_matrix(p.weight, p.x.shape[1:], **options)
    like = convolved(p, False)
    y = (p.x.reshape(len(p.x), -1) @ matrix).reshape(like.shape)
    return y if p.bias is None else y + p.bias.reshape(-1, *[1] * (y.ndim - 2))


def test_every_case_of_onnx_is_tried_or_has_a_reason_why_not():
    # "_expanded" cases repeat one with its operator written out as a graph of others.
    expanded = {name for name in CASES if name.endswith("_expanded")}
    assert {name.removesuffix("_expanded") for name in expanded} <= CASES.keys() - expanded
    assert sorted([*PASS, *CANNOT]) == sorted(CASES.keys() - expanded)


@pytest.mark.parametrize("name", PASS)
@pytest.mark.parametrize("product", [False, True], ids=["convolution", "filter_matrix"])
def test_results_are_onnxs(name, product):
    case = CASES[name]
    p = problem(case, inputs_of(case))
    expected = case.data_sets[0][1][0]
    y = p.finish(convolved(p, product))
    if expected.dtype.kind in "iu":
        np.testing.assert_array_equal(y, expected)
    else:
        atol = max(case.atol, np.finfo(expected.dtype).eps * 8)  # sums in another order
        np.testing.assert_allclose(y, expected, rtol=case.rtol, atol=atol)


@pytest.mark.parametrize("name", PASS)
@pytest.mark.sampled(3)
def test_encrypted_results_are_onnxs_on_integers(name):
    case = CASES[name]
    values = inputs_of(case)
    if case.model.graph.node[0].op_type not in ("ConvInteger", "QLinearConv"):
        values = rounded(values)
    expected = ReferenceEvaluator(case.model).run(None, values)[0]
    p = problem(case, values)
    x, weight = p.x.astype(np.int64), p.weight.astype(np.int64)
    config = fheconv.QuantConfig(weight_bits=bits(weight), input_bits=bits(x), input_signed=bool(x.min() < 0))
    network = fheconv.quantize(fheconv.Conv.of(weight, p.bias, **p.options), x, config)
    circuit = fheconv.compile(network)
    circuit.keygen()
    y = circuit.predict(x, fhe="execute")
    assert (network.last.scale == 1).all()
    assert network.input.integral
    np.testing.assert_array_equal(p.finish(y), expected)


def test_the_notebook_counts_the_cases():
    version = ".".join(onnx.__version__.split(".")[:2])
    sentence = (
        f"Of the {len(PASS) + len(CANNOT)} test cases of convolutions that ONNX {version} has, "
        f"{len(PASS)} pass, in clear and encrypted"
    )
    assert sentence in cell("2-every-convolution", "## 6. What is supported")
