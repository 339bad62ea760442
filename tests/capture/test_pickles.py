"""Files and results of torch.save get an answer that says what to do, and nothing in them runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.capture.checkpoint import load_model
from fheconv.capture.pickles import check_no_pickle

IMAGES = np.zeros((2, 1, 4, 4))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


class Whole(nn.Module):
    """A model of one's own class."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 2)

    def forward(self, x):
        return self.conv(x)


OPTIMIZER = torch.optim.SGD(Whole().parameters(), momentum=0.9)


def saved(path, what, **options):
    torch.save(what, path, **options)
    return path


def answer(path):
    with pytest.raises(fheconv.InvalidArgumentError) as caught:
        check_no_pickle(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        Whole().state_dict(),
        Whole().half().state_dict(),
        {"epoch": 3, "model": Whole().state_dict(), "optimizer": OPTIMIZER.state_dict()},
        torch.zeros(2),
    ],
    ids=["weights", "half precision", "checkpoint", "tensor"],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["pth", "pt", "weights"])
def test_weights_go_into_a_model_of_ones_own(tmp_path, state, ending):
    path = saved(tmp_path / f"m.{ending}", state)
    said = answer(path)
    for word in (str(path), "state_dict", "weights_only=True", "fheconv.quantize", "torch.export.save"):
        assert word in said
    assert "whole" not in said


def test_a_whole_model_is_for_those_who_trust_it(tmp_path):
    for what in (Whole(), nn.Sequential(nn.ReLU()), {"model": Whole()}):
        said = answer(saved(tmp_path / "m.pth", what))
        assert "a whole pickled model. Only if you trust whoever wrote it" in said
        assert "weights_only=False" in said


def test_a_torchscript_program_is_told_apart(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(Whole(), torch.zeros(1, 1, 4, 4)), tmp_path / "m.pt")
    assert "TorchScript" in answer(tmp_path / "m.pt")


def test_what_does_not_show_gets_advice_for_weights(tmp_path):
    old = saved(tmp_path / "old.pth", Whole().state_dict(), _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pth").write_bytes(b"")
    for path in (old, tmp_path / "empty.pth", tmp_path / "missing.pth", tmp_path):
        if path.suffix:
            assert "If it holds weights" in answer(path)
        else:
            check_no_pickle(path)  # a folder


def test_nothing_in_a_file_runs(tmp_path):
    trace = tmp_path / "ran"
    path = saved(tmp_path / "m.pth", {"a": torch.zeros(1), "trap": Trap(trace)})
    assert "whole pickled model" in answer(path)
    for trusted in (False, True):
        with pytest.raises(fheconv.InvalidArgumentError):
            load_model(path, trusted=trusted)
    with pytest.raises(fheconv.InvalidArgumentError):
        fheconv.quantize(path, IMAGES)
    assert not trace.exists()


def test_what_torch_load_returned_is_recognised():
    """The code that the message names gives the model."""
    with pytest.raises(fheconv.InvalidArgumentError, match=r"conv.weight.*model\.load_state_dict\(this\)"):
        fheconv.quantize(Whole().state_dict(), IMAGES)
    checkpoint = {"epoch": 1, "state_dict": Whole().state_dict()}
    with pytest.raises(fheconv.InvalidArgumentError, match=r"load_state_dict\(this\['state_dict'\]\)"):
        fheconv.quantize(checkpoint, IMAGES)


@pytest.mark.parametrize("path", ["model.pth", Path("model.pt")])
def test_a_path_is_no_model(path):
    with pytest.raises(fheconv.InvalidArgumentError, match=r"weights_only=True"):
        fheconv.quantize(path, IMAGES)
    with pytest.raises(fheconv.InvalidArgumentError, match=r"is a path, and no model"):
        fheconv.quantize(str(path.with_suffix(".onnx") if isinstance(path, Path) else "model"), IMAGES)
