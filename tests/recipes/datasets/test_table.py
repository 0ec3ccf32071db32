"""The second start reads no row and trains on the same; whatever is amiss with the cache, a start goes on."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.full_disk import files_of_at_most

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets import beir_rows, forms, json_lists, pairs, rows, table
from megatron_embed.recipes.datasets.pairs import PairDataset, PairSource
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.datasets.table import Found, Recipe, Table, TableWriter, cache_folder, open_table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that keeps small files too."""
    monkeypatch.setenv("MEGATRON_EMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "LEAST_BYTES", 0)
    return tmp_path / "cache"


def write(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def json_lines(folder: Path) -> Path:
    return write(folder / "a.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(30)])


def everything(folder: Path) -> Path:
    """Blank lines, repeated texts, several positives, and the answers of a teacher on some rows."""
    values: list[Any] = [{"query": f"q{i % 9}", "positive": [f"p{i}", f"p{i % 5}"]} for i in range(20)]
    values += [{"query": f"r{i}", "positive": f"p{i}", "negatives": ["n", "m"], "scores": [1, 2, 3]} for i in range(9)]
    path = write(folder / "a.jsonl", values)
    with path.open("a") as file:
        vector = [0.5] * 4
        row = {"query": "v", "positive": "w", "query_embedding": vector, "positive_embedding": vector}
        file.write("\n\r\n" + json.dumps(row) + "\n")
    return path


def array(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps([{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(30)]))
    return path


def documents_by_id(folder: Path) -> Path:
    write(folder / "corpus.jsonl", [{"docid": f"d{i}", "text": f"p{i}"} for i in range(40)])
    return write(
        folder / "a.jsonl", [{"query_text": f"q{i}", "positive_document_ids": [f"d{39 - i}"]} for i in range(30)]
    )


def named_corpora(folder: Path) -> Path:
    for name in "ab":
        write(folder / name / "merlin_metadata.json", [{"corpus_id": name}])
        write(folder / name / "x.jsonl", [{"id": f"d{i}", "text": f"{name} {i}"} for i in range(40)])
    data = [{"question": f"q{i}", "corpus_id": "ab"[i % 2], "pos_doc": [{"id": f"d{i}"}]} for i in range(30)]
    path = folder / "a.json"
    path.write_text(json.dumps({"corpus": [{"path": "a"}, {"path": "b"}], "data": data}))
    return path


def beir(folder: Path) -> Path:
    write(folder / "beir" / "corpus.jsonl", [{"_id": f"d{i}", "text": f"p{i}"} for i in range(40)])
    write(folder / "beir" / "queries.jsonl", [{"_id": f"q{i}", "text": f"q{i}"} for i in range(30)])
    (folder / "beir" / "qrels").mkdir()
    lines = [f"q{i}\td{(i + more) % 40}\t1\n" for i in range(30) for more in range(1 + i % 2)]
    (folder / "beir" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder / "beir"


FORMS = (json_lines, everything, array, documents_by_id, named_corpora, beir)
ORDERS = (
    "37d9380d87ae8f2e",
    "79d95304780b94cb",
    "542ce790362a2165",
    "f51f720678eeca5f",
    "0e244533e3af55f4",
    "60ed6facdf8b8df3",
)


def start(path: Path) -> PairDataset:
    return PairDataset([DataSource(path=str(path), query_prompt="q: ")])


def seen(data: PairDataset) -> list[Any]:
    """All that training takes from a dataset."""
    source, sampler = data.sources[0], GlobalBatchSampler(data, 4, 1)
    facts = [source.max_negatives, source.no_scores, source.no_vectors, source.vector_widths]
    facts += [source.form, source.odd]
    return facts + [[data[i] for i in sampler.batch(step)] for step in range(2 * sampler.steps_per_epoch)]


def entries(cache: Path, kind: str = "*") -> list[Path]:
    return sorted(path.parent for path in cache.glob(f"tables-*/{kind}-*/*/digests.json"))


@contextmanager
def nothing_is_read() -> Iterator[None]:
    """Whoever parses a line, cuts a list or opens a form's reader fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "parse_json", fail)
        patch.setattr(json_lists.JsonList, "entries", fail)
        patch.setattr(forms, "form_of", fail)
        patch.setattr(beir_rows, "read_qrels", fail)
        patch.setattr(table, "TableWriter", fail)
        yield


@pytest.mark.parametrize(("form", "wanted"), zip(FORMS, ORDERS, strict=True), ids=[form.__name__ for form in FORMS])
@pytest.mark.parametrize("kept", [True, False])
def test_the_examples_and_their_order_are_those_of_earlier_versions(
    form: Callable[[Path], Path], wanted: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests recorded where rows were parsed again from JSON at every draw."""
    if not kept:
        monkeypatch.setattr(table, "LEAST_BYTES", 1 << 40)
    data = start(form(tmp_path))
    sampler = GlobalBatchSampler(data, 4, 1)
    found = []
    for index in (index for step in range(3 * sampler.steps_per_epoch) for index in sampler.batch(step)):
        example = data[index]
        scores, *vectors = example.teacher
        teacher = [scores and [*map(float, scores)], *vectors]
        texts = [example.query, example.positive, example.negatives, example.positives]
        found.append([*texts, example.line, example.query_prompt, example.passage_prompt, teacher])
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == wanted


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_second_start_reads_no_row_and_gives_the_same(
    form: Callable[[Path], Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = form(tmp_path)
    first = seen(start(path))
    kept = entries(cache)
    with nothing_is_read():
        second = start(path)
    assert seen(second) == first
    assert entries(cache) == kept
    monkeypatch.setattr(table, "LEAST_BYTES", 1 << 40)
    shutil.rmtree(cache)
    with pytest.raises(AssertionError, match="read"), nothing_is_read():
        start(path)
    assert seen(start(path)) == first
    assert not cache.exists()


def test_what_is_kept_is_mapped(tmp_path: Path, cache: Path) -> None:
    path = everything(tmp_path)
    before = pyarrow.total_allocated_bytes()
    for _ in range(2):  # at the first start too: what was built is let go
        source = start(path).sources[0]
        assert all(isinstance(found.base, np.memmap) and not found.flags.writeable for found in source_arrays(source))
        assert [source.pair(row).query for row in range(source.rows)][-1] == "v"
        assert pyarrow.total_allocated_bytes() == before  # nothing is copied into Arrow's memory
        (file,) = cache.glob("tables-*/pairs-*/*/rows.arrow")
        assert str(file) in Path("/proc/self/maps").read_text()


def source_arrays(source: PairSource) -> list[np.ndarray]:
    found = [source.groups, source._ends]
    assert all(array is not None for array in found)
    return found  # type: ignore[return-value]


def test_small_files_leave_nothing_behind(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LEAST_BYTES", 16 << 20)
    start(json_lines(tmp_path))
    assert not cache.exists()


def test_a_changed_file_is_read_again_and_its_old_entries_go(tmp_path: Path, cache: Path) -> None:
    path = json_lines(tmp_path)
    start(path)
    kept = entries(cache)
    path.write_text(path.read_text() + json.dumps({"query": "new", "positive": ["p", "o"]}) + "\n")
    assert len(start(path)) == 32
    changed = entries(cache)
    assert len(changed) == len(kept) == 1
    assert not {*changed} & {*kept}


def test_every_change_of_a_file_counts(tmp_path: Path) -> None:
    path = json_lines(tmp_path)
    start(path)
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="read"), nothing_is_read():
        start(path)
    for old, new in (("q0", "x0"), ("q15", "x15"), ("p29", "x29")):  # of the same size, and the time set back
        start(path)
        path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        with pytest.raises(AssertionError, match="read"), nothing_is_read():
            start(path)
    texts = {text for example in map(start(path).__getitem__, range(30)) for text in (example.query, example.positive)}
    assert {"x0", "x15", "x29"} <= texts


def test_a_change_in_the_middle_is_noticed_by_the_time_that_cannot_be_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_BLOCK", 16)
    path = json_lines(tmp_path)
    state = path.stat()
    before = table.stamps([path])
    path.write_text(path.read_text().replace('"q15"', '"x15"'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    (old,), (new,) = before, table.stamps([path])
    assert [number for number in range(5) if old[number] != new[number]] == [3]


@pytest.mark.parametrize("form", [documents_by_id, named_corpora, beir], ids=lambda form: form.__name__)
def test_a_changed_corpus_is_noticed(form: Callable[[Path], Path], tmp_path: Path) -> None:
    path = form(tmp_path)
    start(path)
    name = {documents_by_id: "corpus.jsonl", named_corpora: "b/x.jsonl", beir: "beir/corpus.jsonl"}[form]
    documents = (tmp_path / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join(documents[::-1]) + "\n")
    data = start(path)
    assert {data[i].positive for i in range(30)} & {"p39", "p1", "b 1"}
    (tmp_path / name).write_text("\n".join(documents[:5]) + "\n")
    with pytest.raises(UserError, match="is not in"):
        start(path)


def test_an_unusable_row_is_reported_at_every_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"query": "q", "positive": "p"}, {"query": "", "positive": "p"}])
    for _ in range(3):
        with pytest.raises(UserError, match=r"a.jsonl, line 2: 'query' holds an empty text"):
            start(path)


def damages() -> dict[str, Callable[[Path], object]]:
    def flipped(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)

    return {
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
        "empty": lambda path: path.write_bytes(b""),
        "one bit": flipped,
        "absent": lambda path: path.unlink(),
        "other JSON": lambda path: path.write_text("[1]"),
        "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_entry_is_built_again(damage: str, tmp_path: Path, cache: Path) -> None:
    path = everything(tmp_path)
    first = seen(start(path))
    files = sorted(file for entry in entries(cache) for file in entry.iterdir())
    assert [file.name for file in files] == ["digests.json", "ends.npy", "facts.json", "groups.npy", "rows.arrow"]
    for file in files:
        damages()[damage](file)
        assert seen(start(path)) == first, file
        with nothing_is_read():
            start(path)
    assert sorted(file for entry in entries(cache) for file in entry.iterdir()) == files


class Trap:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["object array", "plain pickle"])
def test_no_pickle_is_read(form: str, tmp_path: Path, cache: Path) -> None:
    path = everything(tmp_path)
    first = seen(start(path))
    trap = np.array([Trap(tmp_path / "sprung")] * 40, dtype=object)
    for file in cache.glob("*/*/*/*.npy"):
        if form == "object array":
            np.save(file, trap, allow_pickle=True)
        else:
            file.write_bytes(pickle.dumps(trap))
        digests = json.loads((file.parent / "digests.json").read_text())
        digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (file.parent / "digests.json").write_text(json.dumps(digests))
    assert seen(start(path)) == first
    assert not (tmp_path / "sprung").exists()


def test_without_a_writable_folder_a_start_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEGATRON_EMBED_CACHE", str(tmp_path / "file" / "cache"))
    path = json_lines(tmp_path)
    assert [len(start(path)) for _ in range(2)] == [30, 30]
    (message,) = [text for text in caplog.messages if "MEGATRON_EMBED_CACHE" in text]
    assert message.startswith(f"not kept in {tmp_path}/file/cache ($MEGATRON_EMBED_CACHE), so every start reads all")


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = json_lines(tmp_path)
    with files_of_at_most(300), pytest.raises(UserError) as error:
        start(path)
    assert str(error.value).startswith(f"{path}: no room for its table in {cache} nor in ")
    assert "File too large); name a folder on a disk with room in MEGATRON_EMBED_CACHE" in str(error.value)
    assert "File too large" in caplog.text
    assert not [name for entry in cache.glob("*/pairs-*") for name in os.listdir(entry) if name != ".lock"]
    assert len(start(path)) == 30


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MEGATRON_EMBED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/megatron-embed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/megatron-embed")


SCHEMA = pyarrow.schema({"a": pyarrow.int64()})


def recipe(files: list[Path], build: Callable[[TableWriter], Found]) -> Recipe:
    return Recipe("kind", "the data", files, SCHEMA, build)


def of(number: int) -> Callable[[TableWriter], Found]:
    def build(writer: TableWriter) -> Found:
        for _ in range(9):
            writer.add((number,))
        return Found({"a": np.full(9, number)}, {"b": number})

    return build


def number_of(opened: tuple[Table, Found]) -> int:
    rows, found = opened
    assert {*found.arrays["a"].tolist()} == {number for (number,) in rows.values("a")} == {found.facts["b"]}
    return found.facts["b"]


@pytest.mark.parametrize("fails", [False, True])
def test_others_wait_for_the_first(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [json_lines(tmp_path)]
    building, waiting = threading.Event(), threading.Event()
    found: dict[str, Any] = {}
    flock = table.fcntl.flock

    def watched(lock: int, how: int) -> None:
        if how == table.fcntl.LOCK_SH:
            waiting.set()
        flock(lock, how)

    def first(writer: TableWriter) -> Found:
        building.set()
        assert waiting.wait(60)
        if fails:
            raise UserError("a bad row")
        return of(1)(writer)

    def run(name: str, build: Callable[[TableWriter], Found]) -> None:
        try:
            found[name] = number_of(open_table(recipe(files, build)))
        except UserError as error:
            found[name] = str(error)

    monkeypatch.setattr(table.fcntl, "flock", watched)
    threads = [threading.Thread(target=run, args=("first", first), daemon=True)]
    threads[0].start()
    assert building.wait(60)
    threads.append(threading.Thread(target=run, args=("second", of(2)), daemon=True))
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert found == ({"first": "a bad row", "second": 2} if fails else {"first": 1, "second": 1})


def test_where_nobody_waits_every_writer_leaves_a_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [json_lines(tmp_path)]
    monkeypatch.setattr(table, "_turn", lambda _: nullcontext())

    def build(writer: TableWriter) -> Found:
        assert number_of(open_table(recipe(files, of(1)))) == 1
        return of(2)(writer)

    assert number_of(open_table(recipe(files, build))) in (1, 2)
    assert number_of(open_table(recipe(files, of(3)))) in (1, 2)


def test_a_file_written_to_meanwhile_is_refused_and_not_kept(tmp_path: Path, cache: Path) -> None:
    path = json_lines(tmp_path)

    def build(writer: TableWriter) -> Found:
        path.write_text(path.read_text() + "\n")
        return of(1)(writer)

    with pytest.raises(UserError, match="the data: was written to while it was read; start again when it is whole"):
        open_table(recipe([path], build))
    assert not entries(cache)


def test_a_killed_first_start_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    path = json_lines(tmp_path)
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from megatron_embed.recipes.config.schema import DataSource\n"
        "from megatron_embed.recipes.datasets import table\n"
        "from megatron_embed.recipes.datasets.pairs import PairSource\n"
        "table.LEAST_BYTES, table._ROWS = 0, 10\n"
        "table.TableWriter.close = lambda writer: os._exit(9)  # three batches are written, the end is not\n"
        f"PairSource(DataSource(path={str(path)!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 9
    assert [*cache.glob("tables-*/pairs-*/.*.partial-*/rows.arrow")]
    assert not entries(cache)
    assert len(start(path)) == 30
    assert not [*cache.glob("tables-*/pairs-*/.*.partial-*")]


def test_rows_of_many_batches_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_ROWS", 4)
    monkeypatch.setattr(table, "_BYTES", 400)
    values = [{"query": f"q{i}", "positive": f"p{i} " * (i % 7 + 1), "negatives": ["n"] * (i % 3)} for i in range(50)]
    source = start(write(tmp_path / "a.jsonl", values)).sources[0]
    assert len(source._table._ends) > 12
    for row in random.Random(0).sample(range(50), 50):
        pair = source.pair(row)
        assert (pair.query, pair.positives, pair.negatives) == (
            values[row]["query"],
            [values[row]["positive"]],
            values[row]["negatives"],
        )
        assert source.place(row) == f"line {row + 1}"
    for row in (-1, 50):
        with pytest.raises(IndexError):
            source.pair(row)


def test_rows_opened_before_a_change_are_not_kept_as_the_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataSource(path=str(json_lines(tmp_path)))
    reader = pairs.PairReader

    def meanwhile(*arguments: Any) -> Any:
        with open(source.path, "a") as file:
            file.write("not JSON\n")
        return reader(*arguments)

    monkeypatch.setattr(pairs, "PairReader", meanwhile)
    with pytest.raises(UserError, match="was written to while it was read; start again when it is whole"):
        PairSource(source)
    monkeypatch.setattr(pairs, "PairReader", reader)
    with pytest.raises(UserError, match="line 31: not JSON"):
        PairSource(source)


@pytest.mark.parametrize("form", [documents_by_id, named_corpora, beir], ids=lambda form: form.__name__)
def test_documents_named_by_id_lie_in_a_table_of_their_own(
    form: Callable[[Path], Path], tmp_path: Path, cache: Path
) -> None:
    path = form(tmp_path)
    source = start(path).sources[0]
    texts = [source.pair(row).positives for row in range(source.rows)]
    assert all(texts)
    assert [*source._table.values("positives")] == [(None,)] * 30
    numbers = [numbers for (numbers,) in source._table.values("positive_documents")]
    assert [[source._documents[number] for number in row] for row in numbers] == texts
    if form is documents_by_id:  # another file that names them finds their table
        kept = set(entries(cache))
        other = write(tmp_path / "b.jsonl", [{"query_text": "q", "positive_document_ids": ["d7"]}])
        assert start(other)[0].positive == "p7"
        (new,) = set(entries(cache)) - kept
        assert new.parent.name.startswith("pairs-")


def parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"query": f"q{i}", "positive": f"p{i}"} for i in range(3000)]), path
    )
    return path


@pytest.mark.parametrize("form", [json_lines, array, named_corpora, parquet], ids=lambda form: form.__name__)
def test_a_large_file_shows_how_far_it_is_read(
    form: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[int]] = {}

    @contextmanager
    def progress(what: str, total: int, *, unit: str) -> Iterator[Callable[[int], None]]:
        assert unit == "byte"
        shown[what] = []
        yield shown[what].append
        assert sum(shown[what]) == total == Path(what.removeprefix("reading ")).stat().st_size

    monkeypatch.setattr(rows, "_SLOW", 0)
    monkeypatch.setattr(rows, "_TOGETHER", 10)
    monkeypatch.setattr(rows, "progress", progress)
    path = form(tmp_path)
    start(path)
    assert f"reading {path}" in shown
    assert all(len(steps) > 2 and min(steps) >= 0 for steps in shown.values())
    with nothing_is_read():
        start(path)  # from the table: nothing is shown
