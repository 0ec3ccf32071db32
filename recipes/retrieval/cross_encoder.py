"""Scores of mined pairs by a cross-encoder, as a teacher's answers for distillation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.ranks import on_first_rank

_BATCH = 32  # pairs in a batch
_HEAD = "ForSequenceClassification"


class CrossScorer:
    """A cross-encoder that sentence-transformers loads, whole on every rank. Every rank must build it.

    Its scores are raw logits, because the loss takes the softmax of a query's scores. The sigmoid at the end of most
    cross-encoders would make them nearly equal.

    Args:
        model: a folder or a name on the hub.

    Raises:
        UserError: the model cannot be loaded, has no trained head, or gives several numbers for a pair.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        loaded: list[Any] = []
        # One rank downloads the files and shares any error. The others then find the files in the cache.
        on_first_rank(lambda: loaded.append(_load(model)))
        self._encoder = loaded[0] if loaded else _load(model)

    def add_scores(self, rows: list[dict[str, Any]]) -> None:
        """Add ``scores`` of its positives, then of its negatives, to each row. Every rank must pass the same rows."""
        positives = [[row["positive"]] if isinstance(row["positive"], str) else row["positive"] for row in rows]
        texts = [[*own, *row["negatives"]] for row, own in zip(rows, positives, strict=True)]
        pairs = [(row["query"], text) for row, own in zip(rows, texts, strict=True) for text in own]
        rest = iter(self.score(pairs))
        for row, own in zip(rows, texts, strict=True):
            row["scores"] = [round(score, 6) for score in islice(rest, len(own))]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the logits of (query, text) pairs. Every rank must pass the same pairs; each scores its share.

        The batches, and so the scores, are the same on any number of ranks.

        Raises:
            UserError: a score is not finite; training would refuse it.
        """
        by_length = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        batches = [by_length[first : first + _BATCH] for first in range(0, len(pairs), _BATCH)]
        found = torch.zeros(len(pairs), device=host.device())
        for batch in batches[dist.get_rank() :: dist.get_world_size()]:
            found[batch] = self._encoder.predict(
                [list(pairs[i]) for i in batch],
                batch_size=_BATCH,
                activation_fn=torch.nn.Identity(),
                convert_to_tensor=True,
                show_progress_bar=False,
            ).float()
        dist.all_reduce(found)  # one rank scored each pair, the others hold 0
        scores = found.cpu().numpy()
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            query, text = (repr(text[:60]) for text in pairs[int(wrong[0])])
            raise UserError(
                f"--cross-encoder {self.model}: scores query {query} with {text} as {scores[wrong[0]]} "
                f"({len(wrong)} such pairs); wanted finite numbers, without which training cannot distil"
            )
        return scores.tolist()


def _load(model: str) -> Any:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise UserError(
            f"--cross-encoder: sentence-transformers cannot be imported ({error}); "
            f"pip install sentence-transformers, or mine without it"
        ) from None
    try:
        encoder = CrossEncoder(model, device=str(host.device()))
    except Exception as error:  # network, missing repository, damaged weights, … have no common base class
        reason = " ".join(str(error).split())
        raise UserError(
            f"--cross-encoder {model}: cannot be loaded ({type(error).__name__}: {reason}); "
            f"wanted a folder or hub name of a model that sentence_transformers.CrossEncoder loads"
        ) from None
    if encoder.num_labels != 1:
        raise UserError(
            f"--cross-encoder {model}: gives {encoder.num_labels} numbers for each pair; "
            f"wanted a model with one label, such as a reranker"
        )
    # If the weights lack a head, transformers only warns and makes a random one, different on every rank.
    stated = getattr(encoder.model.config, "architectures", None) or []
    if type(encoder.model).__name__.endswith(_HEAD) and not any(name.endswith(_HEAD) for name in stated):
        found = ", ".join(stated) or "a model of unknown class"
        raise UserError(f"--cross-encoder {model}: found {found}, which has no trained head; wanted …{_HEAD}")
    return encoder
