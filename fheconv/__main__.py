"""Runs the command `fheconv` as `python -m fheconv`."""

from fheconv.cli.main import main

if __name__ == "__main__":
    main()
