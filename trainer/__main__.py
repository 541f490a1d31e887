"""`python -m trainer`, the same as `dllm-train`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line; without the packages of the `train` extra one sentence says what to install."""
    try:
        from trainer import cli
    except ModuleNotFoundError as error:
        print(f"dllm-train: {error.name} is missing; pip install 'dllm-kernels[train]' brings it", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
