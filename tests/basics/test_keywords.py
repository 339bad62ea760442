import inspect
from dataclasses import fields, replace

import numpy as np
import pytest

import fheconv
from fheconv.basics.keywords import answers_keywords

IMAGE = np.arange(16).reshape(1, 4, 4)
CALLS = {
    "QuantConfig": fheconv.QuantConfig,
    "CompileConfig": fheconv.CompileConfig,
    "quantize": lambda **named: fheconv.quantize([[1, 2]], IMAGE, **named),
    "compile": lambda **named: fheconv.compile(fheconv.quantize([[1, 2]], IMAGE), **named),
    "compile_tiled": lambda **named: fheconv.compile_tiled(fheconv.quantize([[1, 2]], IMAGE), 2, **named),
    "tune": lambda **named: fheconv.tune([[1, 2]], IMAGE, evaluation=(IMAGE, [0]), **named),
    "finetune": lambda **named: fheconv.finetune(fheconv.quantize([[1, 2]], IMAGE), IMAGE, **named),
}


def refusal(call, **named):
    with pytest.raises(fheconv.InvalidArgumentError) as raised:
        CALLS[call](**named)
    assert isinstance(raised.value, TypeError)
    return str(raised.value)


@pytest.mark.parametrize(
    ("call", "wrong", "right"),
    [
        ("QuantConfig", "weights_bits", "weight_bits"),
        ("QuantConfig", "activations_bits", "activation_bits"),
        ("QuantConfig", "rounding_bit", "rounding_bits"),
        ("QuantConfig", "perchannel", "per_channel"),
        ("CompileConfig", "perror", "p_error"),
        ("CompileConfig", "engin", "engine"),
        ("quantize", "callibration", "calibration"),
        ("compile", "p_eror", "p_error of fheconv.CompileConfig"),
        ("quantize", "weights_bits", "weight_bits of fheconv.QuantConfig"),
        ("compile", "conf", "config"),
        ("compile_tiled", "tiles", "tile"),
        ("tune", "eval", "evaluation"),
        ("tune", "max_dropp", "max_drop"),
        ("finetune", "epoch", "epochs"),
        ("finetune", "lr", "learning_rate"),
    ],
)
def test_a_wrong_keyword_gets_the_nearest_right_one(call, wrong, right):
    said = refusal(call, **{wrong: 4})
    assert said.startswith(f"{call} has no {wrong}=4; ")
    assert said.endswith((f" is {right}.", f", {right}.")) or f" {right}," in said


@pytest.mark.parametrize("config", [fheconv.QuantConfig, fheconv.CompileConfig])
@pytest.mark.parametrize("call", ["quantize", "compile", "tune", "QuantConfig", "CompileConfig"])
def test_what_belongs_into_a_configuration_is_said_so(call, config):
    """Each option of a configuration, given to another call."""
    own = {"QuantConfig": "QuantConfig", "CompileConfig": "CompileConfig"}.get(call)
    if own == config.__name__:
        return
    for field in fields(config):
        said = refusal(call, **{field.name: 0.5})
        assert f"give fheconv.{config.__name__}({field.name}=0.5)" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n_bits", ["weight_bits", "activation_bits", "input_bits"]),
        ("rounding_threshold_bits", ["rounding_bits"]),
        ("import_qat", ["leave it out"]),
        ("torch_inputset", ["calibration"]),
        ("device", ["CPU"]),
        ("simulate", ['fhe="simulate"']),
        ("verbose", ["leave it out"]),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_names_of_concrete_ml_are_answered(call, name, words):
    said = refusal(call, **{name: 4})
    for word in words:
        assert word in said
        if word.endswith("bits"):
            assert word in {field.name for field in fields(fheconv.QuantConfig)}


def test_a_name_like_nothing_gets_all_names():
    said = refusal("QuantConfig", zzz="a" * 1000)
    assert len(said) < 500
    for field in fields(fheconv.QuantConfig):
        assert field.name in said


def test_what_is_right_goes_through_as_it_was():
    config = replace(fheconv.QuantConfig(weight_bits=3), input_bits=2)
    assert (config.weight_bits, config.input_bits) == (3, 2)
    with pytest.raises(fheconv.UnknownKeywordError):
        replace(config, n_bits=3)
    assert list(inspect.signature(fheconv.quantize).parameters) == [
        "module",
        "calibration",
        "config",
        "outputs",
    ]
    assert "weight_bits" in inspect.signature(fheconv.QuantConfig).parameters

    @answers_keywords
    def double(number, *, times=2):
        """Multiply."""
        return number * times

    assert (double(3), double(number=3, times=5), double.__doc__) == (6, 15, "Multiply.")
    with pytest.raises(TypeError, match="missing"):
        double()


def test_methods_of_circuits_answer_too():
    circuit = fheconv.compile(fheconv.quantize([[1, 2]], IMAGE))
    with pytest.raises(fheconv.UnknownKeywordError, match=r'predict has no simulate=True; .*fhe="simulate"'):
        circuit.predict(IMAGE, simulate=True)
    with pytest.raises(fheconv.UnknownKeywordError, match="keygen has no force=True; leave it out"):
        circuit.keygen(force=True)
    with pytest.raises(fheconv.UnknownKeywordError, match="the nearest that it has is runs"):
        circuit.verify(IMAGE, run=2)
    with pytest.raises(fheconv.UnknownKeywordError, match="keygen has no zzz=1; it takes none"):
        circuit.keygen(zzz=1)
    assert circuit.predict(IMAGE, fhe="simulate").shape == circuit.predict(x=IMAGE).shape
