"""Write the classic image filters as convolution weights: `python models/make_classic_filters.py`.

Nothing is trained here. All filters are cross-correlation kernels, as torch applies them.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

NAME = "classic-filters"

BINOMIAL_3 = np.array([1, 2, 1])
BINOMIAL_5 = np.array([1, 4, 6, 4, 1])

# Channel order of the Conv2d. Every weight is a dyadic fraction, hence exact in float32.
FILTERS = {
    "sobel_x": np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]),
    "sobel_y": np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]]),
    "laplacian": np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
    "gaussian_3x3": np.outer(BINOMIAL_3, BINOMIAL_3) / 16,
    "gaussian_5x5": np.outer(BINOMIAL_5, BINOMIAL_5) / 256,
    "sharpen": np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]]),
}
FILTERS_3 = {name: kernel for name, kernel in FILTERS.items() if kernel.shape == (3, 3)}


def stack(filters: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Float32 weight of shape (len(filters), 1, size, size), smaller kernels centred in zeros."""
    planes = [np.pad(kernel, (size - kernel.shape[0]) // 2) for kernel in filters.values()]
    return np.stack(planes)[:, np.newaxis].astype(np.float32)


def layer(name: str, filters: dict[str, np.ndarray], weight: np.ndarray) -> dict[str, object]:
    """Describe one bias-free Conv2d, padded so that the image keeps its size."""
    return {
        "name": name,
        "kind": "Conv2d",
        "weight": list(weight.shape),
        "stride": 1,
        "padding": weight.shape[-1] // 2,
        "channels": list(filters),
    }


def write(folder: Path) -> Path:
    """Write the weights and their card into `folder`; return the path of the weights."""
    path = folder / f"{NAME}.safetensors"
    weights = {"filters": stack(FILTERS, 5), "filters3": stack(FILTERS_3, 3)}
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, path)
    card = {
        "name": NAME,
        "file": path.name,
        "description": "Two separate layers: filters holds all six filters, the 3x3 ones centred "
        "in zeros; filters3 holds the 3x3 ones alone.",
        "architecture": [
            layer("filters", FILTERS, weights["filters"]),
            layer("filters3", FILTERS_3, weights["filters3"]),
        ],
        "input_shape": [1, None, None],
        "input_range": None,
        "data": "None. One grey channel of any height, width and pixel range.",
        "licence": "The filters are public domain mathematics.",
        "accuracy": None,
        "how_trained": "Not trained: written down by models/make_classic_filters.py.",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Write the files beside this script."""
    argparse.ArgumentParser(description="Write the classic image filters as weights.").parse_args()
    print(f"wrote {write(Path(__file__).parent)} and its card")


if __name__ == "__main__":
    main()
