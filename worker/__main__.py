"""
`hlf-sync`, also as `python -m worker`.
"""

from __future__ import annotations

from worker.cli import cli


def main() -> None:
    """
    Run a command.
    """
    cli(prog_name="hlf-sync")


if __name__ == "__main__":
    main()
