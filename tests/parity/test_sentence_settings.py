"""Ready embedders' settings: vectors equal sentence-transformers' own on source, checkpoint, export, after training."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim, dot_score
from support.hf_files import without_checksums
from support.ready import make_ready
from support.runs import recipe, write_pairs
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.sentence_files import read_sentence_settings
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import Encoder, encode, mine, train
from megatron_embed.recipes import evaluate as evaluate_module
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.retrieval import miner
from megatron_embed.recipes.retrieval.mining import MiningRules
from megatron_embed.recipes.retrieval.vectors import VectorFolder

TEXTS = ["How do PLANTS eat?", "ÄÖÜ Schön LONG words " * 20, "one two three four five six seven eight nine ten", "A"]

#: what a folder says beside what every folder says
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing stated": {},
    "do_lower_case": {"transformer": {"do_lower_case": True}, "model": {"prompts": {"query": "FIND: "}}},
    "query_length and document_length": {
        "transformer": {"max_seq_length": 40, "query_length": 6, "document_length": 24}
    },
    "query_length above max_seq_length": {"transformer": {"max_seq_length": 8, "query_length": 30}},
    "document_length alone": {"transformer": {"document_length": 9}},
    "all prompts": {
        "model": {
            "prompts": {"query": " q:\t", "document": "d: ", "clustering": "Identify the topic: ", "none": ""},
            "default_prompt_name": "clustering",
        },
        "transformer": {"max_seq_length": 32},
    },
    "a default prompt and no others": {"model": {"prompts": {"s2s": "Same: "}, "default_prompt_name": "s2s"}},
    "a prompt for passages by its other name": {"model": {"prompts": {"query": "q: ", "passage": "p: "}}},
    "dot": {"normalize": False, "model": {"similarity_fn_name": "dot"}},
    "cosine without Normalize": {"normalize": False, "pooling": "lasttoken"},
    "dot with Normalize": {"model": {"similarity_fn_name": "dot"}},
    "all at once": {
        "normalize": False,
        "pooling": "weightedmean",
        "transformer": {"do_lower_case": True, "max_seq_length": 16, "query_length": 12, "document_length": 90},
        "model": {"prompts": {"query": "Q: ", "document": "D: ", "x": "X: "}, "default_prompt_name": "query"},
    },
}


def theirs(folder: Path) -> dict[str, np.ndarray]:
    """Every way to encode that sentence-transformers has for a folder."""
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    named = {name: model.encode(TEXTS, prompt_name=name) for name in model.prompts}
    kinds = {"query": model.encode_query, "passage": model.encode_document, "text": model.encode}
    return {kind: encode(TEXTS) for kind, encode in kinds.items()} | {f"prompt {name}": v for name, v in named.items()}


def ours(path: Path) -> dict[str, np.ndarray]:
    """The same with this project's encoder."""
    with Encoder.from_pretrained(path, device="cpu") as encoder:
        assert encoder.source is not None
        assert encoder.source.settings is not None
        kinds = {kind: encoder.encode(TEXTS, kind=kind) for kind in ("query", "passage", "text")}  # type: ignore[arg-type]
        names = encoder.source.settings.all_prompts
        named = {f"prompt {name}": encoder.encode(TEXTS, kind="text", prompt_name=name) for name in names}
    return kinds | named


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for way, vectors in wanted.items():
        np.testing.assert_allclose(found[way], vectors, rtol=0, atol=1e-5 * np.abs(vectors).max(), err_msg=way)


@pytest.mark.parametrize("name", SETTINGS)
def test_vectors_equal_on_source_checkpoint_and_export(name: str, tmp_path: Path) -> None:
    folder = make_ready(tmp_path / "ready", **SETTINGS[name])
    wanted = theirs(folder)
    assert_equal(ours(folder), wanted)
    import_hf(folder, tmp_path / "megatron", progress=False)
    assert_equal(ours(tmp_path / "megatron"), wanted)
    export_hf(tmp_path / "megatron", tmp_path / "export", progress=False)
    assert_equal(ours(tmp_path / "export"), wanted)
    assert_equal(theirs(tmp_path / "export"), wanted)
    assert read_sentence_settings(tmp_path / "export") == read_sentence_settings(folder)
    before, after = (SentenceTransformer(str(path), device="cpu") for path in (folder, tmp_path / "export"))
    for attribute in ("similarity_fn_name", "default_prompt_name", "prompts", "max_seq_length"):
        assert getattr(after, attribute) == getattr(before, attribute)


@pytest.mark.parametrize("name", ["do_lower_case", "all at once"])
def test_what_no_recipe_states_is_kept_through_training(name: str, tmp_path: Path) -> None:
    """The recipe's prompts and lengths, the source's other prompts, default prompt and lower-casing."""
    folder = make_ready(tmp_path / "model", **SETTINGS[name])
    write_pairs(tmp_path / "train.jsonl", 16)
    import_hf(folder, tmp_path / "imported", progress=False)
    steps = ("train.train_iters=1", "data.query_prompt=ASK ", "data.query_max_length=7")
    train(recipe(tmp_path, "straight", *steps))
    train(recipe(tmp_path, "run", *steps, f"checkpoint.pretrained_checkpoint={tmp_path / 'imported'}"))
    for run in ("straight", "run"):
        export_hf(tmp_path / run, tmp_path / f"{run}-export", progress=False)
        wanted = theirs(tmp_path / f"{run}-export")
        assert_equal(ours(tmp_path / run), wanted)
        settings = read_sentence_settings(tmp_path / f"{run}-export")
        source = read_sentence_settings(folder)
        assert settings is not None
        assert source is not None
        assert (settings.prompts, settings.default_prompt_name) == (source.prompts, source.default_prompt_name)
        assert settings.do_lower_case is source.do_lower_case is True
        assert (settings.query_prompt, settings.passage_prompt) == ("ASK ", "passage: ")
        assert (settings.query_max_length, settings.passage_max_length, settings.max_length) == (7, 64, None)
        assert (settings.normalize, settings.similarity) == (True, "cosine")


def test_training_reads_lower_cased_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of a step are those that the export will give."""
    from megatron_embed.recipes.training import rank_batch

    make_ready(tmp_path / "model", transformer={"do_lower_case": True})
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"query": f"WHAT is W{i}", "positive": f"W{i} IS Ä"}) + "\n" for i in range(8))
    )
    seen: list[list[int]] = []
    monkeypatch.setattr(rank_batch.BatchBuilder, "build", _watched(rank_batch.BatchBuilder.build, seen))
    train(recipe(tmp_path, "run", "train.train_iters=1", "data.query_prompt=Q: ", "data.passage_prompt="))
    export_hf(tmp_path / "run", tmp_path / "export", progress=False)
    model = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    texts = [model.prompts["query"] + f"WHAT is W{i}" for i in range(8)] + [f"W{i} IS Ä" for i in range(8)]
    wanted = [model.preprocess([text])["input_ids"][0].tolist() for text in texts]
    assert sorted(seen) == sorted(wanted)


def _watched(build: Callable[..., Any], seen: list[list[int]]) -> Callable[..., Any]:
    def watched(self: Any, step: int) -> Any:
        batch = build(self, step)
        seen.extend(batch.sequences)
        return batch

    return watched


# ---- similarity


def write_collection(folder: Path) -> dict[str, Any]:
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randint(0, 60)}" for _ in range(count))

    corpus = {f"d{i}": words(generator.randint(1, 30)) for i in range(120)}
    queries = {f"q{i}": " ".join(corpus[f"d{4 * i}"].split()[:3]) for i in range(30)}
    relevant = {f"q{i}": {f"d{4 * i}", f"d{4 * i + 1}"} for i in range(30)}
    (folder / "qrels").mkdir(parents=True)
    for name, texts in {"corpus": corpus, "queries": queries}.items():
        rows = [{"_id": id_, "text": text} for id_, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [f"{query}\t{document}\t1" for query, ids in relevant.items() for document in sorted(ids)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return {"queries": queries, "corpus": corpus, "relevant_docs": relevant}


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_similarity_orders_evaluation_and_mining(similarity: str, tmp_path: Path) -> None:
    """Also of a model without Normalize, on which the two order otherwise."""
    folder = make_ready(tmp_path / "ready", normalize=False, model={"similarity_fn_name": similarity})
    collection = write_collection(tmp_path / "words")
    evaluator = InformationRetrievalEvaluator(
        **collection,
        ndcg_at_k=[10],
        mrr_at_k=[10],
        precision_recall_at_k=[100],
        write_csv=False,
        show_progress_bar=False,
        score_functions={"cosine": cos_sim, "dot": dot_score},
    )
    model = SentenceTransformer(str(folder), device="cpu")
    wanted = evaluator(model)
    output = tmp_path / "scores.json"
    arguments = ["--model", str(folder), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        evaluate_module.main([*arguments, "--data", str(tmp_path / "words"), "--output", str(output), "--no-bm25"])
    assert not ended.value.code
    found = json.loads(output.read_text())["words"]
    for metric in ("ndcg@10", "recall@100", "mrr@10"):
        assert found[metric] == pytest.approx(wanted[f"{similarity}_{metric}"], abs=1e-6)
    assert wanted["cosine_ndcg@10"] != wanted["dot_ndcg@10"]
    rows = [{"query": collection["queries"][f"q{i}"], "positive": collection["corpus"][f"d{4 * i}"]} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mined = tmp_path / "mined.jsonl"
    data = ["--data", str(tmp_path / "train.jsonl"), "--corpus", str(tmp_path / "words"), "--output", str(mined)]
    with pytest.raises(SystemExit) as ended:
        mine.main([*arguments, *data, "--max-score-ratio", "inf", "--scores"])
    assert not ended.value.code
    documents = list(dict.fromkeys(collection["corpus"].values()))
    scores = model.similarity(model.encode_query([row["query"] for row in rows]), model.encode_document(documents))
    for row, of_query in zip(map(json.loads, mined.read_text().splitlines()), scores, strict=True):
        best = [documents[i] for i in of_query.argsort(descending=True).tolist()]
        best = [text for text in best if text not in (row["positive"], row["query"])][:4]
        assert row["negatives"] == best
        of_texts = [float(of_query[documents.index(text)]) for text in (row["positive"], *best)]
        assert row["scores"] == pytest.approx(of_texts, rel=2e-5)


def test_mining_in_python_wants_vectors_for_scores(tmp_path: Path) -> None:
    folder = make_ready(tmp_path / "ready", normalize=False)
    write_collection(tmp_path / "words")
    write_pairs(tmp_path / "train.jsonl", 8)
    inputs = str(tmp_path / "train.jsonl"), Corpus(tmp_path / "words"), tmp_path / "out.jsonl"
    with (
        Encoder.from_pretrained(folder, device="cpu") as encoder,
        pytest.raises(UserError, match=r"its similarity is the cosine and its vectors are not normalised; wanted an"),
    ):
        miner.mine(encoder, *inputs, rules=MiningRules(), cache=tmp_path / "cache")
    assert not (tmp_path / "out.jsonl").exists()


# ---- the command line


@pytest.mark.parametrize(
    ("options", "way"),
    [
        (["--kind", "query"], "query"),
        (["--kind", "passage"], "passage"),
        (["--kind", "text"], "text"),
        (["--kind", "text", "--prompt-name", "none"], "prompt none"),
    ],
)
def test_encode_takes_kinds_and_named_prompts(options: list[str], way: str, tmp_path: Path) -> None:
    folder = make_ready(tmp_path / "ready", **SETTINGS["all prompts"])
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    arguments = ["--model", str(folder), "--input", str(tmp_path / "texts"), "--output", str(tmp_path / "v")]
    with pytest.raises(SystemExit) as ended:
        encode.main([*arguments, "--device", "cpu", *options])
    assert not ended.value.code
    vectors = VectorFolder(tmp_path / "v")
    assert_equal({way: vectors.rows(0, 4)}, {way: theirs(folder)[way]})


def test_a_prompt_that_the_model_has_not(tmp_path: Path) -> None:
    with (
        Encoder.from_pretrained(make_ready(tmp_path / "ready"), device="cpu") as encoder,
        pytest.raises(UserError, match="prompt 'cluster': the model has none of this name; known: query, document"),
    ):
        encoder.encode(TEXTS, prompt_name="cluster")


# ---- older checkpoints


def test_a_checkpoint_from_before_the_settings_were_kept(tmp_path: Path) -> None:
    """It has them in the embedder's files; and what was trained then was trained without them."""
    folder = make_ready(tmp_path / "ready", **SETTINGS["all at once"])
    import_hf(folder, tmp_path / "megatron", progress=False)
    path = without_checksums(tmp_path / "megatron" / "iter_0000000") / "run_config.yaml"
    run = yaml.safe_load(path.read_text())
    del run["sentence"], run["model"]["bidirectional"]
    path.write_text(yaml.safe_dump(run))
    assert_equal(ours(tmp_path / "megatron"), theirs(folder))
    path.write_text(yaml.safe_dump({**run, "train": {"train_iters": 1}}))
    with Encoder.from_pretrained(tmp_path / "megatron", device="cpu") as encoder:
        assert not encoder.tokenizer.do_lower_case
        assert encoder.source is not None
        assert encoder.source.settings is not None
        assert encoder.source.settings.similarity == "dot"


def test_a_checkpoint_of_another_program_takes_them_from_hf_model(tmp_path: Path) -> None:
    folder = make_ready(tmp_path / "ready", **SETTINGS["all at once"])
    import_hf(folder, tmp_path / "megatron", progress=False)
    (without_checksums(tmp_path / "megatron" / "iter_0000000") / "run_config.yaml").unlink()
    shutil.rmtree(tmp_path / "megatron" / "iter_0000000" / "hf")
    done = export_hf(tmp_path / "megatron", tmp_path / "export", hf_model=folder, progress=False)
    assert_equal(theirs(tmp_path / "export"), theirs(folder))
    (note,) = done.notes
    assert note.startswith("queries have 12 tokens at most, passages 90: sentence-transformers 6 keeps to query_length")
    assert "`query_length` and `document_length`" in (tmp_path / "export" / "README.md").read_text()


def test_a_model_that_states_nothing_has_no_prompt(tmp_path: Path) -> None:
    with Encoder.from_pretrained(save_model(tmp_path / "model"), device="cpu") as encoder:
        vectors = [encoder.encode(TEXTS, kind=kind) for kind in ("query", "passage", "text")]  # type: ignore[arg-type]
    for found in vectors[1:]:
        np.testing.assert_array_equal(found, vectors[0])
