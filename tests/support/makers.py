"""Small networks that the tools of others train for integers: Brevitas, and torchao's PT2E."""

import brevitas.nn as qnn
import torch
from brevitas.quant import Int8ActPerTensorFloat, SignedBinaryActPerTensorConst
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization.pt2e import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    move_exported_model_to_eval,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

SHAPE = (1, 8, 8)
STEPS = 5


class Brevitas(nn.Module):
    """Images of 4 bits, weights and activations of 3; as tensors of torch, or as Brevitas's own."""

    def __init__(self, *, quant_tensors: bool) -> None:
        super().__init__()
        self.image = qnn.QuantIdentity(bit_width=4, return_quant_tensor=quant_tensors)
        self.conv = qnn.QuantConv2d(1, 2, 3, stride=2, weight_bit_width=3, bias=False)
        self.activation = qnn.QuantReLU(bit_width=3, return_quant_tensor=quant_tensors)
        self.fc = qnn.QuantLinear(18, 3, bias=True, weight_bit_width=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.activation(self.conv(self.image(x))).flatten(1))


class Layers(nn.Module):
    """Layers of Brevitas that round what they read, a sum that rounds its parts, and binary activations."""

    def __init__(self) -> None:
        super().__init__()
        reading = {"input_quant": Int8ActPerTensorFloat, "input_bit_width": 4, "weight_bit_width": 3}
        self.a, self.b = (qnn.QuantConv2d(n, 2, 3, padding=1, **reading) for n in (1, 2))
        self.relu = qnn.QuantReLU(bit_width=4)
        self.sum = qnn.QuantEltwiseAdd(input_bit_width=4, output_bit_width=4, return_quant_tensor=True)
        self.bn = nn.BatchNorm2d(2)
        self.binary = qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst)
        self.fc = qnn.QuantLinear(128, 3, bias=True, weight_bit_width=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        return self.fc(self.binary(self.bn(self.sum(x, self.b(x)).value)).flatten(1))


class FewBits(Quantizer):
    """Has what enters convolutions and linear layers in 4 bits, and their weights in 3 bits a channel."""

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        entering = QuantizationSpec(
            dtype=torch.uint8, quant_min=0, quant_max=15, qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
        )  # fmt: skip
        weight = QuantizationSpec(
            dtype=torch.int8, quant_min=-3, quant_max=3, qscheme=torch.per_channel_symmetric, ch_axis=0,
            observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver),
        )  # fmt: skip
        for node in model.graph.nodes:
            if str(node.target) in ("aten.conv2d.default", "aten.linear.default"):
                specs = dict(zip(node.args[:2], (entering, weight), strict=True))
                annotation = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
                node.meta["quantization_annotation"] = annotation
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        """Accept every model."""


def trained_by_brevitas(*, quant_tensors: bool = False) -> nn.Module:
    """Train a network with Brevitas for a few steps."""
    torch.manual_seed(0)
    model = Brevitas(quant_tensors=quant_tensors)
    _train(model)
    return model.eval()


def trained_by_layers_of_brevitas() -> nn.Module:
    """Train a network whose layers round what they read for a few steps."""
    torch.manual_seed(0)
    model = Layers()
    _train(model)
    return model.eval()


def trained_by_torchao() -> nn.Module:
    """Train a network with PT2E for a few steps, and convert it to integer weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.rand(2, *SHAPE),), dynamic_shapes=any_batch)
    prepared = prepare_qat_pt2e(exported.module(), FewBits())
    _train(prepared)
    move_exported_model_to_eval(prepared)
    return convert_pt2e(prepared)


def results(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the model computes, without the scale that Brevitas adds."""
    y = model(images)
    return y if isinstance(y, Tensor) else y.value


def _train(model: nn.Module) -> None:
    images, labels = torch.rand(64, *SHAPE), torch.randint(3, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(results(model, images), labels).backward()
        optimizer.step()
