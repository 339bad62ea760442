"""Images a little outside the calibrated range are clipped and counted; those further outside are refused."""

import json
import warnings

import numpy as np
import pytest

import fheconv
from fheconv.circuits.files.interface import interface_from_dict, interface_text
from fheconv.lowering.lower import lower

WEIGHT = np.array([[[[1.0, -2.0], [0.5, 1.0]]]])
SHAPE = (1, 4, 4)


def network(calibration, **options):
    return fheconv.quantize(WEIGHT, calibration.reshape(1, *SHAPE), fheconv.QuantConfig(**options))


REAL = np.linspace(0, 1, 16)
INTEGERS = np.arange(16) * 17  # 0..255


@pytest.mark.parametrize(
    ("calibration", "options", "near", "far"),
    [
        (REAL, {}, 1.049, 1.06),
        (REAL, {"slack": 0.5}, 1.49, 1.6),
        (REAL - 1, {}, -1.049, -1.06),
        (INTEGERS, {"input_bits": 8}, 267, 268),
        (INTEGERS, {"input_bits": 8}, -12, -13),
    ],
)
def test_what_is_near_is_clipped_and_what_is_far_is_refused(calibration, options, near, far):
    q = network(calibration, **options)
    images = np.stack([calibration.reshape(SHAPE)] * 2)
    images[1, 0, 2, 1:3] = near
    with pytest.warns(fheconv.InputRangeWarning, match="2 of 32 values") as warned:
        clipped, _ = q.quantize_input(images)
    assert len(warned) == 1
    assert clipped.min() >= q.input.minimum
    assert clipped.max() <= q.input.maximum
    inside = np.clip(images, calibration.min(), calibration.max())
    assert (clipped == q.quantize_input(inside)[0]).all()
    images[1, 0, 0, 0] = far
    with pytest.raises(fheconv.InputRangeError, match=r"at \(1, 0, 0, 0\) is outside.*slack"):
        q.quantize_input(images)


@pytest.mark.parametrize(("calibration", "value"), [(REAL, 1.04), (INTEGERS, 256)])
def test_without_slack_nothing_is_clipped(calibration, value):
    q = network(calibration, input_bits=8, slack=0)
    with pytest.raises(fheconv.InputRangeError):
        q(np.full(SHAPE, value))


def test_half_a_step_outside_is_rounding_and_nothing_to_warn_of():
    q = network(REAL, input_bits=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert q.quantize_input(np.full(SHAPE, 1.1))[0].max() == 3


def test_the_client_and_the_circuit_clip_like_the_network(tmp_path):
    q = network(REAL)
    circuit = fheconv.compile(q)
    circuit.save(tmp_path)
    client = fheconv.load_client(tmp_path / "client.zip")
    client.keygen()
    server = fheconv.load_server(tmp_path / "server.zip")
    outside, inside = np.full(SHAPE, 1.045), np.ones(SHAPE)
    with pytest.warns(fheconv.InputRangeWarning, match="16 of 16"):
        encrypted = client.encrypt(outside)
    result = client.decrypt(server.run(encrypted, client.evaluation_keys))
    assert (result == q(inside)).all()
    with pytest.warns(fheconv.InputRangeWarning):
        assert (circuit.predict(outside, fhe="simulate") == q(inside)).all()
    with pytest.raises(fheconv.InputRangeError):
        client.encrypt(np.full(SHAPE, 1.2))


def test_files_of_circuits_without_slack_are_as_before():
    text = interface_text(lower(network(REAL, slack=0)).interface)
    assert "slack" not in json.loads(text)["input"]
    assert interface_from_dict(json.loads(text)).input.slack == 0


@pytest.mark.parametrize("slack", [-0.1, 1.1, "0", None, True])
def test_a_slack_that_is_no_share_is_refused(slack):
    with pytest.raises(fheconv.InvalidArgumentError, match="slack"):
        fheconv.QuantConfig(slack=slack)
    data = json.loads(interface_text(lower(network(REAL)).interface))
    data["input"]["slack"] = slack
    with pytest.raises(fheconv.ArtifactError, match="slack"):
        interface_from_dict(data)
