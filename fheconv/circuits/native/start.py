"""Starts the native library's process, which ends with its caller even while it still imports."""

import sys

from fheconv.circuits.native.system import end_with_caller


def main() -> None:
    """Tie this process to its caller, and only then import what takes long."""
    end_with_caller(sys.stdin.fileno())
    from fheconv.circuits.native.child import serve

    serve(int(sys.argv[1]))


if __name__ == "__main__":
    main()
