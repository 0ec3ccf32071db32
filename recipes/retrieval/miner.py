"""Mine hard negatives for training data from a corpus, with any model.

The miner encodes the corpus, the queries and the positives that are no documents into a cache, each under a key that
hashes everything its vectors depend on. The ranks then search the corpus together and choose negatives by the rules of
:mod:`megatron_embed.recipes.retrieval.mining`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.ranks import on_first_rank
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.corpus import Corpus, Texts
from megatron_embed.recipes.datasets.odd_rows import report
from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.tokenization import Kind
from megatron_embed.recipes.encoding.encoder import Encoder
from megatron_embed.recipes.retrieval.cross_encoder import CrossScorer
from megatron_embed.recipes.retrieval.encode_corpus import encode_texts
from megatron_embed.recipes.retrieval.fingerprints import fingerprint, model_fingerprint
from megatron_embed.recipes.retrieval.mining import (
    Audit,
    KnownPositives,
    MiningRules,
    choose_negatives,
    teacher_answers_for,
)
from megatron_embed.recipes.retrieval.mining_input import check_prompts, odd_documents
from megatron_embed.recipes.retrieval.mining_report import write_audit
from megatron_embed.recipes.retrieval.positives import PositiveVectors, find_documents
from megatron_embed.recipes.retrieval.search import Searcher
from megatron_embed.recipes.retrieval.training_texts import TrainingTexts
from megatron_embed.recipes.retrieval.vectors import VectorFolder, write_file
from megatron_embed.recipes.retrieval.writer_lock import LOCK, writing

_BLOCK = 4096  # queries in one search


def mine(
    encoder: Encoder,
    data: str,
    corpus: Corpus,
    output: Path,
    *,
    rules: MiningRules,
    cache: Path,
    with_scores: bool = False,
    cross_encoder: str | Path | None = None,
    faiss: str | None = None,
    progress: bool = False,
    strict: bool = False,
    overwrite: bool = True,
) -> Audit:
    """Write the rows of ``data`` with mined negatives to ``output``, and their audit beside it.

    Every rank must call this.

    Args:
        cache: folder for vectors, shared by all ranks; it is kept, so a second run encodes nothing again.
        with_scores: add the model's scores of the positives and negatives as a teacher's answers.
        cross_encoder: add the scores of this cross-encoder instead, see :class:`CrossScorer`.
        strict: treat odd rows in the corpus or the training data as an error.
        overwrite: replace ``output``.

    Raises:
        UserError: the input is bad, the encoder's scalar products are not its model's similarity, the cross-encoder is
            unusable, the cache holds other vectors under the key, or another run is writing the output or the same
            vectors.
    """
    if with_scores and cross_encoder is not None:
        raise UserError("--scores and --cross-encoder: both write 'scores'; give one of them")
    scorer = None if cross_encoder is None else CrossScorer(str(cross_encoder))  # fails before the long work
    source = PairSource(DataSource(path=data))
    assert encoder.source is not None, "an encoder from Encoder.from_pretrained"
    opened = encoder.source
    if opened.for_scores().config != opened.config:
        raise UserError(
            f"{opened.path}: its similarity is the cosine and its vectors are not normalised; "
            f"wanted an encoder of Encoder.from_pretrained(…, scores=True)"
        )
    model = on_first_rank(lambda: model_fingerprint(opened))

    def encoded(texts: Texts, kind: Kind) -> VectorFolder:
        stamp = on_first_rank(lambda: fingerprint(encoder, texts, kind, model=model))
        return encode_texts(encoder, texts, cache / key(stamp), kind=kind, stamp=stamp, progress=progress)

    with writing(output, output.with_name(f".{output.name}{LOCK}")):
        if not overwrite:  # another run may have ended since this one began
            on_first_rank(lambda: refuse_existing(output))
        check_prompts(source, encoder.tokenizer.prompts["passage"])
        odd = [on_first_rank(lambda: odd_documents(corpus)), source.odd]
        on_first_rank(lambda: report(odd, strict=strict))
        documents = encoded(corpus, "passage")
        found = on_first_rank(lambda: find_documents(source, corpus))
        others = TrainingTexts(source, "passage", "", np.flatnonzero(found < 0))
        miner = _Miner(
            source,
            corpus,
            rules,
            queries=encoded(TrainingTexts(source, "query", encoder.tokenizer.prompts["query"]), "query"),
            positives=PositiveVectors(documents, found, encoded(others, "passage") if len(others) else None),
            searcher=Searcher(documents, rules.ranks[1], faiss=faiss),
            with_scores=with_scores,
            scorer=scorer,
            audit=Audit(1.0 if encoder.config.normalize else _bound(documents), odd),
        )
        return miner.write(output)


def refuse_existing(output: Path) -> None:
    """Raise :class:`UserError` if a file or folder is there already."""
    if output.exists():
        raise UserError(f"{output}: is there already; name another file, or --overwrite")


def key(stamp: dict[str, Any]) -> str:
    """Return the name in the cache of vectors with this fingerprint."""
    return hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:24]


def _bound(documents: VectorFolder) -> float:
    """Estimate the greatest score of vectors that are not normalised, from the longest vector of the first shard."""
    return float(np.linalg.norm(documents.shard(0), axis=1).max() ** 2)


class _Miner:
    def __init__(
        self,
        source: PairSource,
        corpus: Corpus,
        rules: MiningRules,
        *,
        queries: VectorFolder,
        positives: PositiveVectors,
        searcher: Searcher,
        with_scores: bool,
        scorer: CrossScorer | None,
        audit: Audit,
    ) -> None:
        self.source, self.corpus, self.rules = source, corpus, rules
        self.queries, self.positives, self.searcher = queries, positives, searcher
        self.with_scores, self.scorer, self.audit = with_scores, scorer, audit
        self.known = KnownPositives(source)

    def write(self, output: Path) -> Audit:
        """Write the rows and their audit on rank 0; the other ranks only take part in finding them.

        The rows get their name last, so rows that are there have their audit.
        """
        if dist.get_rank() == 0:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_file(output, lambda file: self._write_all(file, output))
        else:
            for _ in self.blocks():
                pass
            self._total_audit()
        on_first_rank(lambda: None)  # a barrier: all ranks wait until the file is complete
        return self.audit

    def _write_all(self, file: BinaryIO, output: Path) -> None:
        for block in self.blocks():
            file.writelines(map(_line, block))
        self._total_audit()
        write_audit(self.audit, self.rules, output)

    def blocks(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the output rows block by block on every rank; each rank chooses negatives for its part of a block."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for first in range(0, len(self.queries), _BLOCK):
            vectors = self.queries.rows(first, min(first + _BLOCK, len(self.queries)))
            scores, rows = self.searcher.search(vectors)
            count = len(vectors)
            own = range(count * rank // world, count * (rank + 1) // world)
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, [self._row(first + i, vectors[i], scores[i], rows[i]) for i in own])
            block = [row for part in parts for row in part]
            if self.scorer is not None:
                self.scorer.add_scores(block)
            yield block

    def _row(self, row: int, query: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        pair = self.source.pair(row)
        examples = self.source.examples(row)
        positives = self.positives.rows(examples.start, examples.stop) @ query
        chosen = choose_negatives(
            self.rules,
            scores,
            rows,
            query=pair.query,
            positives=positives,
            known=self.known.of(pair.query),
            text_ids=self.corpus.text_ids,
            audit=self.audit,
        )
        negatives = [self.corpus.text(int(rows[i])) for i in chosen]
        found: dict[str, Any] = {
            "query": pair.query,
            "positive": pair.positives if len(pair.positives) > 1 else pair.positives[0],
            "negatives": negatives,
        }
        teacher = teacher_answers_for(pair, negatives)
        if self.with_scores:
            found["scores"] = [round(float(x), 6) for x in (*positives, *scores[chosen])]
        elif self.scorer is None and teacher.scores is not None:
            found["scores"] = teacher.scores
        if teacher.passages is not None:
            vectors = {"positive_embedding": teacher.passages[0], "negative_embeddings": teacher.passages[1:]}
            found.update(query_embedding=teacher.query, **vectors)
        if pair.query_prompt is not None:
            found["query_prompt"] = pair.query_prompt
        if pair.passage_prompt is not None:
            found["passage_prompt"] = pair.passage_prompt
        kept = teacher.scores is not None and found.get("scores") is teacher.scores
        self.audit.scores_dropped += pair.teacher.scores is not None and not kept
        self.audit.vectors_dropped += pair.teacher.passages is not None and teacher.passages is None
        return found

    def _total_audit(self) -> None:
        """Give the audit the counts of all ranks."""
        numbers = torch.from_numpy(self.audit.numbers()).to(host.device())
        dist.all_reduce(numbers)
        self.audit.take(numbers.cpu().numpy())


def _line(row: dict[str, Any]) -> bytes:
    return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
