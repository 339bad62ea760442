import importlib
import json
import math

import numpy as np
import platformdirs
import pytest

import fheconv
from fheconv.circuits.native import lookup_times as timing

MEASURED = [(2.7e7, 0.004), (4.6e7, 0.005), (6.6e7, 0.0055), (1.1e8, 0.009)]


class Session:
    """A worker that times nothing: it says what was measured, or fails."""

    def __init__(self, failure=None):
        self.asked = []
        self.failure = failure

    def request(self, failure, method, *arguments, **limits):
        self.asked.append((method, *arguments))
        if self.failure is not None:
            raise self.failure
        return dict(zip(timing.BITS, MEASURED, strict=True))[arguments[0]]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, and a process that has not measured yet."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    another_process()
    yield
    another_process()


def another_process():
    """Forget what was measured in this one."""
    importlib.reload(timing)


def seconds(session, lookups, each):
    return timing.expected_seconds(session, lookups, lookups * each)


def cache(tmp_path):
    """The one file in the cache folder."""
    (file,) = (tmp_path / "fheconv").iterdir()
    return file


@pytest.fixture
def old(tmp_path):
    """The file in which another process has left what it measured."""
    seconds(Session(), 1, 5e7)
    another_process()
    return cache(tmp_path)


def test_lookups_that_were_timed_take_what_they_took():
    session = Session()
    for complexity, expected in MEASURED:
        assert seconds(session, 100, complexity) == pytest.approx(100 * expected)
    assert session.asked == [("time_lookups", bits, timing.LOOKUPS) for bits in timing.BITS]


def test_in_between_and_beyond_it_rises_and_below_it_stays():
    session = Session()
    each = [seconds(session, 1, complexity) for complexity in np.geomspace(1e6, 1e11, 40)]
    assert each == sorted(each)
    assert each[0] == pytest.approx(MEASURED[0][1])
    # Far beyond what was timed, at least in proportion to the complexity.
    assert seconds(session, 1, 1.1e10) >= 100 * MEASURED[-1][1] * (1 - 1e-9)
    assert seconds(session, 50, 3e7) == pytest.approx(50 * seconds(session, 1, 3e7))


def test_a_machine_measures_once(tmp_path):
    session = Session()
    first = seconds(session, 10, 5e7)
    seconds(session, 10, 6e7)
    assert len(session.asked) == len(timing.BITS)
    assert json.loads(cache(tmp_path).read_text()) == [list(pair) for pair in MEASURED]
    another_process()
    other = Session()
    assert seconds(other, 10, 5e7) == first
    assert other.asked == []


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "not json",
        "[]",
        "{}",
        "null",
        "3",
        "[1, 2, 3, 4]",
        json.dumps(MEASURED[:3]),
        json.dumps(MEASURED[::-1]),
        json.dumps([*MEASURED[:3], [1.2e8, -0.1]]),
        json.dumps([*MEASURED[:3], [1.2e8, 0]]),
        json.dumps([*MEASURED[:3], [1.2e8, math.inf]]),
        json.dumps([*MEASURED[:3], [1.2e8, math.nan]]),
        json.dumps([*MEASURED[:3], ["many", 1]]),
        json.dumps([*MEASURED[:3], [1.2e8, 1, 2]]),
        json.dumps([*MEASURED[:3], None]),
        "[" * 100_000,
        json.dumps(MEASURED)[:-10],
        "\ufffe",
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_cache_is_measured_again_and_mended(damaged, old):
    old.write_text(damaged)
    session = Session()
    assert seconds(session, 1, MEASURED[0][0]) == pytest.approx(MEASURED[0][1])
    assert len(session.asked) == len(timing.BITS)
    assert json.loads(old.read_text()) == [list(pair) for pair in MEASURED]


def test_a_cache_of_other_bytes_is_measured_again(old):
    old.write_bytes(b"\xff\xfe\x00")
    session = Session()
    assert seconds(session, 1, 5e7) > 0
    assert len(session.asked) == len(timing.BITS)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "file" / name))
    session = Session()
    assert seconds(session, 1, 5e7) > 0
    seconds(session, 1, 5e7)
    assert len(session.asked) == len(timing.BITS)


def test_what_cannot_be_timed_has_no_estimate(tmp_path):
    session = Session(fheconv.ExecutionError("dead"))
    assert seconds(session, 1, 5e7) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_times_real_lookups(monkeypatch, tmp_path):
    """A few of them; of how long they take nothing is asserted but that it is measured."""
    monkeypatch.setattr(timing, "BITS", (2, 3))
    monkeypatch.setattr(timing, "LOOKUPS", 2)
    from fheconv.circuits.native.worker import worker

    assert 0 < timing.expected_seconds(worker(), 3, 1e8) < math.inf
    assert len(json.loads(cache(tmp_path).read_text())) == 2
