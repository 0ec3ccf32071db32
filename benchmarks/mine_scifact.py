"""Mining on a real BEIR folder, on 1, 2 and 4 ranks, checked against an independent computation.

    python benchmarks/mine_scifact.py --tokenizer DIR --data scifact

The program runs as users run it, with torchrun. The script checks that

* no known positive is among the negatives;
* the negatives are those of a brute-force computation in numpy (all scores in fp64, one argsort for each query, the
  rules of the documentation, none of the project's code), both from the stored vectors and from
  sentence-transformers' embeddings;
* 2 and 4 ranks write the same bytes as 1;
* another model does not use the cache, and refuses vectors of the first model under its own keys.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import SMALL, make_embedder, write_result

ROUNDING = 2e-6  # rounding error of fp32 scores of unit vectors; documents with closer scores may swap places


@dataclass(frozen=True)
class Rules:
    """The options of the program, with its default values."""

    negatives: int = 4
    ranks: tuple[int, int] = (0, 100)
    ratio: float = 0.95

    def arguments(self) -> list[str]:
        first, last = self.ranks
        words = ["--negatives", self.negatives, "--rank-range", f"{first}:{last}", "--max-score-ratio", self.ratio]
        return list(map(str, words))


RULES = {"1": Rules(), "wide": Rules(negatives=20, ranks=(5, 60), ratio=float("inf"))}


@dataclass(frozen=True)
class Collection:
    """A BEIR folder's train split: rows of (query, positives) in the order in which the judgements name the queries."""

    ids: list[str]
    documents: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]

    @classmethod
    def read(cls, folder: Path) -> Collection:
        corpus = [json.loads(line) for line in (folder / "corpus.jsonl").open(encoding="utf-8")]
        queries = {
            row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").open(encoding="utf-8"))
        }
        full = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in corpus}
        judged: dict[str, list[str]] = {}
        for line in (folder / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            query, document, grade = line.split("\t")
            if int(grade) > 0:
                judged.setdefault(query, []).append(full[document])
        rows = [(queries[query], positives) for query, positives in judged.items()]
        return cls(list(full), [(full[row["_id"]], row["text"]) for row in corpus], rows)

    def known(self) -> dict[str, set[str]]:
        """Return the positives of each query text, over all rows."""
        found: dict[str, set[str]] = {}
        for query, positives in self.rows:
            found.setdefault(query, set()).update(positives)
        return found


def mine(
    folder: Path, data: Path, model: Path, name: str, *, ranks: int = 1, cache: str = "1", rules: Rules = RULES["1"]
) -> subprocess.CompletedProcess[str]:
    """Run the program as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_embed.recipes.mine", "--model", str(model), "--data", str(data), "--corpus", str(data)]
    command += ["--output", f"{folder}/{name}.jsonl", "--cache", f"{folder}/cache-{cache}", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *rules.arguments()], env=environment, capture_output=True, text=True, check=False)


def brute_force(
    collection: Collection,
    rules: Rules,
    scores: np.ndarray,
    lowest: Sequence[float],
) -> list[list[int]]:
    """Return the documents that are each row's negatives by the rules of docs/mining.md.

    Args:
        scores: ``[rows, documents]``.
        lowest: score of each row's lowest-scoring positive.
    """
    known = collection.known()
    answers = []
    for number, (query, _) in enumerate(collection.rows):
        limit = lowest[number] - (1 - rules.ratio) * abs(lowest[number])
        seen: set[str] = set()
        taken: list[int] = []
        for place in np.argsort(-scores[number], kind="stable")[slice(*rules.ranks)].tolist():
            full, alone = collection.documents[place]
            repeated = full in seen
            seen.add(full)
            forbidden = {full, alone} & (known[query] | {query}) or not full or repeated
            if not forbidden and scores[number, place] <= limit:
                taken.append(place)
        answers.append(taken[: rules.negatives])
    return answers


def compare(found: list[list[str]], wanted: list[list[int]], texts: list[str], scores: np.ndarray) -> tuple[int, float]:
    """Return (number of rows with the same negatives in the same order, greatest difference of score in other rows)."""
    places = {text: place for place, text in enumerate(texts)}
    same, worst = 0, 0.0
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours == [texts[place] for place in theirs]:
            same += 1
        elif len(ours) != len(theirs):
            worst = float("inf")
        else:
            own = scores[number, [places[text] for text in ours]]
            worst = max(worst, float(np.abs(own - scores[number, theirs]).max()))
    return same, worst


def stored(cache: Path) -> dict[str, np.ndarray]:
    """Read the vectors of a cache with numpy alone: "KIND ROWS" of the encoded texts → vectors."""
    found = {}
    for manifest in cache.glob("*/manifest.json"):
        value = json.loads(manifest.read_text())
        stamp = value["fingerprint"]
        parts = [np.load(manifest.parent / shard["vectors"]) for shard in value["shards"]]
        found[f"{stamp['kind']} {stamp['rows']}"] = np.concatenate(parts)
    return found


def embedded(model: Path, collection: Collection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sentence-transformers' vectors of queries, of positives end to end, and of passages."""
    from sentence_transformers import SentenceTransformer

    theirs: Any = SentenceTransformer(str(model), device="cpu")
    texts = [full for full, _ in collection.documents]
    return (
        theirs.encode_query([query for query, _ in collection.rows]),
        theirs.encode_document([text for _, positives in collection.rows for text in positives]),
        theirs.encode_document(texts),
    )


def check_answers(folder: Path, collection: Collection, model: Path) -> list[str]:
    """Check the output for each entry of ``RULES`` and return a line about it."""
    counts = [len(positives) for _, positives in collection.rows]
    vectors = stored(folder / "cache-1")
    sizes = (f"query {len(counts)}", f"passage {sum(counts)}", f"passage {len(collection.documents)}")
    sides = {
        "stored vectors": tuple(vectors[size] for size in sizes),
        "sentence-transformers": embedded(model, collection),
    }
    scored = {}
    for name, parts in sides.items():
        queries, positives, passages = (part.astype(np.float64) for part in parts)
        of_positives = np.split(positives, np.cumsum(counts)[:-1])
        lowest = [float((own @ query).min()) for own, query in zip(of_positives, queries, strict=True)]
        scored[name] = queries @ passages.T, lowest
    return [check_file(folder, name, collection, scored) for name in RULES]


def check_file(folder: Path, name: str, collection: Collection, scored: dict[str, tuple[np.ndarray, Any]]) -> str:
    """Check the negatives in ``name.jsonl`` and return a line about them."""
    rules = RULES[name]
    output = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted_rows = [(query, texts if len(texts) > 1 else texts[0]) for query, texts in collection.rows]
    found_rows = [(row["query"], row["positive"]) for row in output]
    assert found_rows == wanted_rows, "the rows are not those of the train split, in its order"
    known = collection.known()
    negatives = [row["negatives"] for row in output]
    guilty = sum(bool(set(row["negatives"]) & known[row["query"]]) for row in output)
    assert not guilty, f"{guilty} rows have a known positive among their negatives"
    texts = [full for full, _ in collection.documents]
    cells = []
    for side, (scores, lowest) in scored.items():
        same, worst = compare(negatives, brute_force(collection, rules, scores, lowest), texts, scores)
        assert worst <= ROUNDING, f"{side}: negatives differ by {worst:.1e} in score"
        cells.append(f"{same} of {len(output)}" + (f", others by {worst:.0e} in score" if same < len(output) else ""))
    asked = f"{rules.negatives}, {rules.ranks[0]}:{rules.ranks[1]}, {rules.ratio}"
    return f"| {asked} | {sum(map(len, negatives)):,} | {guilty} | {' | '.join(cells)} |"


def check_other_model(folder: Path, data: Path, other: Path) -> str:
    """Check a second model with the first one's cache and return a line about it."""
    cache = folder / "cache-1"

    def folders() -> dict[str, Path]:
        """Return "KIND ROWS" of the encoded texts → folder of their vectors, the newest if there are several."""
        by_age = sorted(cache.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
        stamps = [(json.loads(path.read_text())["fingerprint"], path.parent) for path in by_age]
        return {f"{stamp['kind']} {stamp['rows']}": path for stamp, path in stamps}

    of_first = folders()
    done = mine(folder, data, other, "other")
    assert done.returncode == 0, done.stderr
    of_second = folders()
    assert not set(of_first.values()) & set(of_second.values()), "the second model did not encode for itself"
    assert (folder / "other.jsonl").read_bytes() != (folder / "1.jsonl").read_bytes()
    for what, path in of_second.items():
        shutil.rmtree(path)
        shutil.copytree(of_first[what], path)
    refused = mine(folder, data, other, "refused")
    assert refused.returncode == 1, "the first model's vectors were taken for the second's"
    message = next(line for line in refused.stderr.splitlines() if line.startswith("error:"))
    assert "vectors of another model" in message
    assert not (folder / "refused.jsonl").exists()
    return (
        "Another model with the same cache encodes for itself, under keys of its own. With the first model's vectors "
        f"put under these it ends with status 1 and no output: `{message.replace(str(folder), '…')}`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder with a train split")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    sizes = {
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
    }
    collection = Collection.read(options.data)
    table = ["| ranks | cache | seconds | output |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = [
            make_embedder(folder / f"model-{seed}", options.tokenizer, seed=seed, max_length=options.length, **sizes)
            for seed in (0, 1)
        ]
        for ranks, cache, name in ((1, "1", "1"), (2, "2", "2"), (4, "4", "4"), (1, "1", "again"), (1, "1", "wide")):
            began = time.perf_counter()
            rules = RULES.get(name, RULES["1"])
            done = mine(folder, options.data, models[0], name, ranks=ranks, cache=cache, rules=rules)
            seconds = time.perf_counter() - began
            assert done.returncode == 0, done.stderr
            if name not in RULES:
                same = (folder / f"{name}.jsonl").read_bytes() == (folder / "1.jsonl").read_bytes()
                assert same, f"{name}: the output is not that of one rank"
            verdict = {"1": "–", "wide": "other rules"}.get(name, "the bytes of the first run")
            full = cache == "1" and name != "1"
            table.append(f"| {ranks} | {'full' if full else 'empty'} | {seconds:.1f} | {verdict} |")
            print(table[-1], flush=True)
        answers = check_answers(folder, collection, models[0])
        refusal = check_other_model(folder, options.data, models[1])
    introduction = (
        f"{len(collection.documents):,} documents, {len(collection.rows):,} rows of the train split. A run is the "
        "whole program under torchrun, imports and start-up included, one thread a rank, while other programs used the "
        "machine: the seconds say that this takes a minute, not how ranks scale."
    )
    heading = [
        "| negatives, ranks, ratio | found | known positives | rows = brute force, stored | = sentence-transformers |",
        "|---|---|---|---|---|",
    ]
    body = "\n".join([introduction, "", *table, "", *heading, *answers, "", refusal])
    settings = {"model": {**SMALL, **sizes}, "data": options.data.name, "length": options.length}
    if options.no_write:
        print(body)
    else:
        write_result("mine-scifact", "Mining on scifact, against brute force", body, settings)


if __name__ == "__main__":
    main()
