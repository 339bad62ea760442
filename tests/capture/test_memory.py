"""What is linear is captured in memory of about what its sparse matrix holds."""

import json
import subprocess
import sys

import pytest

# Measures by how much capture raises the process's peak: torch's allocations are seen there alone.
SCRIPT = """
import json, resource, sys
import torch
from torch import nn
from fheconv.capture.model import capture
torch.set_num_threads(1)
class Full(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
    def forward(self, x):
        return torch.tensordot(x, self.weight, ([2, 3], [0, 1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
capture(nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(1, 1, 3), nn.ReLU()), (1, 32, 32))
before = peak()
capture(eval(sys.argv[1]).double(), tuple(json.loads(sys.argv[2])))
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape", "entries"),
    [
        ("nn.AdaptiveAvgPool2d(6)", (1, 224, 224), 51_000),
        ("nn.AdaptiveAvgPool2d(100)", (1, 128, 128), 53_000),
        ("nn.AvgPool2d(2, ceil_mode=True)", (1, 129, 129), 17_000),
        ("nn.Upsample(size=(300, 300), mode='bilinear')", (1, 224, 224), 360_000),
        ("nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)))", (1, 224, 224), 1_254_400),
        ("nn.Sequential(nn.Conv2d(1, 1, 3), nn.AvgPool2d(2, ceil_mode=True))", (1, 101, 101), 52_000),
        ("nn.Sequential(nn.Flatten(), nn.Linear(50176, 4), nn.Linear(4, 50000))", (1, 224, 224), 400_000),
        ("Full(112, 112, 300)", (1, 112, 112), 3_763_200),
    ],
)  # fmt: skip
def test_memory(model, shape, entries):
    command = [sys.executable, "-c", SCRIPT, model, json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    # Sixteen bytes an entry: a place and a value. Beside them, blocks of 32 megabytes on both sides of torch.
    assert json.loads(done.stdout) < 6 * 16 * entries / 2**20 + 128
