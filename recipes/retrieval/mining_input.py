"""Check the input of mining before anything is encoded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.duplicates import repeats
from megatron_embed.recipes.datasets.odd_rows import OddRows
from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.text_ids import text_id
from megatron_embed.recipes.retrieval.vectors import write_array, write_file

REPEATED_TEXTS = "rows repeat the text of an earlier row, which alone can be a negative"


def check_corpus(corpus: Corpus, text_ids: Path) -> OddRows:
    """Check a corpus, or return the result of an earlier check of the same file.

    Args:
        text_ids: the file to write the identities of its documents to, see
            :class:`megatron_embed.recipes.datasets.corpus.CorpusFacts`; the odd rows go to a file beside it.

    Raises:
        UserError: see :meth:`megatron_embed.recipes.datasets.corpus.Corpus.check`.
    """
    if (before := checked_before(corpus, text_ids)) is not None:
        return before
    facts = corpus.check()
    again = _repeated(facts.text_ids[:, 0])
    if len(again):
        facts.odd.add(REPEATED_TEXTS, corpus.line(int(again[0])), len(again))
    text_ids.parent.mkdir(parents=True, exist_ok=True)
    write_array(text_ids, facts.text_ids)
    write_file(_beside(text_ids), lambda file: file.write(json.dumps(facts.odd.found).encode()))
    return facts.odd


def checked_before(corpus: Corpus, text_ids: Path) -> OddRows | None:
    """Return the odd rows that an earlier :func:`check_corpus` found, or None if there was no earlier check."""
    if not _beside(text_ids).is_file() or not text_ids.is_file():
        return None
    return OddRows.again(corpus.path, json.loads(_beside(text_ids).read_text(encoding="utf-8")))


def _beside(text_ids: Path) -> Path:
    return text_ids.with_suffix(".odd.json")  # written last, so its presence means that all files are complete


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
                f"{source.path}: its passages have the prompt {own!r} of their own, and the model encodes the "
                f"corpus with {prompt!r}; mine with a model whose passage prompt is that, or take it out of the data"
            )


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Return the rows that repeat an earlier row's text, except rows without text."""
    again = repeats(ids)
    return again[ids[again] != text_id("")]
