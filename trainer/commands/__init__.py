"""The larger commands: compare, plan, generate."""
