"""Instructions of AutoModel's corpora: the strings that its own collator makes of them with use_dataset_instruction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.mining import read, run, write
from support.ready import make_ready
from support.runs import recipe, write_pairs
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import Encoder, train
from megatron_embed.recipes.config.schema import DataSection, DataSource
from megatron_embed.recipes.data import main
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.training.rank_batch import BatchBuilder

#: corpus → what its metadata says beside the id
METADATA: dict[str, dict[str, Any]] = {
    "wiki": {"query_instruction": "Instruct: find it.\nQuery:", "passage_instruction": "Passage:"},
    "tasks": {"query_instruction": "Which label?", "passage_instruction": ""},
    "plain": {"class": "TextQADataset"},
    "none": {"query_instruction": None},
}


def automodel(folder: Path, metadata: dict[str, dict[str, Any]]) -> Path:
    """Each corpus has three rows, each with a positive and two negatives."""
    data = []
    for corpus, said in metadata.items():
        (folder / corpus).mkdir(parents=True)
        (folder / corpus / "merlin_metadata.json").write_text(json.dumps({"corpus_id": corpus, **said}))
        write(folder / corpus / "part.jsonl", [{"id": f"d{i}", "text": f"{corpus} text {i}"} for i in range(9)])
        ids = [[f"d{3 * i + k}" for k in range(3)] for i in range(3)]
        data += [
            {"question_id": f"{corpus}{i}", "question": f"{corpus} question {i}", "corpus_id": corpus}
            | {"pos_doc": [{"id": first}], "neg_doc": [{"id": other} for other in others]}
            for i, (first, *others) in enumerate(ids)
        ]
    path = folder / "train.json"
    path.write_text(json.dumps({"corpus": [{"path": corpus} for corpus in metadata], "data": data}))
    return path


def as_automodel_does(corpus: str, kind: str, text: str) -> str:
    """``BiEncoderCollator`` with ``use_dataset_instruction``, written out."""
    instruction = METADATA[corpus].get(f"{kind}_instruction") or ""
    return f"{instruction} {text}" if instruction else text


def texts_of(dataset: PairDataset) -> list[tuple[str, str, list[str]]]:
    examples = (dataset[i] for i in range(len(dataset)))
    return [
        (e.query_prompt + e.query, e.passage_prompt + e.positive, [e.passage_prompt + text for text in e.negatives])
        for e in examples
    ]


def test_instructions_are_put_before_texts_as_automodel_does(tmp_path: Path) -> None:
    """Over all corpora of a file, as its ``use_dataset_instruction`` is; the recipe's prompts have no part then."""
    section = DataSection(train=[DataSource(path=str(automodel(tmp_path, METADATA)))], query_prompt="recipe's: ")
    assert texts_of(PairDataset(section.sources())) == [
        (
            as_automodel_does(corpus, "query", f"{corpus} question {i}"),
            as_automodel_does(corpus, "passage", f"{corpus} text {3 * i}"),
            [as_automodel_does(corpus, "passage", f"{corpus} text {3 * i + k}") for k in (1, 2)],
        )
        for corpus in METADATA
        for i in range(3)
    ]


def test_without_instructions_the_recipes_prompts_are_used(tmp_path: Path) -> None:
    path = automodel(tmp_path, {"plain": {}, "none": {"query_instruction": "", "passage_instruction": None}})
    data = PairDataset(DataSection(train=[DataSource(path=str(path))], query_prompt="Q ").sources())
    assert {(query[:2], positive[:9]) for query, positive, _ in texts_of(data)} == {("Q ", "passage: ")}


def test_a_sources_own_prompts_take_the_place_of_instructions(tmp_path: Path) -> None:
    """As AutoModel's default, ``use_dataset_instruction: false`` with prefixes; each prompt by itself."""
    path = str(automodel(tmp_path, METADATA))
    section = DataSection(train=[{"path": path, "query_prompt": "q: ", "passage_prompt": ""}])  # type: ignore[list-item]
    found = texts_of(PairDataset(section.sources()))
    assert found[0] == ("q: wiki question 0", "wiki text 0", ["wiki text 1", "wiki text 2"])
    section = DataSection(train=[{"path": path, "query_prompt": "q: "}])  # type: ignore[list-item]
    again = DataSection.model_validate(section.model_dump())  # as a run_config.yaml has it, nulls and all
    for one in (section, again):
        query, positive, _ = texts_of(PairDataset(one.sources()))[0]
        assert (query, positive) == ("q: wiki question 0", "Passage: wiki text 0")


def test_a_step_trains_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids of the batch, prompts included."""
    save_model(tmp_path / "model")
    path = automodel(tmp_path / "data", METADATA)
    seen: list[list[int]] = []
    build = BatchBuilder.build

    def watched(self: BatchBuilder, step: int) -> Any:
        batch = build(self, step)
        seen.extend(batch.sequences)
        wanted = {
            text for query, positive, negatives in texts_of(self.dataset) for text in (query, positive, *negatives)
        }
        theirs = self.tokenizer.tokenizer(list(wanted), truncation=True, max_length=64)["input_ids"]
        assert sorted(theirs) == sorted(seen)
        return batch

    monkeypatch.setattr(BatchBuilder, "build", watched)
    train(
        recipe(
            tmp_path, "run", f"data.train={path}", "train.train_iters=1", "train.global_batch_size=12",
            "data.query_max_length=64", "train.micro_batch_tokens=512",
        )
    )  # fmt: skip
    assert len(seen) == 12 * 4


@pytest.mark.parametrize("key", ["query_instruction", "passage_instruction"])
def test_an_instruction_of_another_type_is_named(key: str, tmp_path: Path) -> None:
    path = automodel(tmp_path, {"wiki": {key: ["find"]}})
    with pytest.raises(UserError, match=rf"wiki/merlin_metadata.json: '{key}': found a list; wanted text"):
        PairDataset([DataSource(path=str(path))])


def test_the_inspector_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = automodel(tmp_path, METADATA)
    with pytest.raises(SystemExit):
        main([str(path)])
    out = capsys.readouterr().out
    told = (
        r"of corpus 'wiki', by its instructions: query_prompt 'Instruct: find it.\nQuery: ', passage_prompt 'Passage: '"
    )
    assert f"  prompts    {told}\n" in out
    assert r"sample     'Instruct: find it.\nQuery: wiki question 0'" in out
    assert "             + 'Passage: wiki text 0'" in out


def test_mined_rows_keep_them(tmp_path: Path) -> None:
    """Queries are searched with their instructions; positives with the corpus's prompt, which must be theirs."""
    automodel(tmp_path, {"wiki": METADATA["wiki"]}).rename(tmp_path / "train.jsonl")
    write(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": f"wiki text {i}"} for i in range(9)])
    make_ready(tmp_path / "other", model={"prompts": {"query": "", "document": "passage: "}})
    with (
        Encoder.from_pretrained(tmp_path / "other", device="cpu") as encoder,
        pytest.raises(UserError, match=r"prompt 'Passage: ', but .* corpus with 'passage: '; mine with"),
    ):
        run(encoder, tmp_path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    make_ready(tmp_path / "same", model={"prompts": {"query": "", "document": "Passage: "}})
    with Encoder.from_pretrained(tmp_path / "same", device="cpu") as encoder:
        run(encoder, tmp_path, tmp_path / "out.jsonl", with_scores=True)
        query = encoder.encode("Instruct: find it.\nQuery: wiki question 0", prompt="")
        wanted = float(query @ encoder.encode("Passage: wiki text 0", kind="text"))
    row = read(tmp_path / "out.jsonl")[0]
    assert (row["query_prompt"], row["passage_prompt"]) == ("Instruct: find it.\nQuery: ", "Passage: ")
    assert row["scores"][0] == pytest.approx(wanted, abs=3e-6)
    mined = PairDataset([DataSource(path=str(tmp_path / "out.jsonl"), passage_prompt="source's: ")])
    assert texts_of(mined)[0][:2] == ("Instruct: find it.\nQuery: wiki question 0", "Passage: wiki text 0")


def test_a_rows_own_passage_prompt(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "p", "negatives": ["n"], "passage_prompt": "own: "},
        {"query": "r", "positive": "s"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = PairDataset([DataSource(path=str(path), passage_prompt="source's: ")])
    assert texts_of(data) == [("q", "own: p", ["own: n"]), ("r", "source's: s", [])]
    write(path, [{"query": "q", "positive": "p", "passage_prompt": 5}])
    with pytest.raises(UserError, match=r"line 1: 'passage_prompt': found the number 5; wanted text"):
        PairDataset([DataSource(path=str(path))])
    write_pairs(path, 2)
    assert PairDataset([DataSource(path=str(path))]).sources[0].passage_prompts == []
