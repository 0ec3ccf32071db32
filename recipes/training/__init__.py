"""The training run: batches, loss, step, optimizer, checkpoints, metrics and report."""
