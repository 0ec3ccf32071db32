"""Texts to vectors with any model, under any layout."""
