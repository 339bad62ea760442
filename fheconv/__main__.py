"""Runs the command `fheconv` as `python -m fheconv`."""

from fheconv.cli.entry import main

if __name__ == "__main__":
    main()
