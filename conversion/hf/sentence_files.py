"""The files of a sentence-transformers model: reading those of a ready embedder, writing those of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from megatron_embed.bridge.config import EncoderConfig, Pooling
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.json_files import load_json, read_json, write_json
from megatron_embed.conversion.hf import sentence_keys

Similarity = Literal["cosine", "dot"]

QUERY_PROMPT, PASSAGE_PROMPT, MAX_LENGTH = "query: ", "passage: ", 512
_LONGEST = 1 << 24  # the largest length in tokens that tokenizers can count

#: our pooling → sentence-transformers' name; 6.x writes it as ``pooling_mode``, 5.x as a flag
MODES: dict[str, str] = {"avg": "mean", "cls": "cls", "last": "lasttoken", "weighted_avg": "weightedmean"}
_FLAGS: dict[str, str] = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
#: files in which sentence-transformers looks for the Transformer's settings; the first that has any counts
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """Settings around the encoder for making vectors from texts, and for comparing vectors.

    Attributes:
        query_prompt, passage_prompt: the prompts that sentence-transformers calls ``query`` and ``document``.
        query_max_length, passage_max_length: in tokens, BOS and EOS included.
        max_length: in tokens, for a text that is neither (sentence-transformers' plain ``encode``); None: the larger of
            the two.
        prompts: the other prompts by name.
        default_prompt_name: the prompt of a text that is neither; None: it has none.
        do_lower_case: whether prompt and text are lower-cased before they are tokenized.
        similarity: similarity of vectors; on normalised vectors both kinds give the same order.
    """

    pooling: Pooling = "avg"
    normalize: bool = True
    query_prompt: str = QUERY_PROMPT
    passage_prompt: str = PASSAGE_PROMPT
    query_max_length: int = MAX_LENGTH
    passage_max_length: int = MAX_LENGTH
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    default_prompt_name: str | None = None
    do_lower_case: bool = False
    similarity: Similarity = "cosine"

    @property
    def all_prompts(self) -> dict[str, str]:
        """Return all prompts by sentence-transformers' names."""
        return {"query": self.query_prompt, "document": self.passage_prompt, **self.prompts}

    @property
    def text_prompt(self) -> str:
        """Return the prompt of a text that is neither query nor passage."""
        return "" if self.default_prompt_name is None else self.all_prompts[self.default_prompt_name]

    @property
    def text_max_length(self) -> int:
        """Return the maximal length in tokens of a text that is neither query nor passage."""
        return self.max_length or max(self.query_max_length, self.passage_max_length)


def default_settings(config: EncoderConfig) -> SentenceSettings:
    """Return the settings for a model that states none."""
    length = min(MAX_LENGTH, config.max_position_embeddings)
    return SentenceSettings(
        pooling=config.pooling,
        normalize=config.normalize,
        query_max_length=length,
        passage_max_length=length,
        similarity=similarity_of(config.normalize),
    )


def trained(settings: SentenceSettings, *, normalize: bool) -> SentenceSettings:
    """Return a source's settings after training, whose recipe states lengths and which scores by scalar products."""
    return replace(settings, max_length=None, normalize=normalize, similarity=similarity_of(normalize))


def similarity_of(normalize: bool) -> Similarity:
    """Return the similarity that orders vectors as training's scalar products do: for normalised vectors the cosine."""
    return "cosine" if normalize else "dot"


#: settings with a recipe key, in its section ``data``
OF_THE_RECIPE = ("query_prompt", "passage_prompt", "query_max_length", "passage_max_length")
#: settings without a recipe key; a checkpoint's ``run_config.yaml`` keeps them in a section of its own
_BESIDE_THE_RECIPE = ("max_length", "prompts", "default_prompt_name", "do_lower_case", "similarity")


def beside_the_recipe(settings: SentenceSettings) -> dict[str, Any]:
    """Return the settings without a recipe key that differ from their defaults, as plain values.

    :func:`with_the_recipes` is the inverse.
    """
    usual = SentenceSettings(similarity=similarity_of(settings.normalize))
    values = {name: getattr(settings, name) for name in _BESIDE_THE_RECIPE}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def with_the_recipes(kept: Mapping[str, Any], usual: SentenceSettings, where: str) -> SentenceSettings:
    """Build settings from the result of :func:`beside_the_recipe` and the other known settings.

    Args:
        usual: the other known settings, with the defaults for those that ``kept`` may hold.
        where: the file that holds ``kept``, for messages.

    Raises:
        UserError: an unknown key or value.
    """
    for key in kept:
        if key not in _BESIDE_THE_RECIPE:
            raise UserError(f"{where}: sentence.{key}: no such setting; known: {', '.join(_BESIDE_THE_RECIPE)}")
    if kept.get("similarity", "cosine") not in ("cosine", "dot"):
        raise UserError(f"{where}: sentence.similarity is {kept['similarity']!r}; wanted cosine or dot")
    settings = replace(usual, **kept)
    if settings.default_prompt_name is not None and settings.default_prompt_name not in settings.all_prompts:
        found, known = settings.default_prompt_name, ", ".join(settings.all_prompts)
        raise UserError(f"{where}: sentence.default_prompt_name is {found!r}; wanted one of {known}")
    return settings


def read_sentence_settings(folder: Path) -> SentenceSettings | None:
    """Read the settings of a ready sentence-transformers model; return None where the folder is none.

    Texts are treated as in sentence-transformers' ``encode_query`` and ``encode_document``. As there, a passage gets
    the prompt ``document`` and no substitute for it.

    Raises:
        UserError: a module or setting would change the vectors and is not honoured; the message names file and key.
    """
    if not (folder / "modules.json").is_file():
        return None
    paths = _read_modules(folder)
    path = folder / "config_sentence_transformers.json"
    model = read_json(path, optional=True)
    sentence_keys.check_model(path, model)
    stated = (folder / name for name in TRANSFORMER_FILES if read_json(folder / name, optional=True))
    path = next(stated, folder / TRANSFORMER_FILES[0])
    transformer = read_json(path, optional=True)
    sentence_keys.check_transformer(path, transformer)
    path = folder / "tokenizer_config.json"
    sentence_keys.check_tokenizer(path, read_json(path, optional=True))
    length = _max_length(folder, transformer)
    query, passage = (transformer.get(key) or length for key in ("query_length", "document_length"))
    prompts = {name: prompt or "" for name, prompt in (model.get("prompts") or {}).items()}
    return SentenceSettings(
        pooling=_read_pooling(folder / paths["Pooling"] / "config.json"),
        normalize="Normalize" in paths,
        query_prompt=prompts.pop("query", ""),
        passage_prompt=prompts.pop("document", ""),
        query_max_length=query,
        passage_max_length=passage,
        max_length=None if length == max(query, passage) else length,
        prompts=prompts,
        default_prompt_name=model.get("default_prompt_name"),
        do_lower_case=transformer.get("do_lower_case", False),
        similarity=model.get("similarity_fn_name") or "cosine",
    )


def _read_modules(folder: Path) -> dict[str, str]:
    """Return kind of module → its subfolder: Transformer, Pooling and perhaps Normalize, in this order."""
    path = folder / "modules.json"
    modules = load_json(path)
    if not isinstance(modules, list) or not all(isinstance(each, Mapping) and "type" in each for each in modules):
        raise UserError(f"{path}: not a list of modules, each with its type and path; fetch the file again")
    types = [str(module["type"]) for module in modules]
    kinds = [name.rsplit(".", 1)[-1] if name.startswith("sentence_transformers.") else name for name in types]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        found = ", ".join(kinds) or "none"
        raise UserError(f"{path}: modules {found}; wanted Transformer, Pooling and perhaps Normalize, in this order")
    paths = {kind: str(module.get("path", "")) for kind, module in zip(kinds, modules, strict=True)}
    if paths["Transformer"]:
        raise UserError(
            f"{path}: the Transformer lies in {paths['Transformer']!r}; wanted it beside modules.json, path ''"
        )
    if "Normalize" in paths:
        normalize = folder / paths["Normalize"] / "config.json"
        if normalize.parent != folder:  # an old Normalize has no folder; config.json here is the model's own
            sentence_keys.check_normalize(normalize, read_json(normalize, optional=True))
    return paths


def _max_length(folder: Path, transformer: Mapping[str, Any]) -> int:
    """Return sentence-transformers' ``max_seq_length``: stated, or the tokenizer's within the model's positions."""
    stated = [(transformer.get(key) or {}).get("model_max_length") for key in ("processor_kwargs", "tokenizer_args")]
    stated.append(transformer.get("max_seq_length"))
    length = next((value for value in stated if value is not None), None)
    if length is None:
        config = read_json(folder / "config.json", optional=True)
        known = (
            config.get("max_position_embeddings"),
            (config.get("text_config") or {}).get("max_position_embeddings"),
            read_json(folder / "tokenizer_config.json", optional=True).get("model_max_length"),
        )
        length = min((int(value) for value in known if isinstance(value, int | float)), default=MAX_LENGTH)
    return min(int(length), _LONGEST)


def _read_pooling(path: Path) -> Pooling:
    if not path.is_file():
        raise UserError(f"{path}: no such file, though modules.json names its folder; fetch the model again")
    config = read_json(path)
    sentence_keys.check_pooling(path, config, _FLAGS.values())
    modes = config.get("pooling_mode") or [mode for mode, flag in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = {theirs: ours for ours, theirs in MODES.items()}
    if len(modes) != 1 or modes[0] not in ours:
        raise UserError(f"{path}: pooling {' + '.join(modes)}; wanted one of {', '.join(ours)}")
    return cast(Pooling, ours[modes[0]])


def write_sentence_files(out: Path, config: EncoderConfig, settings: SentenceSettings) -> None:
    """Write ``modules.json`` and the files that it names, in a form that sentence-transformers 5.3 and 6.2 load.

    If queries, passages and other texts have different lengths, ``query_length`` and ``document_length`` state them for
    sentence-transformers 6. Version 5.3 refuses the two keys: it has one length for all texts, which would be wrong.
    """
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if config.normalize:
        modules.append(("Normalize", "2_Normalize"))
    write_json(
        out / "modules.json",
        [
            # the old class paths: 5.x has no others, and 6.x still accepts them
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    mode = MODES[config.pooling]
    flags = {flag: name == mode for name, flag in _FLAGS.items()}
    (out / "1_Pooling").mkdir()
    write_json(
        out / "1_Pooling" / "config.json",
        {"word_embedding_dimension": config.hidden_size, **flags, "include_prompt": True},
    )
    lengths: dict[str, Any] = {"max_seq_length": settings.text_max_length}
    if not has_one_length(settings):
        lengths |= {"query_length": settings.query_max_length, "document_length": settings.passage_max_length}
    write_json(out / TRANSFORMER_FILES[0], lengths | {"do_lower_case": settings.do_lower_case})
    write_json(
        out / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": settings.all_prompts,
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": settings.similarity,
        },
    )


def note_on_lengths(settings: SentenceSettings) -> list[str]:
    """Return a note for those who export these settings with several lengths: one line or none."""
    if has_one_length(settings):
        return []
    note = (
        f"queries have {settings.query_max_length} tokens at most, passages {settings.passage_max_length}: "
        f"sentence-transformers 6 keeps to query_length and document_length in {TRANSFORMER_FILES[0]}; for version 5, "
        f"which refuses these keys, take them out: then max_seq_length, {settings.text_max_length}, is everyone's"
    )
    return [note]


def has_one_length(settings: SentenceSettings) -> bool:
    """Return whether queries, passages and other texts all have the same maximal length."""
    return settings.query_max_length == settings.passage_max_length == settings.text_max_length
