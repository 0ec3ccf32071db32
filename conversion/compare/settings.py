"""Comparison of the settings around the encoder: prompts, lengths, pooling, normalisation, similarity."""

from __future__ import annotations

from dataclasses import asdict

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.compare.differences import ComparedSection, Difference, compare_values, flatten
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.sentence_files import SentenceSettings, default_settings, read_sentence_settings


def compare_folder_settings(found: HFFolder, source: HFFolder, config: EncoderConfig) -> ComparedSection:
    """Compare an exported embedder's sentence-transformers files with those of its source.

    Args:
        config: the source's encoder.
    """
    try:
        settings = read_sentence_settings(found.path)
    except UserError as error:
        return ComparedSection("sentence settings", 1, [Difference("modules.json", str(error), "modules of an export")])
    if settings is None:
        missing = Difference("modules.json", "no such file", "an embedder's sentence-transformers files")
        return ComparedSection("sentence settings", 1, [missing])
    section = compare_settings(settings, source, config, where="sentence-transformers files")
    # config.json repeats these settings for users of the bare model
    stated = {name: found.config[name] for name in ("pooling", "normalize") if found.config.get(name) is not None}
    same = {name: getattr(settings, name) for name in stated}
    return section + compare_values(section.name, stated, same, where="config.json")


def compare_settings(
    found: SentenceSettings, source: HFFolder, config: EncoderConfig, *, where: str
) -> ComparedSection:
    """Compare settings with the source's own, or with those that an import gives to a source that states none.

    Args:
        found: the settings of the checkpoint or the export.
        config: the source's encoder.
    """
    stated = read_sentence_settings(source.path)
    left, right = (flatten(asdict(settings)) for settings in (found, stated or default_settings(config)))
    if stated is None and source.config.get("pooling") is None:
        for name in _OF_A_BASE_MODEL:  # a base model states none of these, so the output may have any value
            left.pop(name, None)
            right.pop(name, None)
    return compare_values("sentence settings", left, right, where=where)


#: settings for making and comparing vectors that a base model does not state
_OF_A_BASE_MODEL = ("pooling", "normalize", "similarity")
