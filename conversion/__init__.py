"""Conversion between Hugging Face folders and Megatron checkpoints."""

import megatron_embed.bridge  # noqa: F401  first: it silences megatron-core's warnings before a module here imports it
