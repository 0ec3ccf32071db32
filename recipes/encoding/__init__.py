"""Encode texts as vectors with any model, under any layout."""
