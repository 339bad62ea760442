import copy
import inspect
import pickle

import pytest

import fheconv
from fheconv import AccumulatorOverflowError, FheConvError
from fheconv.basics import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == "fheconv.basics.errors"
]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_in_the_tree_exported_and_drawn(error):
    assert issubclass(error, FheConvError | Warning)
    assert getattr(fheconv, error.__name__) is error
    assert error.__name__ in fheconv.__all__
    assert error.__name__ in errors.__doc__


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InvalidArgumentError", ValueError),
        ("CalibrationError", ValueError),
        ("InputRangeError", ValueError),
        ("AccumulatorOverflowError", OverflowError),
    ],
)
def test_errors_that_python_has_a_name_for_are_caught_by_it(name, builtin):
    assert issubclass(getattr(fheconv, name), builtin)


@pytest.mark.parametrize("error", CLASSES)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_errors_survive_the_way_between_processes(error, again):
    original = error("what was wrong")
    original.add_note("where")
    other = again(original)
    assert type(other) is error
    assert str(other) == "what was wrong"
    assert other.__notes__ == ["where"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_overflow_keeps_its_attributes_on_the_way(protocol):
    attributes = {
        "layer": "conv",
        "channel": 3,
        "value": 300,
        "limit": 127,
        "remedy": "input_bits=3",
        "settings": {"input_bits": 3},
    }
    other = pickle.loads(pickle.dumps(AccumulatorOverflowError("too wide", **attributes), protocol))
    assert str(other) == "too wide"
    assert vars(other) == attributes


def test_an_overflow_without_a_layer_says_so():
    values = vars(AccumulatorOverflowError("too wide"))
    assert values.pop("settings") == {}
    assert set(values.values()) == {None}
