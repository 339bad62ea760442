"""Makes a private folder for each worker, and removes those that were left behind.

Concrete keeps each compiled circuit in the folder for temporary files, and never removes it. A worker gets a
folder of its own for that, and its caller removes it. The caller holds a lock on the folder while it lives.
So a folder without a lock belonged to a caller that was killed, and the next one removes it. The same lock
keeps the system's own cleaners (systemd-tmpfiles) away.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time

PREFIX = "fheconv-worker-"
# A folder that is younger, in seconds, may be about to be locked.
YOUNG = 60


def make_folder() -> tuple[str, int]:
    """Return a new folder and the descriptor that holds its lock. Raises `OSError` if there can be none."""
    _remove_abandoned(tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix=PREFIX)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder, descriptor


def remove_empty(folder: str) -> None:
    """Remove the empty folders in a worker's folder: a compilation that fails leaves one."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                os.rmdir(entry)


def _remove_abandoned(parent: str) -> None:
    """Remove the folders whose callers died. Those of other users cannot be opened and stay."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > YOUNG:
                    _remove_unlocked(entry.path)


def _remove_unlocked(folder: str) -> None:
    """Remove a folder. Raises `OSError` if it is locked, or if nothing can be locked here."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
