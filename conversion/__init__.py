"""Hugging Face folder ↔ Megatron checkpoint."""

import megatron_embed.bridge  # noqa: F401  first: megatron-core's warnings are quieted before a module here imports it
