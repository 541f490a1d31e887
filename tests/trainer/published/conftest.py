"""Code for old transformers, which is no test and cannot be imported as it stands: see tests/trainer/tiny_checkpoints.py."""

collect_ignore_glob = ["*.py"]
