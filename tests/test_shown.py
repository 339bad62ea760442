"""What Python's prompt and notebooks show of the objects that users hold."""

import dataclasses
import inspect
import re
from functools import cache

import numpy as np
import pytest
from torch import nn

import fheconv
from fheconv.basics.report import MOST_LINES, Brief
from tests.support import serving

IMAGE = np.arange(16).reshape(1, 4, 4)


@cache
def deep(layers):
    """An integer network of so many layers with weights, whose names could be taken for markup."""
    model = nn.Sequential()
    for number in range(layers - 1):
        model.add_module(f"<b>{number}", nn.Conv2d(1, 1, 3, padding=1))
        model.add_module(f"relu{number}", nn.ReLU())
    model.add_module("last", nn.Conv2d(1, 1, 3, padding=1))
    return fheconv.quantize(model.eval(), np.ones((2, 1, 5, 5)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """An object of every public class, by its name."""
    folder = tmp_path_factory.mktemp("shown")
    serving.save(folder)
    network, client = serving.network(), serving.keyed_client(folder)
    server = fheconv.load_server(folder / "server.zip")
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=0.01))
    filtering = fheconv.quantize([[1, -2]], IMAGE)
    tiled = fheconv.compile_tiled(filtering, (2, 2))
    tiled.keygen()
    scores = fheconv.compile(fheconv.quantize(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), IMAGE[None]))
    setting = fheconv.Setting(rounding_bits=5)
    budget, forecast = deep(30).budget(), network.forecast()
    point = fheconv.TunePoint(
        setting=setting,
        network=network,
        config=circuit.config,
        accuracy=0.9,
        clear_accuracy=0.9,
        cost=circuit.cost,
        seconds=1.0,
    )
    result = fheconv.TuneResult(
        objective="latency", float_accuracy=0.9, points=(point,), networks={setting: network}, reason=""
    )
    with serving.serving(server, folder / "keys") as url:
        remote = fheconv.RemoteCircuit(url.replace("http://", "http://me:secret@"), client)
        objects = [
            *(network, client, server, circuit, tiled, setting, budget, forecast, point, result, remote),
            *(
                circuit.cost,
                tiled.cost,
                filtering.forecast(tile=2),
                client.manifest,
                forecast.layers[0],
                budget.layers[0],
            ),
            *(budget.layers[0].channels[0], network.to_torch(), client.evaluation_keys),
            *(client.encrypt(serving.images(1)), tiled.verify(IMAGE), fheconv.QuantConfig()),
            *(circuit.config, fheconv.ParameterRange(), fheconv.Conv.of(np.ones((9, 9, 3, 3)))),
            fheconv.Conv.of([[1, 2]]).geometry,
            fheconv.accumulator_bounds([[[1, -1]]], fheconv.ConvGeometry.of((2,)), (4,), (0, 3)),
            fheconv.Mismatch(position=(0, 1), expected=3, got=4),
            *(fheconv.Cascade(scores, scores, margin=1.0), fheconv.Tls()),
            fheconv.compile(network, circuit.config, stages="layers"),
            fheconv.CascadeCost(first=circuit.cost, second=circuit.cost, share=0.5),
        ]
        yield {type(one).__name__: one for one in objects}


def public_classes():
    found = (getattr(fheconv, name) for name in fheconv.__all__)
    return [one for one in found if inspect.isclass(one) and not issubclass(one, Exception)]


@pytest.mark.parametrize("kind", public_classes(), ids=lambda kind: kind.__name__)
def test_an_object_is_shown_in_a_few_lines(shown, kind):
    text = repr(shown[kind.__name__])
    assert 1 <= len(text.splitlines()) <= MOST_LINES
    assert len(text) <= 1200
    assert " at 0x" not in text
    assert "array(" not in text


def test_what_is_shown_says_what_the_object_is(shown):
    circuit, client, remote = (shown[name] for name in ("FheCircuit", "Client", "RemoteCircuit"))
    network = repr(shown["QuantizedNetwork"])
    for layer in serving.network().layers:
        assert layer.name in network
    assert "keygen() makes them" in repr(circuit)
    assert "keygen() makes them" not in repr(client)
    for one in (circuit, client, shown["Server"], remote):
        assert one.fingerprint[:12] in repr(one)
        assert f"{one.cost.lookups:,}, failing: {one.cost.failures}" in repr(one)
    assert "127.0.0.1" in repr(remote)
    assert "secret" not in repr(remote)


def test_what_a_network_is_made_of_is_shown_in_a_line():
    network = deep(3)
    for part in (network.source, *network.source.layers, *network.layers):
        assert re.fullmatch(r"\w+( '.*')?[: ]+.{5,150}", repr(part))
        assert "array" not in repr(part)


def test_long_reports_say_how_to_see_all(shown):
    budget = shown["BudgetReport"]
    lines = repr(budget).splitlines()
    assert lines[:-1] == str(budget).splitlines()[: len(lines) - 1]
    assert lines[-1] == f"… print() shows all {len(str(budget).splitlines())} lines."


def test_a_network_of_many_layers_says_how_many_are_left_out():
    lines = repr(deep(30)).splitlines()
    assert len(lines) == MOST_LINES
    assert lines[-1].strip() == f"… and {30 - (len(lines) - 2)} more"
    lines = repr(deep(9)).splitlines()
    assert len(lines) == MOST_LINES
    assert lines[-1].split()[0] == "last"


@pytest.mark.parametrize("name", ["QuantizedNetwork", "FheCircuit", "Client", "RemoteCircuit", "TuneResult"])
def test_notebooks_show_a_table(shown, name):
    html = shown[name]._repr_html_()
    assert html.startswith(("<table>", "<pre"))
    words = re.sub("<[^>]*>", " ", html).split()
    assert set(words) & set(repr(shown[name]).split())


def test_names_are_no_markup():
    html = deep(2)._repr_html_()
    assert "&lt;b&gt;0" in html
    assert "<b>" not in html


@dataclasses.dataclass
class Wordy(Brief):
    """An object whose name has line breaks and no end."""

    name: str

    def _summary(self):
        return self.name, [(self.name, "")]


@pytest.mark.parametrize("name", ["a\nb" * 1000, "x" * 10**6])
def test_words_are_short(name):
    lines = Brief.__repr__(Wordy(name)).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) < 150


def test_configurations_are_shown_as_the_call_that_makes_them():
    for config in (
        fheconv.QuantConfig(weight_bits={"conv1": 3}, rounding_bits=5, overflow="defined"),
        fheconv.CompileConfig(p_error=0.05, engine="shifts", parameters=fheconv.ParameterRange()),
    ):
        names = {name: getattr(fheconv, name) for name in ("QuantConfig", "CompileConfig", "ParameterRange")}
        assert eval(repr(config), names) == config
    assert repr(fheconv.CompileConfig()) == "CompileConfig()"
