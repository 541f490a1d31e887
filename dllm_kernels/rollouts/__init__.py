"""Generation, samplers, and the trajectories that rollouts leave behind."""
