"""After an encrypted run in a process, Concrete makes that process exit with 0, whatever happened."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FAILING_TEST = """
import numpy as np
import fheconv

def test_that_runs_encrypted_and_fails():
    network = fheconv.quantize(np.array([[1, -1]]), np.array([[[0, 3]]]))
    circuit = fheconv.compile(network, fheconv.CompileConfig(in_process={in_process}))
    circuit.keygen()
    assert circuit.predict(np.array([[[0, 3]]]), fhe="execute").item() == -3
    assert False, "on purpose"
"""


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.slow
def test_a_failing_encrypted_test_fails_pytest(tmp_path, in_process):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_failing.py").write_text(FAILING_TEST.format(in_process=in_process))
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "1 failed" in child.stdout
    assert "on purpose" in child.stdout
    assert child.returncode == 1


SCRIPT = """
import sys
import numpy as np
import fheconv

network = fheconv.quantize(np.array([[1, -1]]), np.array([[[0, 3]]]))
circuit = fheconv.compile(network, fheconv.CompileConfig(in_process={in_process}))
circuit.keygen()
circuit.predict(np.array([[[0, 3]]]), fhe="execute")
sys.exit(7)
"""


def test_a_script_keeps_its_own_status_after_an_encrypted_run():
    child = subprocess.run([sys.executable, "-c", SCRIPT.format(in_process=False)])
    assert child.returncode == 7


@pytest.mark.slow
def test_the_native_library_still_needs_this_care():
    """If this fails, Concrete has been repaired, and the care taken here can go."""
    child = subprocess.run([sys.executable, "-c", SCRIPT.format(in_process=True)])
    assert child.returncode == 0
