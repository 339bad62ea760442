"""Searches for the cheapest circuit that is still accurate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from fheconv.basics.arrays import Array, as_array
from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.samples import MOST_CALIBRATED, Data, images_of, samples, share_right
from fheconv.capture.model import capture, image_axes
from fheconv.quantized import Model
from fheconv.training.finetuning import Augment
from fheconv.tuning.making import Floats, Maker
from fheconv.tuning.result import Objective, TunePoint, TuneResult, front_of
from fheconv.tuning.setting import Kind, Setting
from fheconv.tuning.trying import Search, spread, timed

if TYPE_CHECKING:
    from fheconv.capture.outputs import Outputs

# Widths of accumulators, each with the width after rounding, the most generous first. Windows that lie where
# calibration leads (None) are as cheap as proved ones of 8 bits, and lose less.
WIDTHS: tuple[tuple[int | None, int | None], ...] = ((None, 6), (None, 5), (None, 4), (None, 3))
# Failure probabilities of a lookup. Greater ones make keys larger and nothing faster.
P_ERRORS = (1e-3, 1e-2, 3e-2, 5e-2, 0.1)


@answers_keywords
def tune(
    model: Model,
    calibration: Data,
    *,
    evaluation: Data,
    objective: Objective = "latency",
    training: Data | None = None,
    augment: Augment | None = None,
    epochs: int = 200,
    lookup_budgets: Sequence[int] = (),
    students: bool = False,
    widths: Sequence[tuple[int | None, int | None]] = WIDTHS,
    p_errors: Sequence[float] = P_ERRORS,
    max_drop: float = 0.05,
    measure: bool = False,
    config: QuantConfig | None = None,
    compile_config: CompileConfig | None = None,
    previous: TuneResult | None = None,
    seed: int = 0,
    outputs: "Outputs" = None,
) -> TuneResult:
    """Search the circuits of a trained classifier for the cheapest at each accuracy.

    model, calibration: as for `fheconv.quantize`.
    evaluation: images (N, C, *S) and their classes (N,), on which points are compared: a pair, or a loader,
        dataset or batches of such pairs. They decide which circuit is chosen, so measure the chosen circuit
        on other images.
    objective: the number to make small: "latency" (seconds of one encrypted image on this machine),
        "complexity" (Concrete's count of operations) or "key_bytes".
    training: images and classes to fine-tune on (`fheconv.finetune`, with `augment` and `epochs`). Each
        setting takes about as long as a training. Without it, networks are only quantized. With it, trivial
        models are trained, too, for comparison: a linear one, and one hidden layer of as many ReLUs as there
        are lookups, for at most four points of the front. They are `result.controls`, and the report says if
        they beat the front.
    lookup_budgets: numbers of lookups to try too, by fine-tuning a network with fewer activations. A
        number that is too small for this is left out.
    students: for each of `lookup_budgets`, try a student of the model, too (`fheconv.distill`, with `augment`
        and `epochs`). It is another network, which imitates yours; its points say so.
    widths: pairs to try: the width of accumulators, and the width after rounding (None: not rounded). The
        most generous come first. A width of None stands for windows that lie where calibration leads
        (`overflow="defined"`), others are proved.
    p_errors: failure probabilities of a lookup to try, the least first.
    max_drop: a circuit that loses more accuracy than this is not a point of the result.
    measure: time encrypted runs of at most four points of the front, with the optimiser's parameters and with
        others of the same security that may be faster here. Each takes a minute or two. Without it, seconds
        are estimates.
    config, compile_config: the other options for quantizing and compiling. The search sets the numbers of
        bits, and p_error. With `QuantConfig(weight_bits="auto", accumulator_bits="auto")` it also searches
        the bits of weights, layer by layer. That takes longer, and gains little with narrow accumulators.
    previous: an earlier result for the same model and data, whose networks are used again.
    outputs: the index or the name of the classes' scores, if the model returns several outputs.

    Once a width loses too much accuracy, narrower widths are left out. Where widths are proved, the bits of
    images and activations are chosen by held-out calibration loss, layer by layer ("auto" in `QuantConfig`).
    That takes minutes; windows that are not proved take seconds. Weights have 4 bits, and 6 bits in the last
    layer. All lookups of a circuit have one width, so Concrete's strategies for parameters
    of several widths give the same result. Accuracy comes from the integer network and the failure model of
    lookups (`fheconv.failures`), cost from compiling without keys. After an interruption, the points found so
    far are returned.

    Raises `InvalidArgumentError` for arguments that do not go together, otherwise like `quantize`.

    Example:
        >>> result = tune(model, images, evaluation=(images, classes))  # doctest: +SKIP
        >>> circuit = result.best(max_drop=0.01).compile()  # doctest: +SKIP
    """
    settings = _settings(objective, training, lookup_budgets, students, widths)
    check_number("max_drop", max_drop, 0.0, 1.0)
    compile_config = CompileConfig() if compile_config is None else compile_config
    if measure and compile_config.parameters is not None:
        raise InvalidArgumentError(
            f"measure=True tries parameters, and compile_config.parameters={compile_config.parameters} fixes "
            "them; leave one of the two."
        )
    axes = image_axes(model)
    calibration = images_of(calibration, "calibration", axes, MOST_CALIBRATED)  # an iterator is read once
    labelled = None if training is None else samples(training, "The images of training", axes)
    images, labels = _evaluation(evaluation, axes)
    network = capture(model, images.shape[1:], outputs)
    scores = network(images.astype(np.float64))
    if scores.ndim != 2:
        raise InvalidArgumentError(
            f"The model's outputs have shape {scores.shape}; tune needs (n, classes), a score for each."
        )
    right = share_right(scores, labels)
    given = Floats.of(model, network, outputs)
    if not given.layers:
        raise InvalidArgumentError("This network has no lookups, whose widths and number tune is about.")
    maker = Maker(
        given=given,
        calibration=calibration,
        training=labelled,
        classes=scores.shape[1],
        augment=augment,
        epochs=epochs,
        config=QuantConfig() if config is None else config,
        seed=seed,
        networks=dict(previous.networks) if previous else {},
    )
    search = Search(maker, images, labels, compile_config, p_errors)
    found: list[TunePoint] = []
    controls: list[TunePoint] = []
    reason = "The given widths were tried, from the first to where accuracy is lost."
    try:
        for point in search.points(settings, right - max_drop):
            if point.accuracy >= right - max_drop - 1e-9:
                found.append(point)
        if not found:
            reason = f"No circuit stays within max_drop={max_drop:g}."
        for point in search.controls(front_of(found, objective)):
            controls.append(point)
        for point in spread(front_of(found, objective)) if measure else ():
            found.extend(timed(point))
            found.remove(point)
    except KeyboardInterrupt:
        reason = "Interrupted: not everything was tried."
    return TuneResult(
        objective=objective,
        float_accuracy=right,
        points=tuple(found),
        networks=maker.networks,
        reason=" ".join([reason, *search.impossible.values()]),
        controls=tuple(controls),
    )


def _settings(
    objective: str,
    training: Data | None,
    lookup_budgets: Sequence[int],
    students: bool,
    widths: Sequence[tuple[int | None, int | None]],
) -> list[Setting]:
    """Return the settings to try, in order.

    Raises `InvalidArgumentError` for arguments that do not go together.
    """
    if objective not in get_args(Objective):
        raise InvalidArgumentError(
            f"objective={objective!r}; it must be one of {', '.join(get_args(Objective))}."
        )
    if lookup_budgets and training is None:
        raise InvalidArgumentError("lookup_budgets need training data: without, too much accuracy is lost.")
    if students and not lookup_budgets:
        raise InvalidArgumentError(
            "students=True needs lookup_budgets, the most lookups of each student, such as (32, 128)."
        )
    for budget in lookup_budgets:
        check_integer("lookup_budgets", budget, 1)
    if (None, None) in widths:
        raise InvalidArgumentError("widths has (None, None); windows need a width after rounding.")
    tried: list[tuple[Kind, int | None]] = [
        ("model", None),
        *(("model", budget) for budget in lookup_budgets),
    ]
    if students:
        tried += [("student", budget) for budget in lookup_budgets]
    return [
        Setting(
            kind=kind,
            accumulator_bits=bits,
            rounding_bits=kept,
            lookup_budget=budget,
            fine_tuned=training is not None,
        )
        for kind, budget in tried
        for bits, kept in widths
    ]


def _evaluation(evaluation: Data, axes: int | None) -> tuple[Array, Array]:
    images, classes = samples(evaluation, "The images of evaluation", axes)
    if classes is None:
        raise InvalidArgumentError(
            "evaluation has no classes; give a pair of images (n, C, *S) and classes (n,), or a loader of "
            "such pairs."
        )
    labels = as_array(classes, "The classes of evaluation")
    if images.ndim < 2 or labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(images):
        raise InvalidArgumentError(
            f"evaluation has images of shape {images.shape} and classes of shape {labels.shape} and type "
            f"{labels.dtype}; give (n, C, *S) and integers (n,)."
        )
    return images, labels
