"""Reads JSON from files that are not trusted, at a cost that its size bounds.

Python takes up to 25 times the bytes of a JSON text to hold what it says, most of it for objects and arrays
inside each other. fheconv writes few of these, so they are counted before anything is read.
"""

import json
from typing import Any

from fheconv.basics.errors import ArtifactError

# The most objects and arrays in a text. An interface has a few for each operator, a manifest one a layer.
MOST_CONTAINERS = 2**14


def read_json(text: bytes, what: str, most: int) -> Any:
    """Return what a JSON text of at most `most` bytes says.

    Raises `ArtifactError`, which calls the text `what`, for a longer text, for one with too many objects and
    arrays, for a name that stands twice in an object, and for what is not JSON.
    """
    if len(text) > most:
        raise ArtifactError(f"{what} has {len(text):,} bytes; fheconv writes at most {most:,}.")
    containers = text.count(b"[") + text.count(b"{")
    if containers > MOST_CONTAINERS:
        raise ArtifactError(
            f"{what} is not JSON as fheconv writes it: there are {containers:,} objects and arrays, and at "
            f"most {MOST_CONTAINERS:,} belong in it."
        )
    try:
        return json.loads(text.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, too long integers
        raise ArtifactError(f"{what} is not JSON as fheconv writes it: {error!s:.200}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, whose names differ: readers do not agree on which of two equal ones counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name stands twice among {[name for name, _ in pairs]!r:.100}")
    return found
