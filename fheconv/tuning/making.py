"""Makes the networks that the search tries: quantized, trained on, students, and controls."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fheconv.basics.arrays import Array
from fheconv.basics.config import QuantConfig
from fheconv.basics.samples import Samples
from fheconv.capture.model import capture
from fheconv.networks.floats import Layer, Network
from fheconv.quantized import Model, QuantizedNetwork, quantized
from fheconv.training.controls import control
from fheconv.training.distilling import distill
from fheconv.training.finetuning import Augment, finetune
from fheconv.tuning.setting import Kind, Setting

if TYPE_CHECKING:
    from fheconv.capture.outputs import Outputs

# Bits of the weights before lookups, which the width of accumulators limits anyway, and of the last layer's
# weights, whose width costs little (see `fheconv.lowering.planes`).
WEIGHT_BITS, LAST_WEIGHT_BITS = 4, 6
# Bits of a linear control's weights: without lookups, they cost nothing.
LINEAR_WEIGHT_BITS = 8
# Bits of the image, where windows are not proved. More bits cost nothing there.
INPUT_BITS = 6


class Floats(NamedTuple):
    """A model, which of its outputs is meant, the names of its layers with lookups, and the last layer's."""

    model: Model
    outputs: "Outputs"
    layers: list[str]
    last: str

    @classmethod
    def of(cls, model: Model, network: Network, outputs: "Outputs" = None) -> "Floats":
        """Return a model with the names of its captured network's layers."""
        layers = [one.name for one in network.layers if isinstance(one, Layer) and one.activation]
        return cls(model, outputs, layers, network.layers[-1].name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """Makes the network of a setting from the model, and keeps it: none is made twice.

    `training` is None if nothing is trained, `classes` is the number of the model's scores.
    """

    given: Floats
    calibration: Array
    training: Samples | None
    classes: int
    augment: Augment | None
    epochs: int
    config: QuantConfig
    seed: int
    networks: dict[Setting, QuantizedNetwork]
    _trained: dict[tuple[Kind, int | None], Floats] = field(default_factory=dict)

    def network(self, setting: Setting) -> QuantizedNetwork:
        """Return the network of a setting.

        Raises `AccumulatorOverflowError` if its widths have no room for a weight, `LookupBudgetError` if the
        model cannot do with so few lookups.
        """
        if setting not in self.networks:
            self.networks[setting] = (
                self._fine_tuned(setting) if setting.fine_tuned else self._quantized(setting)
            )
        return self.networks[setting]

    def _fine_tuned(self, setting: Setting) -> QuantizedNetwork:
        # Students and controls have as few lookups from the start.
        thinned = setting.lookup_budget if setting.kind == "model" else None
        before = replace(setting, fine_tuned=False)
        return finetune(
            self.network(replace(before, lookup_budget=None) if setting.kind == "model" else before),
            self.training or (),
            epochs=self.epochs,
            augment=self.augment,
            lookup_budget=thinned,
            seed=self.seed,
        )

    def _quantized(self, setting: Setting) -> QuantizedNetwork:
        floats = self._floats(setting.kind, setting.lookup_budget)
        config = self.config
        if setting.kind != "model":  # layers of other networks have other names
            config = replace(config, activation_levels=None)
        config = _with_widths(config, setting, floats)
        return quantized(floats.model, self.calibration, config, floats.outputs, advise=False)

    def _floats(self, kind: Kind, lookups: int | None) -> Floats:
        """Return the float model of a setting, trained if that has not been done."""
        if kind == "model" or self.training is None:
            return self.given
        key = kind, lookups
        if key not in self._trained:
            model = (
                distill(
                    self.given.model,
                    self.training.images,
                    lookup_budget=lookups or 0,
                    epochs=self.epochs,
                    augment=self.augment,
                    seed=self.seed,
                    outputs=self.given.outputs,
                )
                if kind == "student"
                else control(
                    self.training,
                    lookups=lookups or 0,
                    classes=self.classes,
                    epochs=self.epochs,
                    augment=self.augment,
                    seed=self.seed,
                )
            )
            self._trained[key] = Floats.of(model, capture(model, self.training.images.shape[1:]))
        return self._trained[key]


def _with_widths(config: QuantConfig, setting: Setting, floats: Floats) -> QuantConfig:
    """Return the configuration with the widths of a setting."""
    if not floats.layers:
        return replace(
            config,
            method="auto",
            weight_bits=LINEAR_WEIGHT_BITS,
            accumulator_bits=None,
            rounding_bits=None,
            input_bits=INPUT_BITS,
        )
    bits, kept = setting.accumulator_bits, setting.rounding_bits
    config = replace(
        config,
        method="auto",
        rounding_bits=None if kept is None else dict.fromkeys(floats.layers, kept),
        weight_bits="auto"
        if config.asks("weight_bits")
        else dict.fromkeys(floats.layers, WEIGHT_BITS) | {floats.last: LAST_WEIGHT_BITS},
    )
    if bits is None:
        return replace(
            config, overflow="defined", accumulator_bits=None, activation_bits=None, input_bits=INPUT_BITS
        )
    return replace(
        config,
        overflow="proved",
        accumulator_bits=dict.fromkeys(floats.layers, bits),
        activation_bits="auto",
        input_bits="auto",
    )
