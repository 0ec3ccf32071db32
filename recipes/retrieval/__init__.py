"""Vectors of a corpus, search, evaluation and mining of hard negatives."""
