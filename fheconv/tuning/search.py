"""Searches for the cheapest circuit that is still accurate."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import numpy as np

from fheconv.analysis.failures import accuracies
from fheconv.basics.arrays import Array, as_array
from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, CompilationError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import track
from fheconv.basics.samples import MOST_CALIBRATED, Data, Samples, images_of, samples, share_right
from fheconv.capture.model import capture, image_axes
from fheconv.circuits.circuit import FheCircuit
from fheconv.networks.floats import Layer
from fheconv.quantized import Model, QuantizedNetwork, quantized
from fheconv.training.finetuning import Augment, finetune
from fheconv.tuning.parameters import measure as timed
from fheconv.tuning.parameters import parameter_choices
from fheconv.tuning.result import Objective, Setting, TunePoint, TuneResult, front_of

if TYPE_CHECKING:
    from fheconv.capture.outputs import Outputs

# Widths of accumulators, each with the width after rounding, the most generous first. Windows that lie where
# calibration leads (None) are as cheap as proved ones of 8 bits, and lose less.
WIDTHS: tuple[tuple[int | None, int | None], ...] = ((None, 6), (None, 5), (None, 4), (None, 3))
# Failure probabilities of a lookup. Greater ones make keys larger and nothing faster.
P_ERRORS = (1e-3, 1e-2, 3e-2, 5e-2, 0.1)
# Bits of the weights before lookups, which the width of accumulators limits anyway, and of the last layer's
# weights, whose width costs little (see `fheconv.lowering.planes`).
WEIGHT_BITS, LAST_WEIGHT_BITS = 4, 6
# Bits of the image, where windows are not proved. More bits cost nothing there.
INPUT_BITS = 6
# The number of times that the evaluation images go through the failure model.
DRAWS = 8
# A setting that loses this much more accuracy than allowed is not followed to narrower widths.
HOPELESS = 0.02
# At most this many points of the front are timed.
MOST_MEASURED = 4


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
        setting takes about as long as a training. Without it, networks are only quantized.
    lookup_budgets: numbers of lookups to try too, by fine-tuning a network with fewer channels.
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
    settings = _settings(objective, training, lookup_budgets, widths)
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
    layers = [one.name for one in network.layers if isinstance(one, Layer) and one.activation]
    if not layers:
        raise InvalidArgumentError("This network has no lookups, whose widths and number tune is about.")
    search = _Search(
        model=model,
        outputs=outputs,
        calibration=calibration,
        images=images,
        labels=labels,
        training=labelled,
        augment=augment,
        epochs=epochs,
        config=QuantConfig() if config is None else config,
        compile_config=compile_config,
        networks=dict(previous.networks) if previous else {},
        seed=seed,
        p_errors=p_errors,
        layers=layers,
        last=network.layers[-1].name,
    )
    found: list[TunePoint] = []
    reason = "The given widths were tried, from the first to where accuracy is lost."
    try:
        for point in search.points(settings, right - max_drop - HOPELESS):
            if point.accuracy >= right - max_drop - 1e-9:
                found.append(point)
        if not found:
            reason = f"No circuit stays within max_drop={max_drop:g}."
        for point in spread(front_of(found, objective)) if measure else ():
            found.extend(_timed(point))
            found.remove(point)
    except KeyboardInterrupt:
        reason = "Interrupted: not every width was tried."
    return TuneResult(
        objective=objective,
        float_accuracy=right,
        points=tuple(found),
        networks=search.networks,
        reason=reason,
    )


def _settings(
    objective: str,
    training: Data | None,
    lookup_budgets: Sequence[int],
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
    for budget in lookup_budgets:
        check_integer("lookup_budgets", budget, 1)
    if (None, None) in widths:
        raise InvalidArgumentError("widths has (None, None); windows need a width after rounding.")
    return [
        Setting(
            accumulator_bits=bits,
            rounding_bits=kept,
            lookup_budget=budget,
            fine_tuned=training is not None,
        )
        for budget in (None, *lookup_budgets)
        for bits, kept in widths
    ]


@dataclass(kw_only=True)
class _Search:
    """Tries settings one after the other. Holds the arguments of the search and the networks made so far."""

    model: Model
    outputs: "Outputs"
    calibration: Array
    images: Array
    labels: Array
    training: Samples | None  # None if nothing is fine-tuned
    augment: Augment | None
    epochs: int
    config: QuantConfig
    compile_config: CompileConfig
    networks: dict[Setting, QuantizedNetwork]
    seed: int
    p_errors: Sequence[float]
    layers: list[str]
    last: str

    def points(self, settings: Sequence[Setting], least: float) -> Iterator[TunePoint]:
        """Yield the points of the settings. Skip settings narrower than one below the `least` accuracy."""
        hopeless: set[tuple[int | None, bool, bool]] = set()
        for setting in track(settings, "Tuning…"):
            kind = setting.rounding_bits is None, setting.accumulator_bits is None
            family = (setting.lookup_budget, *kind)
            if family in hopeless:
                continue
            try:
                network = self._network(setting)
            except AccumulatorOverflowError:  # not even one weight fits
                hopeless.add(family)
                continue
            clear = float(accuracies(network, self.images, self.labels, 0.0, draws=1)[0])
            if clear < least:
                hopeless.add(family)
            else:
                yield from self._compiled(setting, network, clear)

    def _network(self, setting: Setting) -> QuantizedNetwork:
        if setting not in self.networks:
            self.networks[setting] = (
                self._trained(setting)
                if setting.fine_tuned
                else self._quantized(setting.accumulator_bits, setting.rounding_bits)
            )
        return self.networks[setting]

    def _trained(self, setting: Setting) -> QuantizedNetwork:
        return finetune(
            self._network(replace(setting, lookup_budget=None, fine_tuned=False)),
            self.training or (),
            epochs=self.epochs,
            augment=self.augment,
            lookup_budget=setting.lookup_budget,
            seed=self.seed,
        )

    def _quantized(self, bits: int | None, kept: int | None) -> QuantizedNetwork:
        config = replace(
            self.config,
            method="auto",
            rounding_bits=None if kept is None else dict.fromkeys(self.layers, kept),
            weight_bits="auto"
            if self.config.asks("weight_bits")
            else dict.fromkeys(self.layers, WEIGHT_BITS) | {self.last: LAST_WEIGHT_BITS},
        )
        if bits is None:
            config = replace(
                config,
                overflow="defined",
                accumulator_bits=None,
                activation_bits=None,
                input_bits=INPUT_BITS,
            )
        else:
            config = replace(
                config,
                overflow="proved",
                accumulator_bits=dict.fromkeys(self.layers, bits),
                activation_bits="auto",
                input_bits="auto",
            )
        return quantized(self.model, self.calibration, config, self.outputs, advise=False)

    def _compiled(self, setting: Setting, network: QuantizedNetwork, clear: float) -> Iterator[TunePoint]:
        cheapest = math.inf
        for p_error in self.p_errors:
            config = replace(self.compile_config, p_error=p_error)
            try:
                cost = FheCircuit(network, config).cost
            except CompilationError:
                continue
            if cost.complexity >= cheapest:  # more failures, and not cheaper
                continue
            cheapest = cost.complexity
            predicted = accuracies(
                network, self.images, self.labels, cost.p_error, draws=DRAWS, seed=self.seed
            )
            yield TunePoint(
                setting=setting,
                network=network,
                config=config,
                accuracy=float(predicted.mean()),
                clear_accuracy=clear,
                cost=cost,
                seconds=math.inf if cost.seconds is None else cost.seconds,
            )


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


def spread(front: Sequence[TunePoint]) -> list[TunePoint]:
    """Return at most `MOST_MEASURED` points of the front, from its cheapest to its most accurate."""
    places = np.linspace(0, len(front) - 1, min(len(front), MOST_MEASURED)).round().astype(int)
    return [front[place] for place in places]


def _timed(point: TunePoint) -> list[TunePoint]:
    """Return the point timed with each of the parameters that may be worth having."""
    choices = timed(point.network, parameter_choices(point.network, point.config))
    return [
        replace(
            point,
            config=choice.config,
            cost=FheCircuit(point.network, choice.config).cost,
            seconds=choice.seconds,
            measured=True,
        )
        for choice in choices
        if choice.seconds is not None
    ]
