"""What a run writes: checkpoints, metrics, reports, plots."""
