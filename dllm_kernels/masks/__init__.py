"""Mask plans: laws, noise draws, given states, and files."""
