"""Check the input of mining before anything is encoded."""

from __future__ import annotations

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.duplicates import repeats
from megatron_embed.recipes.datasets.odd_rows import OddRows
from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.text_ids import text_id

REPEATED_TEXTS = "rows repeat the text of an earlier row, which alone can be a negative"


def odd_documents(corpus: Corpus) -> OddRows:
    """Return the odd rows of a corpus, repeated texts included.

    Raises:
        UserError: the corpus cannot be used, see :class:`megatron_embed.recipes.datasets.corpus.Corpus`.
    """
    odd, ids = corpus.odd, corpus.text_ids[:, 0]
    again = repeats(ids)
    again = again[ids[again] != text_id("")]  # rows without text have a remark of their own
    if len(again):
        odd.add(REPEATED_TEXTS, corpus.line(int(again[0])), len(again))
    return odd


def check_prompts(source: PairSource, prompt: str) -> None:
    """Refuse positives whose own prompt differs from the model's, with which the corpus is encoded.

    Their scores would not be comparable with those of the corpus.

    Args:
        prompt: the model's prompt of passages.

    Raises:
        UserError: the message names the data and the prompts.
    """
    for own in source.passage_prompts:
        if own != prompt:
            raise UserError(
                f"{source.path}: found rows with the passage prompt {own!r}, but the model encodes the corpus with "
                f"{prompt!r}; mine with a model that has the prompt of the rows, or remove it from the data"
            )
