"""Tries settings: compiles their networks, and predicts how many images they get right."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from fheconv.analysis.failures import accuracies
from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import (
    AccumulatorOverflowError,
    CalibrationError,
    CompilationError,
    LookupBudgetError,
)
from fheconv.basics.progress import track
from fheconv.circuits.circuit import FheCircuit
from fheconv.circuits.cost import seconds_or_estimate
from fheconv.quantized import QuantizedNetwork
from fheconv.tuning.making import Maker
from fheconv.tuning.parameters import measure, parameter_choices
from fheconv.tuning.result import TunePoint
from fheconv.tuning.setting import Kind, Setting

# The number of times that the evaluation images go through the failure model.
DRAWS = 8
# A setting that loses this much more accuracy than allowed is not followed to narrower widths.
HOPELESS = 0.02
# At most this many points of the front are timed, and get a control of their own.
MOST_SPREAD = 4
# The control without lookups.
LINEAR = Setting(kind="control", lookup_budget=0)


class Search:
    """Tries settings one after the other. `impossible` says why the model cannot do with some budgets."""

    def __init__(
        self,
        maker: Maker,
        images: Array,
        labels: Array,
        compile_config: CompileConfig,
        p_errors: Sequence[float],
    ) -> None:
        self.maker, self.compile_config, self.p_errors = maker, compile_config, p_errors
        self.images, self.labels = images, labels
        self.impossible: dict[int | None, str] = {}

    def points(self, settings: Sequence[Setting], least: float) -> Iterator[TunePoint]:
        """Yield the points of the settings. Skip those narrower than one far below the `least` accuracy."""
        hopeless: set[tuple[Kind, int | None, bool, bool]] = set()
        for setting in track(settings, "Tuning…"):
            kind = setting.rounding_bits is None, setting.accumulator_bits is None
            family = (setting.kind, setting.lookup_budget, *kind)
            if family in hopeless or (setting.kind == "model" and setting.lookup_budget in self.impossible):
                continue
            try:
                network = self.maker.network(setting)
            except AccumulatorOverflowError:  # not even one weight fits
                hopeless.add(family)
                continue
            except LookupBudgetError as error:
                self.impossible[setting.lookup_budget] = str(error)
                continue
            clear = self._in_clear(network)
            if clear < least - HOPELESS:
                hopeless.add(family)
            else:
                yield from self._compiled(setting, network, clear, self.p_errors)

    def controls(self, front: Sequence[TunePoint]) -> Iterator[TunePoint]:
        """Yield trivial models: linear, and for some points of the front one layer of as many lookups."""
        if self.maker.training is None or self.maker.training.classes is None or not front:
            return
        wanted = [(LINEAR, front[0].config.p_error)]
        wanted += [
            (replace(point.setting, kind="control", lookup_budget=point.cost.lookups), point.config.p_error)
            for point in spread(front)
            if point.cost.lookups
        ]
        for setting, p_error in track(list(dict.fromkeys(wanted)), "Trying trivial models…"):
            with suppress(AccumulatorOverflowError, CalibrationError):  # there is none so narrow
                network = self.maker.network(setting)
                yield from self._compiled(setting, network, self._in_clear(network), [p_error])

    def _in_clear(self, network: QuantizedNetwork) -> float:
        return float(accuracies(network, self.images, self.labels, 0.0, draws=1)[0])

    def _compiled(
        self, setting: Setting, network: QuantizedNetwork, clear: float, p_errors: Sequence[float | None]
    ) -> Iterator[TunePoint]:
        """Yield the points of a network, one for each failure probability that makes it cheaper."""
        cheapest = math.inf
        for p_error in p_errors:
            config = replace(self.compile_config, p_error=p_error)
            try:
                cost = FheCircuit(network, config).cost
            except CompilationError:
                continue
            if cost.complexity >= cheapest:  # more failures, and not cheaper
                continue
            cheapest = cost.complexity
            predicted = accuracies(
                network, self.images, self.labels, cost.p_error, draws=DRAWS, seed=self.maker.seed
            )
            seconds = seconds_or_estimate(cost)
            yield TunePoint(
                setting=setting,
                network=network,
                config=config,
                accuracy=float(predicted.mean()),
                clear_accuracy=clear,
                cost=cost,
                seconds=math.inf if seconds is None else seconds,
            )


def spread(front: Sequence[TunePoint]) -> list[TunePoint]:
    """Return at most `MOST_SPREAD` points of the front, from its cheapest to its most accurate."""
    places = np.linspace(0, len(front) - 1, min(len(front), MOST_SPREAD)).round().astype(int)
    return [front[place] for place in places]


def timed(point: TunePoint) -> list[TunePoint]:
    """Return the point timed with each of the parameters that may be worth having."""
    choices = measure(point.network, parameter_choices(point.network, point.config))
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
