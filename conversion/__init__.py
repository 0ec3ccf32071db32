"""Hugging Face folder ↔ Megatron checkpoint."""
