"""Comparison of two models: configs, settings, tokenizers, tensors and embeddings."""
