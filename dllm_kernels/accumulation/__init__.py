"""Exact gradients and scores, one micro-batch at a time."""
