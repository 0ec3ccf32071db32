"""The encoding program, killed again and again: in the end the folder is that of an undisturbed run."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.killing import call_in_fresh_process, run_killed
from support.tiny_models import save_model
from test_encode_corpus import ROWS, files_of, write_corpus

from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.recipes import encode as command
from megatron_embed.recipes.datasets.tokenization import TextTokenizer
from megatron_embed.recipes.retrieval import encode_corpus, writer_lock
from megatron_embed.recipes.retrieval.encode_corpus import encode_texts
from megatron_embed.recipes.retrieval.vectors import Manifest, VectorFolder, plan_shards

pytestmark = pytest.mark.slow

SHARDS = plan_shards(len(ROWS), 4)

#: where a run changes the folder, and what lies between; a rank is killed before a line of these
WATCHED = (
    encode_texts,
    writer_lock.writing.__wrapped__,  # type: ignore[attr-defined]
    writer_lock._take,
    encode_corpus._open_output,
    encode_corpus._Job.calibrate,
    encode_corpus._Job.run,
    encode_corpus._Job._encode,
    Manifest.write,
    atomic_file.__wrapped__,  # type: ignore[attr-defined]
)


def encode(folder: Path, output: Path) -> None:
    """The program itself, with small shards; ends the process."""
    encode_corpus.plan_shards = lambda rows, _: SHARDS
    arguments = ["--model", str(folder / "model"), "--input", str(folder / "corpus.jsonl"), "--output", str(output)]
    command.main([*arguments, "--precision", "int8", "--device", "cpu"])


def complete_shards(output: Path, whole: dict[str, bytes]) -> int:
    """How many shards a killed run's manifest calls complete; what these hold must be right."""
    manifest = Manifest.read(output)
    shards = [shard for shard in manifest.shards if shard.complete] if manifest else []
    for shard in shards:
        for name in (shard.vectors, shard.ids):
            assert (output / name).read_bytes() == whole[name], f"{name} is called complete and is not"
    return len(shards)


def kill_ten_times(folder: Path, ranks: int) -> tuple[list[int], set[str]]:
    """Encode into ``whole`` undisturbed, and into ``out`` through ten kills.

    Returns:
        complete shards after each kill, and the files that were being written when one came.
    """
    TextTokenizer.from_folder(  # imports much that would else be imported by each child anew
        folder / "model", query_prompt="", passage_prompt="", query_max_length=8, passage_max_length=8
    )
    undisturbed = run_killed(partial(encode, folder, folder / "whole"), watched=WATCHED, moments=[None] * ranks)
    assert undisturbed.codes == [0] * ranks, undisturbed.output
    whole, lines = files_of(folder / "whole"), min(undisturbed.lines)
    generator = random.Random(ranks)
    program, progress, torn = partial(encode, folder, folder / "out"), [], set()
    for _ in range(10):
        moments: list[int | None] = [None] * ranks
        moments[generator.randrange(ranks)] = generator.randrange(1, lines // 4)
        killed = run_killed(program, watched=WATCHED, moments=moments)
        assert -signal.SIGKILL in killed.codes, f"not killed: {killed}"
        progress.append(complete_shards(folder / "out", whole))
        torn |= {path.name for path in folder.glob("out/*.partial")}
    last = run_killed(program, watched=WATCHED, moments=[None] * ranks)
    assert last.codes == [0] * ranks, last.output
    return progress, torn


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_ten_times_and_resumed_equals_undisturbed(ranks: int, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    write_corpus(tmp_path / "corpus.jsonl")
    progress, torn = call_in_fresh_process(kill_ten_times, tmp_path, ranks)
    # vectors, ids, calibration and manifest, and nothing else in the folder
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    found = VectorFolder(tmp_path / "out")
    assert [id_ for ids, _ in found for id_ in ids] == [row["_id"] for row in ROWS]
    assert np.concatenate([rows for _, rows in found]).shape == (len(ROWS), 48)
    # and the kills were worth something
    assert progress == sorted(progress), "a resumed run lost what was complete"
    assert len(set(progress)) >= 3, f"the kills came at much the same moment: {progress}"
    assert progress[-1] < len(SHARDS)
    if ranks == 1:  # where a second rank is at that moment, the machine decides
        assert torn, "no kill came while a file was being written"
