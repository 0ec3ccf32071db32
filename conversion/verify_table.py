"""The output of ``verify``: a row for each kind of thing, and a table of the differences."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_embed.conversion.verify import Verification

_SHOWN = 40


def print_table(outcome: Verification) -> None:
    """Print the comparisons and differences; for tensors and embeddings the largest differences come first."""
    console = Console()
    summary = Table("what", "compared", "equal", "largest difference")
    for section in outcome.sections:
        largest = "" if section.largest is None else f"{section.largest:g}"
        summary.add_row(section.name, str(section.compared), str(section.equal), largest)
    console.print(summary)
    if outcome.differences:
        table = Table("differs", "found", "wanted", title=f"{len(outcome.differences)} differences", show_lines=True)
        for column in table.columns:
            column.overflow = "fold"
        for difference in sorted(outcome.differences, key=lambda d: -(d.largest or float("inf")))[:_SHOWN]:
            table.add_row(*map(escape, (difference.name, difference.found, difference.wanted)))
        console.print(table)
        if (more := len(outcome.differences) - _SHOWN) > 0:
            console.print(f"… and {more} more")
    for note in outcome.notes:
        console.print(note, highlight=False, markup=False)


def summarize(outcome: Verification) -> str:
    """Return the differences in one line, such as ``config (1 of 57), tensors (2 of 20) differ; first …``."""
    differing = [s for s in outcome.sections if s.differences]
    sections = ", ".join(f"{s.name} ({s.compared - s.equal} of {s.compared})" for s in differing)
    first = outcome.differences[0]
    return f"{sections} differ; first {first.name}: found {first.found}, wanted {first.wanted}"
