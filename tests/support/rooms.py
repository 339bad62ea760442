"""Names the rooms of fheconv/ and the floors that they stand on."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fheconv"
# From the ground up. Rooms on one line import nothing of each other. `quantized` is a module, the facade.
FLOORS = (
    ("basics",),
    ("arithmetic",),
    ("networks",),
    ("capture", "quantizer", "lowering"),
    ("analysis", "training"),
    ("quantized",),
    ("circuits",),
    ("tuning", "serving"),
    ("cli",),
)
