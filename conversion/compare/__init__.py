"""Configs, settings, tokenizers, tensors and embeddings of two models compared."""
