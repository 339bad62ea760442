"""Numbers and texts in saved files that no circuit has: an error of ours, or they do no harm."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from rich.console import Console

import fheconv
from fheconv.circuits.files.archive import read_client
from fheconv.cli.inspection import inspect_file
from tests.support.files import parts_of, sealed, zipped

IMAGES = np.arange(8.0).reshape(2, 1, 2, 2)
STRANGE = [10**30, 10**400, 2**63, -1, 0, 0.5, 1e308, 1e-320, float("nan"), float("inf")]
STRANGE += [True, None, "[/x]", [], {}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("circuit")
    network = fheconv.quantize([[1.0, -2.0]], IMAGES)
    fheconv.compile(network, fheconv.CompileConfig(p_error=0.01)).save(made)
    return made


def leaves(data, path=()):
    """The places of all numbers and texts of JSON data, of lists the first."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from leaves(value, (*path, name))
    elif isinstance(data, list):
        if data:
            yield from leaves(data[0], (*path, 0))
    else:
        yield path


def changed(data, path, value):
    data = copy.deepcopy(data)
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return data


@pytest.mark.filterwarnings("ignore::fheconv.InputScaleWarning")
@pytest.mark.parametrize("part", ["manifest.json", "interface.json"])
def test_strange_values_are_errors_of_ours_or_do_no_harm(folder, tmp_path, part):
    parts = parts_of(folder / "client.zip")
    data = json.loads(parts[part])
    refused = taken = 0
    for path in leaves(data):
        for value in STRANGE:
            altered = {**parts, part: json.dumps(changed(data, path, value)).encode()}
            file = tmp_path / "client.zip"
            # The fingerprint is of the interface, and would refuse each change of it before it is read.
            file.write_bytes(zipped(sealed(altered) if part == "interface.json" else altered))
            try:
                interface = read_client(file).interface
                q, _ = interface.quantize_input(IMAGES[:1])
                interface.prepare(q)
                results = np.zeros((1, len(interface.outputs)), np.int64)
                with np.errstate(all="ignore"):
                    interface.dequantize(interface.accumulators(results, 1))
                inspection = inspect_file(file)
                assert str(inspection)
                Console(file=io.StringIO()).print(inspection)
                taken += 1
            except fheconv.FheConvError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{part} {path} = {value!r:.40}") from error
    assert refused > taken > 0


@pytest.mark.parametrize("text", ["[/red]", "[bold]x", "[link=http://a]b[/link]", ":smile:", "\x1b[31m"])
@pytest.mark.parametrize("name", ["fheconv", "concrete", "engine", "reason", "name", "class_names"])
def test_texts_are_shown_as_they_are(folder, tmp_path, text, name):
    parts = parts_of(folder / "server.zip")
    manifest = json.loads(parts["manifest.json"])
    where = manifest["cost"]["layers"][0] if name in manifest["cost"]["layers"][0] else manifest
    where[name] = [text] * 2 if name == "class_names" else text
    if name == "class_names":
        manifest["output_shape"] = [2]
    file = tmp_path / "server.zip"
    parts["manifest.json"] = json.dumps(manifest).encode()
    file.write_bytes(zipped(parts))
    with contextlib.suppress(fheconv.ArtifactError):  # another version of Concrete is refused
        inspection = inspect_file(file)
        console = Console(file=io.StringIO(), width=300)
        console.print(inspection)
        for printed in (console.file.getvalue(), str(inspection)):
            if name != "name" and "\x1b" not in text:  # the name of the only layer is not shown
                assert text in printed


def test_a_scale_that_is_an_integer_is_a_number(folder, tmp_path):
    parts = parts_of(folder / "client.zip")
    data = json.loads(parts["interface.json"])
    data["input"].update(scale=10**30, integral=False)
    parts["interface.json"] = json.dumps(data).encode()
    file = tmp_path / "client.zip"
    file.write_bytes(zipped(sealed(parts)))
    client = fheconv.load_client(file)
    client.keygen()
    with pytest.warns(fheconv.InputScaleWarning):
        client.encrypt(IMAGES[0])
