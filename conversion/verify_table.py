"""The table that ``verify`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_embed.conversion.verify import Verification

_SHOWN = 20


def print_table(outcome: Verification) -> None:
    """Print what was compared, the largest differences first."""
    console = Console()
    summary = Table("what", "compared", "equal", "largest difference")
    tensors = [difference for difference in outcome.differences if difference.name != "embeddings"]
    largest = max((difference.largest for difference in tensors), default=0.0)
    summary.add_row("tensors", str(outcome.compared), str(outcome.equal), f"{largest:g}")
    if outcome.embeddings is not None:
        same = "yes" if len(tensors) == len(outcome.differences) else "no"
        summary.add_row("embeddings", "3 texts", same, f"{outcome.embeddings:g}")
    console.print(summary)
    if outcome.differences:
        table = Table("differs", "shape", "largest difference", title=f"{len(outcome.differences)} differences")
        for difference in sorted(outcome.differences, key=lambda d: -d.largest)[:_SHOWN]:
            table.add_row(difference.name, difference.what, f"{difference.largest:g}")
        console.print(table)
    for note in outcome.notes:
        console.print(note, highlight=False)
