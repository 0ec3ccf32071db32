"""Numbers that stand for texts and keys, so that comparisons need not keep these."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest


def text_id(text: str) -> int:
    """Return a 63-bit number that stands for a text; it is never 0.

    It defines "the same text" everywhere: in the loss's masks, in the order of batches and in mining. It ignores white
    space around a text, which another copy of the text (in a corpus, say) may have lost.
    """
    return (xxh3_64_intdigest(text.strip().encode()) >> 1) | 1


def exact_id(key: str) -> int:
    """Return a 63-bit number, never 0, that stands for all characters of a key, such as a document's id."""
    return (xxh3_64_intdigest(key.encode()) >> 1) | 1
