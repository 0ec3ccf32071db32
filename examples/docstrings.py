"""Retrieval pairs from docstrings of installed Python packages, which every machine with this project has.

A pair is a docstring's first sentence (the query) and the rest of it (the passage).

``python examples/docstrings.py OUT`` writes ``OUT/train.jsonl`` and the BEIR folder ``OUT/held-out``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import multiprocessing
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: dependencies of this project with enough prose in their docstrings; the standard library comes before them
PACKAGES = ("numpy", "torch", "matplotlib", "pandas", "networkx", "sympy", "sklearn", "scipy")
_SKIPPED = {"tests", "test", "testing", "_vendor", "site-packages", "dist-packages", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Pair:
    """One docstring, cut into two parts."""

    query: str
    passage: str


def installed_pairs(packages: Iterable[str] = PACKAGES) -> list[Pair]:
    """Return all usable pairs of this installation, in the order of the files; no query or passage is repeated."""
    seen: set[str] = set()
    pairs = []
    with multiprocessing.Pool() as pool:
        for found in pool.imap(pairs_of_file, _source_files(packages), chunksize=32):
            for pair in found:
                if pair.query.lower() not in seen and pair.passage not in seen:
                    seen.update((pair.query.lower(), pair.passage))
                    pairs.append(pair)
    return pairs


def pairs_of_file(path: Path) -> list[Pair]:
    """Return the usable pairs of one source file; a file that cannot be parsed has none."""
    return [pair for docstring in _docstrings(path) if (pair := split_docstring(docstring)) is not None]


def split_docstring(text: str) -> Pair | None:
    """Return the first sentence and the rest, or None if either is too short."""
    paragraphs = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
    head = re.match(r"(.+?[.!?])(?:\s|$)", " ".join(paragraphs[0].split()))
    if head is None:
        return None
    query = head.group(1)
    rest = " ".join(text.split())[len(query) :].strip()
    if not 4 <= len(query.split()) <= 30 or len(rest.split()) < 12:
        return None
    letters = sum(character.isalpha() or character.isspace() for character in rest)
    if letters < 0.7 * len(rest) or not query.isascii():
        return None
    return Pair(query.rstrip(".!?"), " ".join(rest.split()[:120]))


def write_corpus(folder: Path, pairs: list[Pair], *, held_out: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and the BEIR folder ``held-out`` with ``held_out`` pairs that are not in ``train.jsonl``.

    Returns:
        The two paths.
    """
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256(pair.query.encode()).digest())
    train, beir = folder / "train.jsonl", folder / "held-out"
    (beir / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(train, ({"query": p.query, "positive": p.passage, "negatives": []} for p in ordered[held_out:]))
    test = ordered[:held_out]
    _write_lines(beir / "queries.jsonl", ({"_id": f"q{i}", "text": p.query} for i, p in enumerate(test)))
    _write_lines(beir / "corpus.jsonl", ({"_id": f"d{i}", "title": "", "text": p.passage} for i, p in enumerate(test)))
    judgements = "".join(f"q{i}\td{i}\t1\n" for i in range(len(test)))
    (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")
    return train, beir


def _write_lines(path: Path, rows: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _source_files(packages: Iterable[str]) -> Iterator[Path]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(Path(spec.origin).parent)
    for root in roots:
        yield from (p for p in sorted(root.rglob("*.py")) if not _SKIPPED.intersection(p.relative_to(root).parts))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages may have invalid escape sequences
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Docstrings of installed packages as retrieval pairs.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--held-out", type=int, default=500, metavar="N", help="pairs kept for evaluation")
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help="beside the standard library")
    args = parser.parse_args()
    pairs = installed_pairs(args.packages)
    train, beir = write_corpus(args.out, pairs, held_out=args.held_out)
    print(
        f"{len(pairs) - args.held_out:,} training pairs in {train}, {args.held_out:,} held out in {beir}; two of them:"
    )
    for pair in pairs[:2]:
        print(f"  {pair.query!r} → {pair.passage[:80]!r}…")


if __name__ == "__main__":
    main()
