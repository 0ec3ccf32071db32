"""Arithmetic for the memory, communication and time of a layout, and the dry run of a training run."""
