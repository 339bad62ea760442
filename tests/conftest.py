import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

# The machine that runs the tests may be slow and shared: examples are bounded in number, not in time. CI
# draws the same ones each time, so that it judges the change at hand; everyone else goes on searching.
settings.register_profile(
    "fheconv",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("fheconv")

_exit_status = 0


def pytest_runtest_setup() -> None:
    """Weights that a test leaves to chance are the same ones whichever tests ran before."""
    torch.manual_seed(0)


def pytest_sessionfinish(exitstatus: int) -> None:
    global _exit_status
    _exit_status = int(exitstatus)


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
