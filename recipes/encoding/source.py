"""The source of a model: a Hugging Face folder or a Megatron checkpoint, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, named
from megatron_embed.bridge.ranks import gathered, on_every_rank
from megatron_embed.conversion.files.casts import Casts, Rounded, dtype_name, merged, told
from megatron_embed.conversion.hf.declared_attention import CONSENT, CONSENT_OF_A_RECIPE, made_bidirectional
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.sentence_files import SentenceSettings, read_sentence_settings
from megatron_embed.conversion.hf.tokenizer_files import has_tokenizer
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.recipes.config.checks import start_of
from megatron_embed.recipes.config.schema import DataSection, RecipeConfig
from megatron_embed.recipes.datasets.tokenization import TextTokenizer

if TYPE_CHECKING:
    from megatron_embed.bridge.encoder import EncoderStage


def dtype_option(dtype: torch.dtype) -> str:
    """Return the text by which a caller or the model's own config sets a dtype."""
    return f'dtype={dtype}, or "dtype": "{dtype_name(dtype)}" in its config.json,'


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights can fill encoders.

    Attributes:
        path: the path as the user gave it.
        config: the encoder's config.
        files: folder with the model's ``config.json`` and tokenizer.
        settings: the prompts, lengths, pooling and other settings that the model states, or None if it states none.
        made_bidirectional: True if the model is an embedder with causal attention, used as a base model.
    """

    path: str
    config: EncoderConfig
    files: Path
    settings: SentenceSettings | None
    hf: HFFolder | None = None
    iter_dir: Path | None = None
    made_bidirectional: bool = False

    @classmethod
    def open(
        cls, path: str | Path, *, megatron: bool = False, bidirectional: bool = False, consent: str = CONSENT
    ) -> ModelSource:
        """Recognise the form of a model and open it, without reading a weight.

        Args:
            megatron: accept only a Megatron checkpoint.
            bidirectional: accept a ready embedder with causal attention as a base model.
            consent: the option by which the user can allow this, for the message.

        Raises:
            UserError: the model has neither form, is damaged, or is an embedder with causal attention and
                ``bidirectional`` is False.
        """
        if megatron or checkpoint_folder.has_checkpoint(path) or _looks_like_megatron(Path(path)):
            iter_dir = checkpoint_folder.resolve(path)
            config = statements.encoder_config(iter_dir)
            if config is None:
                raise UserError(
                    f"{iter_dir}: does not state its model (no run_config.yaml with 'encoder:', no hf/config.json); "
                    f"wanted a checkpoint written by `convert_checkpoints.py import` or by training"
                )
            made = statements.was_made_bidirectional(iter_dir, bidirectional=bidirectional, consent=consent)
            settings = statements.sentence_settings(iter_dir, config)
            files = iter_dir / checkpoint_folder.SIDECARS
            return cls(str(path), config, files, settings, iter_dir=iter_dir, made_bidirectional=made)
        hf = HFFolder(path)
        made = made_bidirectional(hf.path, hf.config, bidirectional=bidirectional, consent=consent)
        stated = read_sentence_settings(hf.path)
        return cls(str(path), hf.encoder_config(), hf.path, stated, hf=hf, made_bidirectional=made)

    def tokenizer(self, data: DataSection) -> TextTokenizer:
        """Return the model's tokenizer with the prompts and maximal lengths of training."""
        return TextTokenizer.from_folder(
            self.files,
            query_prompt=data.query_prompt,
            passage_prompt=data.passage_prompt,
            query_max_length=data.query_max_length,
            passage_max_length=data.passage_max_length,
            do_lower_case=self.settings is not None and self.settings.do_lower_case,
        )

    def for_scores(self) -> ModelSource:
        """Return this model with vectors whose scalar product is its similarity (normalised if that is the cosine)."""
        if self.settings is None or self.settings.similarity == "dot":
            return self
        return replace(self, config=self.config.replace(normalize=True))

    def fill(
        self,
        encoders: list[EncoderStage],
        *,
        tp_rank: int,
        tp_size: int,
        rounding: bool = True,
        ask: Callable[[torch.dtype], str] = dtype_option,
    ) -> list[str]:
        """Load this rank's slices of the weights. All ranks must call this together.

        Args:
            rounding: True if the user chose the encoders' dtype, so that a Hugging Face folder's values may be rounded.
            ask: dtype → the option that sets it, for messages.

        Returns:
            One line that says how many values were rounded, the same on every rank. No line if none was rounded, or if
            the source is a checkpoint, which megatron-core casts while loading.

        Raises:
            UserError: a weight does not fit, or has a value that the encoders' dtype cannot hold; raised on every rank.
        """
        from megatron.core import parallel_state

        from megatron_embed.conversion.mcore.direct import load_hf_weights, refuse_overflow
        from megatron_embed.conversion.mcore.model_state import load_model_state

        stages = [(encoder, encoder.layer_offset) for encoder in encoders]
        casts = Casts(self.path, rounding=rounding or self.hf is None, ask=ask)

        def load() -> Rounded:
            if self.iter_dir is not None:
                load_model_state(self.iter_dir, encoders)
                refuse_overflow(stages, self.iter_dir, self.config, casts)
            elif self.hf is not None:
                load_hf_weights(stages, self.hf, self.config, tp_rank=tp_rank, tp_size=tp_size, casts=casts)
            # Replicas hold the same weights, so only one of them counts roundings.
            return casts.rounded if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0 else {}

        return told(merged(gathered(on_every_rank(load))))

    def check(self) -> None:
        """Check every weight's name and shape and the completeness of the files, without reading a value.

        Raises:
            UserError: the message lists missing, misshapen and superfluous weights.
        """
        if self.hf is not None:
            self.hf.check(self.config)
            return
        from megatron_embed.conversion.mcore.tensors import CheckpointReader
        from megatron_embed.conversion.mcore.weights import CheckpointWeights

        assert self.iter_dir is not None
        CheckpointWeights(CheckpointReader(self.iter_dir), self.config)


def open_model(cfg: RecipeConfig) -> ModelSource:
    """Open the model to start from, with the recipe's pooling, normalisation and temperature.

    Raises:
        UserError: the model is missing, damaged or without a tokenizer; the message names the key.
    """
    key, path = start_of(cfg)
    stated = {"pooling": cfg.model.pooling, "normalize": cfg.model.normalize, "temperature": cfg.loss.temperature}
    with named(key):
        source = ModelSource.open(
            path,
            megatron=key != "model.hf_model",
            bidirectional=cfg.model.bidirectional,
            consent=CONSENT_OF_A_RECIPE,
        )
        if not has_tokenizer(source.files):
            raise UserError(
                f"{source.files}: no tokenizer.json, without which no text can be read; put the model's own there: "
                f"transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(source.files)!r})"
            )
    return replace(source, config=source.config.replace(**stated))


def _looks_like_megatron(path: Path) -> bool:
    """Return whether a folder was meant as a checkpoint, so that the error message is about checkpoints."""
    return path.is_dir() and not (path / "config.json").is_file() and any(path.glob("iter_*"))
