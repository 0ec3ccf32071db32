"""Vectors of a corpus, search, evaluation, mining of hard negatives."""
