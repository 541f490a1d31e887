"""`python -m trainer`, the same as `dllm-kernels`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line; without the packages of the `train` extra one sentence says what to install."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        print(f"dllm-kernels: {error.name} is missing; pip install 'dllm-kernels[train]' brings it", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
