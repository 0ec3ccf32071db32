"""Numbers that stand for texts and keys, so that these need not be kept to be compared."""

from __future__ import annotations

from hashlib import blake2b


def text_id(text: str) -> int:
    """A 63-bit number that stands for a text; never 0.

    This is what "the same text" means everywhere: in the loss's masks, in the order of batches, in mining. White space
    around a text is none of it, for another copy of the text (a corpus's, say) may have lost it.
    """
    return exact_id(text.strip())


def exact_id(key: str) -> int:
    """A 63-bit number that stands for a key, such as a document's id, to the last character; never 0."""
    return (int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) >> 1) | 1
