"""The exported embedder in the programs that will load it: transformers and sentence-transformers, no remote code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from support.hf_files import Source, edit_json, without_checksums
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Mistral3ForConditionalGeneration

from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.mcore.folder import RUN_CONFIG

QUERIES = ["how do plants eat?", "a  b [INST]</s> c", "ünïcödé 漢字"]
LONG = "one two three four " * 60


def exported(source: Path, tmp_path: Path, **run: dict[str, Any]) -> Path:
    """Import and export, with sections of ``run_config.yaml`` changed between."""
    import_hf(source, tmp_path / "m", tp=2, progress=False)
    path = without_checksums(tmp_path / "m" / "iter_0000000") / RUN_CONFIG
    values = yaml.safe_load(path.read_text())
    for section, changes in run.items():
        values.setdefault(section, {}).update(changes)
    path.write_text(yaml.safe_dump(values))
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    return tmp_path / "hf"


def by_hand(model: Any, ids: list[int], pooling: str, normalize: bool) -> Tensor:
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    n = len(ids)
    weights = {
        "avg": [1 / n] * n,
        "cls": [1.0] + [0.0] * (n - 1),
        "last": [0.0] * (n - 1) + [1.0],
        "weighted_avg": [(i + 1) / (n * (n + 1) / 2) for i in range(n)],
    }[pooling]
    pooled = (states * torch.tensor(weights)[:, None]).sum(0)
    return pooled / pooled.norm() if normalize else pooled


def assert_same_vectors(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("pooling", "normalize"), [("avg", True), ("avg", False), ("cls", True), ("last", True), ("weighted_avg", True)]
)
def test_vectors_are_the_source_models(pooling: str, normalize: bool, source: Source, tmp_path: Path) -> None:
    """The VLM's own language tower, made bidirectional and pooled by hand, against ``SentenceTransformer.encode``."""
    folder = source("vlm")
    out = exported(folder, tmp_path, encoder={"pooling": pooling, "normalize": normalize})
    tower = Mistral3ForConditionalGeneration.from_pretrained(folder).model.language_model.eval()
    tower.config.is_causal = False
    sentences = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    assert sentences.similarity_fn_name == ("cosine" if normalize else "dot")  # as in the loss
    assert sentences[0].auto_model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    for kind, prompt in (("query", "query: "), ("document", "passage: ")):
        ids = [tokenizer(prompt + text)["input_ids"] for text in QUERIES]
        wanted = torch.stack([by_hand(tower, row, pooling, normalize) for row in ids])
        found = sentences.encode(QUERIES, prompt_name=kind, convert_to_tensor=True)
        assert_same_vectors(found, wanted)


def test_the_last_token_moves_the_first_state(source: Source, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(exported(source("causal_lm"), tmp_path)).eval()
    assert type(model).__name__ == "Ministral3Model"
    with torch.no_grad():
        a, b = (model(input_ids=torch.tensor([[1, 300, 301, last]])).last_hidden_state[0, 0] for last in (2, 400))
    assert not torch.allclose(a, b)


def test_tokens_are_the_training_ones(source: Source, tmp_path: Path) -> None:
    """Prompt, BOS, EOS, control tokens as text, truncation: what training feeds is what the export reads."""
    recipes = pytest.importorskip("megatron_embed.recipes.datasets.tokenization")
    folder = source("vlm")
    out = exported(folder, tmp_path, data={"query_prompt": " q:\t", "query_max_length": 40, "passage_max_length": 40})
    training = recipes.TextTokenizer.from_folder(
        folder, query_prompt=" q:\t", passage_prompt="passage: ", query_max_length=40, passage_max_length=40
    )
    assert AutoTokenizer.from_pretrained(out).model_max_length == 40
    sentences = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    assert sentences.max_seq_length == sentences.tokenizer.model_max_length == 40
    for text in [*QUERIES, LONG]:
        for kind, name in (("query", "query"), ("passage", "document")):
            (wanted,) = training.tokenize([text], kind)
            found = sentences.tokenize([sentences.prompts[name] + text])["input_ids"][0].tolist()
            assert found == wanted
            assert (found[0], found[-1]) == (1, 2)
            assert len(found) <= 40


def test_a_tokenizer_without_eos_gets_it(source: Source, tmp_path: Path) -> None:
    """Generative models' tokenizers often add BOS only."""
    import shutil

    folder = tmp_path / "source"
    shutil.copytree(source("model"), folder)
    edit_json(folder / "tokenizer.json", lambda t: t.update(post_processor=None))
    edit_json(folder / "tokenizer_config.json", lambda t: t.update(add_bos_token=True, add_eos_token=False))
    tokenizer = AutoTokenizer.from_pretrained(exported(folder, tmp_path))
    assert tokenizer("hello")["input_ids"] == AutoTokenizer.from_pretrained(source("model"))("hello")["input_ids"]
    truncated = tokenizer(LONG, truncation=True, max_length=9)["input_ids"]
    assert (truncated[0], truncated[-1], len(truncated)) == (1, 2, 9)


def test_a_chat_template_does_not_come_along(source: Source, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "source"
    shutil.copytree(source("vlm"), folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tekken.json").write_text("{}")
    (folder / "processor_config.json").write_text("{}")
    edit_json(
        folder / "tokenizer_config.json", lambda t: t.update(chat_template="x", processor_class="PixtralProcessor")
    )
    out = exported(folder, tmp_path)
    names = {path.name for path in out.iterdir()}
    assert not names & {"chat_template.jinja", "tekken.json", "processor_config.json"}
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert not {"chat_template", "processor_class"} & set(settings)
    assert AutoTokenizer.from_pretrained(out).chat_template is None


def test_config_of_the_export(source: Source, tmp_path: Path) -> None:
    raw = json.loads((exported(source("vlm", dtype="bfloat16"), tmp_path) / "config.json").read_text())
    wanted = {
        "architectures": ["Ministral3Model"],
        "model_type": "ministral3",
        "is_causal": False,
        "pooling": "avg",
        "normalize": True,
        "temperature": 0.02,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 64},
    }
    assert {key: raw.get(key) for key in wanted} == wanted
    assert raw["rope_parameters"]["apply_yarn_scaling"] is False
    assert "auto_map" not in raw
    sentences = json.loads((tmp_path / "hf" / "config_sentence_transformers.json").read_text())
    assert sentences == {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "query: ", "document": "passage: "},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def test_transformers_passes_over_vllms_keys(source: Source, tmp_path: Path) -> None:
    out = exported(source("model"), tmp_path)
    ids = torch.arange(3, 203)[None]  # beyond original_max_position_embeddings, so that the query scale acts
    with torch.no_grad():
        with_keys = AutoModel.from_pretrained(out).eval()(input_ids=ids).last_hidden_state

        def strip(raw: dict[str, Any]) -> None:
            raw.pop("llama_4_scaling")
            raw["rope_parameters"].pop("apply_yarn_scaling")

        edit_json(out / "config.json", strip)
        without = AutoModel.from_pretrained(out).eval()(input_ids=ids).last_hidden_state
    assert torch.equal(with_keys, without)


def test_class_paths_of_both_sentence_transformers(source: Source, tmp_path: Path) -> None:
    modules = json.loads((exported(source("model"), tmp_path) / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")
    ]


def test_model_card(source: Source, tmp_path: Path) -> None:
    import_hf(source("vlm"), tmp_path / "run" / "checkpoints", progress=False)
    path = without_checksums(tmp_path / "run" / "checkpoints" / "iter_0000000") / RUN_CONFIG
    values = yaml.safe_load(path.read_text())
    values["train"] = {"train_iters": 7, "global_batch_size": 4}
    values["data"]["train"] = [{"path": "/somewhere/private/pairs.jsonl"}]
    values["optimizer"] = {"lr": 5e-6}
    path.write_text(yaml.safe_dump(values))
    scores = {"quora": {"ndcg@10": 0.5, "recall@100": 0.75}}
    lines = [{"step": 0, "eval": scores}, {"step": 9, "eval": {"quora": {"ndcg@10": math.pi}}}]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "ev')
    export_hf(tmp_path / "run", tmp_path / "hf", progress=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    for part in ("Embedder from vlm", "pairs.jsonl", "5e-06", '"query: "', "| quora | 0.5000 | 0.7500 |", "at step 0"):
        assert part in card
    assert "/somewhere" not in card
    assert "3.14" not in card


def test_a_learned_temperature_is_exported(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_embed.conversion import importing
    from megatron_embed.conversion.mcore.tensors import Chunk

    learned = Chunk("log_temperature", (), (), (), torch.float32, 0, lambda: torch.tensor(math.log(0.05)))
    monkeypatch.setattr(importing, "kept_chunks", lambda *_: [learned])
    raw = json.loads((exported(source("model"), tmp_path) / "config.json").read_text())
    assert raw["temperature"] == pytest.approx(0.05)
