"""What mining reads, checked before anything is encoded."""

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
    """Check a corpus, or take what an earlier check of the same file found.

    Args:
        text_ids: where the identities of its documents are to lie, see
            :class:`megatron_embed.recipes.datasets.corpus.CorpusFacts`; what looks odd lies beside.

    Raises:
        UserError: as :meth:`megatron_embed.recipes.datasets.corpus.Corpus.check`.
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
    """What an earlier :func:`check_corpus` found; None: there was none."""
    if not _beside(text_ids).is_file() or not text_ids.is_file():
        return None
    return OddRows.again(corpus.path, json.loads(_beside(text_ids).read_text(encoding="utf-8")))


def _beside(text_ids: Path) -> Path:
    return text_ids.with_suffix(".odd.json")  # written last: with it, all is there


def check_prompts(source: PairSource, prompt: str) -> None:
    """Refuse positives with a prompt of their own: the corpus is encoded with the model's, so scores would differ.

    Args:
        prompt: the model's, of passages.

    Raises:
        UserError: naming the data and the prompts.
    """
    for own in source.passage_prompts:
        if own != prompt:
            raise UserError(
                f"{source.path}: its passages have the prompt {own!r} of their own, and the model encodes the "
                f"corpus with {prompt!r}; mine with a model whose passage prompt is that, or take it out of the data"
            )


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Rows that have an earlier row's text, without those that have none."""
    again = repeats(ids)
    return again[ids[again] != text_id("")]
