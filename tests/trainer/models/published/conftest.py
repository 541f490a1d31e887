"""Code for old transformers, no test, not importable as it stands: see tests/trainer/models/tiny_checkpoints.py."""

collect_ignore_glob = ["*.py"]
