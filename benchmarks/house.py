"""Size of the code: files, lines and functions of each package, for one checkout or for several beside one another.

``python benchmarks/house.py [CHECKOUT] [--beside CHECKOUT …]``. A line of code is neither blank nor a comment nor part
of a docstring. Functions are counted with their nested functions.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: the packages of the house; tests and benchmarks are counted apart
HOUSE, APART = ("bridge", "conversion", "recipes", "examples"), ("tests", "benchmarks")
_NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
)


@dataclass
class Size:
    """Sizes of a package's files.

    Attributes:
        files: (lines, path) of each file.
        code: lines of code.
        functions: (lines, place) of each function.
    """

    files: list[tuple[int, str]] = field(default_factory=list)
    code: int = 0
    functions: list[tuple[int, str]] = field(default_factory=list)

    def __add__(self, other: Size) -> Size:
        return Size(self.files + other.files, self.code + other.code, self.functions + other.functions)


def size_of(checkout: Path, package: str) -> Size:
    """Return the sizes of a package's ``*.py`` files; a package that the checkout lacks has none."""
    size = Size()
    for path in sorted((checkout / package).rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(checkout).as_posix()
        tree = ast.parse(text)
        size.files.append((len(text.splitlines()), name))
        size.code += len(set(_token_lines(text)) - set(_docstring_lines(tree)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size.functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{name}: {node.name}"))
    return size


def _token_lines(text: str) -> Iterator[int]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            yield from range(token.start[0], token.end[0] + 1)


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of texts that stand alone: docstrings, and those of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from range(node.lineno, (node.end_lineno or 0) + 1)


def row(name: str, size: Size) -> list[str]:
    """Return one row of the table."""
    files, functions = sorted(size.files), sorted(size.functions)
    if not files:
        return [name, *["–"] * 7]
    middle = [f"{statistics.median(lines for lines, _ in each):g}" for each in (files, functions or [(0, "")])]
    longest = [f"{lines} ({place})" for lines, place in (files[-1], (functions or [(0, "none")])[-1])]
    counts = [f"{len(files):,}", f"{sum(lines for lines, _ in files):,}", f"{size.code:,}"]
    return [name, *counts, middle[0], longest[0], middle[1], longest[1]]


def table(checkout: Path) -> str:
    """Return the Markdown table of a checkout."""
    sizes = {package: size_of(checkout, package) for package in (*HOUSE, *APART)}
    whole = sum((sizes[package] for package in HOUSE), Size())
    rows = [
        ["package", "files", "lines", "of code", "median file", "longest file", "median function", "longest function"],
        ["---", "---:", "---:", "---:", "---:", "---", "---:", "---"],
        *(row(package, sizes[package]) for package in HOUSE),
        row("**together**", whole),
        *(row(package, sizes[package]) for package in APART),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--beside", action="append", type=Path, default=[], metavar="CHECKOUT", help="repeatable")
    args = parser.parse_args(argv)
    for checkout in (*args.beside, args.checkout):
        print(f"## {checkout.resolve().name}\n\n{table(checkout)}\n")


if __name__ == "__main__":
    main()
