"""The training loops: supervised, reinforcement, preference pairs."""
