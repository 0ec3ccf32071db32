"""Contents of a Megatron checkpoint: tensors, weights of the table, state of model and optimizer."""
