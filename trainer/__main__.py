"""`python -m trainer`, the same as `dllm-train`."""

from trainer.cli import main

main()
