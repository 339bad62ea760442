import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The machine that runs the tests may be slow and shared: examples are bounded in number, not in time. CI
# draws many, and the same ones each time, so that it judges the change at hand. Everyone else draws a few
# new ones in each run, and so goes on searching.
CI = bool(os.environ.get("CI"))
settings.register_profile(
    "fheconv",
    deadline=None,
    max_examples=20 if CI else 4,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=CI,
)
settings.load_profile("fheconv")

_exit_status = 0
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Leave out the tests that are marked slow, unless `--run-slow` asks for them.

    Of the cases of a test that is marked `sampled(n)`, each n-th is quick, and the others are slow. Where a
    test has several parameters, n shares no factor with the number of values of any: each value is quick.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1
    yield  # to -m and -k, which now see all marks
    if config.getoption("--run-slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
    config.stash[LEFT_OUT] = len(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the number from a process of `-n`: only these collect tests, and each collects all."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many tests were left out, and how to run them."""
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"Slow tests left out: {left_out}. pytest --run-slow runs them, too.")


def pytest_runtest_setup() -> None:
    """Weights that a test leaves to chance are the same ones whichever tests ran before."""
    torch.manual_seed(0)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    global _exit_status
    _exit_status = int(exitstatus)
    if hasattr(session.config, "workeroutput"):  # a process of `-n`
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Leave with pytest's own status.

    Where a test ran a circuit in this process, the native library would otherwise make the process
    exit with 0 even after failures (tests/test_exit_status.py).
    """
    if "concrete.fhe" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status)
