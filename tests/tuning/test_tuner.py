"""The search itself; how it is used on a trained network, its benchmark and notebook show."""

import itertools
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.tuning import making, parameters, trying
from fheconv.tuning import search as tuner
from fheconv.tuning.result import TunePoint, TuneResult
from fheconv.tuning.setting import Setting
from fheconv.tuning.trying import LINEAR

IMAGES = np.random.default_rng(0).uniform(0, 1, (60, 1, 4, 4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 3, 2)
        self.fc = nn.Linear(27, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


NET = Net().double().eval()
with torch.no_grad():
    CLASSES = NET(torch.tensor(IMAGES)).argmax(1).numpy()
WIDTHS = ((7, 4), (5, None))
P_ERRORS = (1e-2, 5e-2)


def tuned(**options):
    options = {"widths": WIDTHS, "p_errors": P_ERRORS, "max_drop": 0.3, **options}
    return fheconv.tune(NET, IMAGES[:40], evaluation=(IMAGES[40:], CLASSES[40:]), **options)


@pytest.fixture(scope="module")
def result():
    return tuned(objective="complexity")


def test_every_width_and_probability_is_tried_and_the_float_network_is_right(result):
    assert result.float_accuracy == 1.0
    tried = {(p.setting.accumulator_bits, p.setting.rounding_bits, p.config.p_error) for p in result.points}
    assert tried <= {(*width, p) for width in WIDTHS for p in P_ERRORS}
    assert {p.setting for p in result.points} == set(result.networks)
    assert len(result.points) >= 2


def test_widths_are_proved_and_kept(result):
    for point in result.points:
        for layer in point.network.budget().layers:
            assert layer.proved
            if layer.lookups:
                assert layer.accumulator_bits <= point.setting.accumulator_bits
                assert layer.lookup_bits <= (point.setting.rounding_bits or point.setting.accumulator_bits)


def test_without_widths_windows_lie_where_calibration_leads():
    """No width of bits is searched: what the search sets is what was asked."""
    some = tuned(widths=tuner.WIDTHS[1:2], p_errors=P_ERRORS[:1])
    (point,) = some.points
    assert str(point.setting) == "windows of 5 bits"
    config = point.network.config
    assert (config.overflow, config.accumulator_bits, config.input_bits) == (
        "defined",
        None,
        making.INPUT_BITS,
    )
    assert [layer.lookup_bits for layer in point.network.budget().layers if layer.lookups] == [5]
    assert str(point.setting) in str(some)


def test_windows_without_a_width_are_refused():
    with pytest.raises(fheconv.InvalidArgumentError, match="need a width after rounding"):
        tuned(widths=[(None, None)])


def test_a_point_compiles_as_it_is(result):
    for point in result.front:
        cost = point.compile().cost
        assert (cost.complexity, cost.key_bytes) == (point.cost.complexity, point.cost.key_bytes)
        exact = (point.network(IMAGES[40:]).argmax(1) == CLASSES[40:]).mean()
        assert point.clear_accuracy == exact


def test_the_front_is_what_no_other_point_beats(result):
    def beats(a, b):
        better = a.cost.complexity < b.cost.complexity or a.accuracy > b.accuracy
        return better and a.cost.complexity <= b.cost.complexity and a.accuracy >= b.accuracy

    front = result.front
    assert not any(beats(a, b) for a in result.points for b in front)
    for point in result.points:
        if point not in front:
            assert any(
                other.cost.complexity <= point.cost.complexity and other.accuracy >= point.accuracy
                for other in front
            )
    values = [point.cost.complexity for point in front]
    assert values == sorted(values)


def test_what_loses_too_much_is_no_point(result):
    strict = tuned(max_drop=0.001, previous=result)
    assert all(point.accuracy >= strict.float_accuracy - 0.001 for point in strict.points)


def test_an_earlier_result_is_not_made_again(result):
    with mock.patch.object(making, "quantized", side_effect=RuntimeError("made again")):
        again = tuned(objective="complexity", previous=result)
    assert [p.cost.complexity for p in again.points] == [p.cost.complexity for p in result.points]
    assert [p.accuracy for p in again.points] == [p.accuracy for p in result.points]


def test_an_interruption_returns_what_there_is(result):
    real, calls = trying.FheCircuit, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with mock.patch.object(trying, "FheCircuit", side_effect=interrupted):
        some = tuned(previous=result)
    assert 1 <= len(some.points) <= 2
    assert some.reason.startswith("Interrupted")


@pytest.mark.slow
def test_fine_tuned_students_and_controls_with_fewer_lookups():
    options = {
        "widths": ((None, 4),),
        "p_errors": (1e-2,),
        "max_drop": 0.99,
        "training": (IMAGES[:40], CLASSES[:40]),
        "epochs": 3,
        "lookup_budgets": (20, 5),
    }
    some = tuned(**options, students=True)
    lookups = {(p.setting.kind, p.setting.lookup_budget): p.cost.lookups for p in some.points}
    assert lookups.keys() == {("model", None), *itertools.product(("model", "student"), (20, 5))}
    assert lookups["model", None] <= 27  # a channel that training leaves constant takes none
    assert all(count <= (budget or 27) for (_, budget), count in lookups.items())
    linear, *hidden = some.controls
    assert (linear.cost.lookups, linear.cost.key_bytes) == (0, 0)
    assert 0 < linear.seconds < 0.01
    assert {control.setting.lookup_budget for control in hidden} == {p.cost.lookups for p in some.front} - {0}
    for control in some.controls:
        assert control.setting.kind == "control"
        assert control.compile().cost.lookups == control.cost.lookups <= control.setting.lookup_budget
    with mock.patch.object(making, "quantized", side_effect=RuntimeError("made again")):
        again = tuned(**options, students=True, previous=some)
    for before, now in ((some.points, again.points), (some.controls, again.controls)):
        assert [point.accuracy for point in before] == [point.accuracy for point in now]


@pytest.mark.slow
def test_a_budget_that_the_model_cannot_do_with_is_left_out_and_named(result):
    def finetune(network, data, *, lookup_budget, **options):
        if lookup_budget is not None:
            raise fheconv.LookupBudgetError(f"lookup_budget={lookup_budget} is too small.")
        return network

    with mock.patch.object(making, "finetune", finetune):
        some = tuned(
            widths=WIDTHS[1:],
            p_errors=(1e-2,),
            training=(IMAGES[:40], CLASSES[:40]),
            epochs=1,
            lookup_budgets=(5,),
            previous=result,
        )
    assert [point.setting.lookup_budget for point in some.points] == [None]
    assert some.reason.endswith("lookup_budget=5 is too small.")


@pytest.mark.slow
def test_an_earlier_result_without_training_is_where_training_starts(result):
    some = tuned(
        widths=WIDTHS[1:],
        p_errors=(1e-2,),
        max_drop=0.9,
        training=(IMAGES[:40], CLASSES[:40]),
        epochs=2,
        previous=result,
    )
    (point,) = some.points
    assert point.setting.fine_tuned
    assert "fine-tuned" in str(some)
    untrained = replace(point.setting, fine_tuned=False)
    assert some.networks[untrained] is result.networks[untrained] is not point.network


def test_what_fixes_the_parameters_that_measuring_would_try_is_refused():
    fixed = fheconv.CompileConfig(parameters=fheconv.ParameterRange(glwe_dimensions=(1,)))
    with pytest.raises(fheconv.InvalidArgumentError, match="leave one of the two"):
        tuned(measure=True, compile_config=fixed)


@pytest.mark.parametrize(("points", "timed"), [(0, []), (1, [0]), (3, [0, 1, 2]), (7, [0, 2, 4, 6])])
def test_points_from_the_cheapest_to_the_most_accurate_are_timed(points, timed):
    assert trying.spread(list(range(points))) == timed


@pytest.mark.slow
def test_bits_of_weights_are_searched_if_asked_for():
    config = fheconv.QuantConfig(weight_bits="auto", accumulator_bits="auto")
    some = tuned(widths=WIDTHS[1:], p_errors=(1e-2,), max_drop=0.9, config=config)
    network = some.points[0].network
    chosen = network.config.weight_bits
    assert set(chosen) == {layer.name for layer in network.layers}
    assert all(2 <= bits <= 6 for bits in chosen.values())
    assert network.config.accumulator_bits[network.layers[0].name] == 5


@pytest.mark.slow
def test_measured_points_say_so_and_are_as_accurate():
    with mock.patch.object(parameters, "RANGES", parameters.RANGES[-2:]):
        some = tuned(widths=((4, None),), p_errors=(5e-2,), measure=True)
    assert some.points
    for point in some.points:
        assert point.measured
        assert point.seconds > 0
        assert "expected" not in str(some)


def test_the_report_and_the_picture(result):
    text = str(result)
    for point in result.front:
        assert str(point.setting) in text
    assert "100.0% of the evaluation images are right in float" in text.replace("\n", " ")
    assert result.reason.split(":")[0] in text
    assert "<pre" in result._repr_html_()
    linear = points((0.0, 0.8), setting=LINEAR)
    hidden = points((1e6, 0.9), setting=replace(LINEAR, lookup_budget=4))
    for controls in ((), linear + hidden):
        axes = replace(result, controls=controls).plot()
        assert "complexity" in axes.get_xlabel()
        _, drawn = axes.get_legend_handles_labels()
        assert "front" in drawn
        assert [name for name in drawn if "control" in name] == [
            *["controls: hidden layers", "control: linear model"][: len(controls)]
        ]


PROVED = Setting(accumulator_bits=6)
LAYER = mock.Mock(lookups=4, lookup_bits=5)


def points(*pairs, setting=PROVED):
    """Points of these (seconds, accuracy), otherwise alike. A complexity is a thousand times the seconds."""
    network = mock.Mock()
    return tuple(
        TunePoint(
            setting=setting,
            network=network,
            config=fheconv.CompileConfig(),
            accuracy=accuracy,
            clear_accuracy=accuracy,
            cost=mock.Mock(complexity=1000 * seconds, key_bytes=1, p_error=0.01, lookups=4, layers=[LAYER]),
            seconds=seconds,
        )
        for seconds, accuracy in pairs
    )


def found(*pairs, **others):
    others = {"points": points(*pairs), **others}
    return TuneResult(objective="latency", float_accuracy=0.98, networks={}, reason="Tried.", **others)


def test_a_control_that_is_as_accurate_and_no_dearer_beats_a_circuit_and_the_report_begins_with_it():
    """Complexities that are nearly alike count as alike."""
    setting = Setting(kind="control", lookup_budget=4, rounding_bits=5)
    hidden = points((1.04, 0.9), (2.0, 0.96), (9.0, 0.965), setting=setting)  # the last one beats none
    linear = points((0.0, 0.8), setting=LINEAR)
    result = found((1.0, 0.90), (1.5, 0.93), (3.0, 0.95), (4.0, 0.97), controls=(*linear, *hidden))
    assert [point.seconds for point in result.beaten] == [1.0, 3.0]
    for shown in (str(result), repr(result)):
        assert shown.startswith("Trivial models beat 2 of the front's 4 circuits")
        assert "The best is right for 96.0%" in " ".join(shown.split())
    assert str(setting) in " ".join(str(result).split())
    assert "Trivial models beat" in result._repr_html_()
    assert found((1.0, 0.9), controls=points((0.5, 0.89), setting=LINEAR)).beaten == ()
    assert found((1.0, 0.9)).beaten == ()


def test_circuits_that_no_control_beats_are_said_to_be_so():
    result = found((1.0, 0.9), controls=points((0.0, 0.8), setting=LINEAR))
    assert "more accurate than all controls" in str(result)
    assert "controls" not in str(found((1.0, 0.9)))


def test_students_are_named_and_may_be_left_out():
    own = points((2.0, 0.97), (4.0, 0.98))
    others = points((1.0, 0.975), setting=Setting(kind="student", lookup_budget=64, rounding_bits=5))
    result = found(points=(*own, *others))
    assert result.best(max_drop=0.02) is others[0]
    assert result.best(max_drop=0.02, students=False) is own[0]
    for shown in (str(result), repr(result), result._repr_html_()):
        assert "Students imitate your network, and are not it" in shown
        assert "student of 64 lookups" in shown
    with pytest.raises(fheconv.TuningError, match=r"the fastest for 97.0% in 2 s"):
        result.best(max_seconds=1.5, students=False)
    assert "Students" not in str(found((1.0, 0.9)))


def test_best_is_the_cheapest_accurate_or_the_most_accurate_fast_one():
    result = found((1.0, 0.90), (2.0, 0.97), (3.0, 0.975), (4.0, 0.96))
    assert result.best(max_drop=0.01).seconds == 2.0
    assert result.best(max_drop=0.006).seconds == 3.0
    assert result.best(max_seconds=2.5).accuracy == 0.97
    assert result.best(max_drop=0.2, max_seconds=2.5).seconds == 1.0
    assert [point.seconds for point in result.front] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "limits", [{"max_drop": 0.001}, {"max_seconds": 0.5}, {"max_drop": 0.01, "max_seconds": 1}]
)
def test_where_nothing_is_best_the_nearest_are_named(limits):
    with pytest.raises(fheconv.TuningError, match="No circuit") as refused:
        found((1.0, 0.90), (3.0, 0.975)).best(**limits)
    assert "97.5%" in str(refused.value)
    with pytest.raises(fheconv.TuningError, match="there are none"):
        found().best(**limits)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.5, 0.98)), min_size=1, max_size=5),
    st.none() | st.floats(0, 0.3),
    st.none() | st.floats(0.01, 100),
)
def test_the_limits_that_are_said_to_do_do(pairs, max_drop, max_seconds):
    result, limits = found(*pairs), {"max_drop": max_drop, "max_seconds": max_seconds}
    assume(max_drop is not None or max_seconds is not None)
    try:
        result.best(**limits)
    except fheconv.TuningError as error:
        advice = re.search(r"s\. (max_.*) would do\.$", str(error))[1]
        for one in advice.split(" or "):
            changed = {name: float(number) for name, number in re.findall(r"(max_\w+)=([\d.]+)", one)}
            assert changed
            result.best(**{**limits, **changed})


def test_best_of_what_must_be_said():
    with pytest.raises(fheconv.InvalidArgumentError, match="max_drop"):
        found((1.0, 0.9)).best()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "speed"}, "speed"),
        ({"lookup_budgets": (10,)}, "training"),
        ({"students": True}, "students=True needs lookup_budgets"),
        ({"max_drop": 0}, "max_drop"),
        ({"evaluation": IMAGES}, "pair"),
        ({"evaluation": (IMAGES, CLASSES[:3])}, "shape"),
        ({"evaluation": (IMAGES, CLASSES.astype(float))}, "integers"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(options, words):
    evaluation = options.pop("evaluation", (IMAGES, CLASSES))
    with pytest.raises(fheconv.InvalidArgumentError, match=words):
        fheconv.tune(NET, IMAGES, evaluation=evaluation, **options)


def test_networks_without_lookups_or_classes_are_refused():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with pytest.raises(fheconv.InvalidArgumentError, match="no lookups"):
        fheconv.tune(linear, IMAGES, evaluation=(IMAGES, CLASSES))
    maps = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2)).double()
    with pytest.raises(fheconv.InvalidArgumentError, match="score"):
        fheconv.tune(maps, IMAGES, evaluation=(IMAGES, CLASSES))


def test_what_the_search_sets_wins_over_the_config(result):
    config = fheconv.QuantConfig(weight_bits=1, overflow="proved")
    some = tuned(widths=((6, None),), p_errors=(1e-2,), config=config)
    (point,) = some.points
    assert replace(point.config, p_error=None) == fheconv.CompileConfig()
    assert point.network.config.weight_bits != 1
