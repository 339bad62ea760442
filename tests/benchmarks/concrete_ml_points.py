"""Write what Concrete ML makes of a model, setting by setting, as CSV:

    python tests/benchmarks/concrete_ml_points.py --split 0 --output notebooks/concrete-ml-digits.csv

Notebook 5 draws these points. Accuracies are shares of the 450 test images, the simulated one the mean of
some simulations; complexity and the bytes of the evaluation keys are the compiler's. Nothing runs encrypted,
so the figures are nearly the same on every machine.
"""

import argparse
import csv
import sys
from pathlib import Path
from statistics import mean

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
from concrete_ml_peer import Peer, PeerError, add_environment, images_of_digits, peer_python

SIMULATIONS = 3
# n_bits of weights and activations, bits left by approximate rounding (None: no rounding), p_error of a
# lookup (None: its default, 2^-40).
SETTINGS: tuple[tuple[int, int | None, float | None], ...] = (
    (6, 6, 0.3),
    (6, 6, 0.2),
    (6, 6, 0.1),
    (6, 5, 0.1),
    (6, 5, 0.05),
    (6, 4, 0.05),
    (5, 6, 0.2),
    (5, 5, 0.05),
    (4, 5, 0.1),
    (6, 6, None),
    (4, None, None),
)


def points(peer: Peer) -> list[dict[str, object]]:
    """Return one row for each setting."""
    rows = []
    for n_bits, rounding_bits, p_error in SETTINGS:
        answer = peer.request("compile", n_bits, rounding_bits, p_error)
        found = [peer.request("accuracy") for _ in range(SIMULATIONS)]
        row = {
            "n_bits": n_bits,
            "rounding_bits": rounding_bits,
            "p_error": answer["p_error"],
            "lookups": answer["lookups"],
            "complexity": round(answer["complexity"]),
            "key_bytes": answer["key_bytes"],
            "clear": round(found[0]["disable"], 4),
            "simulated": round(mean(one["simulate"] for one in found), 4),
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write Concrete ML's accuracy and cost as CSV.")
    parser.add_argument("--model", choices=("tinycnn", "rescnn"), default="tinycnn")
    parser.add_argument(
        "--split", type=int, choices=digits.SPLITS, help="of the model (default: the shipped one)"
    )
    parser.add_argument("--output", type=Path, required=True)
    add_environment(parser)
    arguments = parser.parse_args()
    python = peer_python(arguments.environment, Console(stderr=True))
    try:
        script, data = f"train_{arguments.model}_digits", images_of_digits(arguments.split)
        with Peer(python, script, (arguments.split,), data) as peer:
            rows = points(peer)
    except PeerError as error:
        raise SystemExit(f"FAILED: Concrete ML: {error}") from error
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
