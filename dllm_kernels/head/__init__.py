"""The LM head: scoring, sampling, their plans, autograd and ops."""
