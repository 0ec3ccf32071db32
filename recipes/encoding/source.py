"""Where a model comes from: a Hugging Face folder or a Megatron checkpoint, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, named
from megatron_embed.conversion.hf.declared_attention import CONSENT, CONSENT_OF_A_RECIPE, made_bidirectional
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.sentence_files import SentenceSettings, read_sentence_settings
from megatron_embed.conversion.hf.tokenizer_files import has_tokenizer
from megatron_embed.conversion.io.casts import Casts, Rounded, dtype_name, merged, told
from megatron_embed.conversion.megatron import folder as checkpoint_folder
from megatron_embed.recipes.config.checks import start_of
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.encoding.rank_zero import on_every_rank

if TYPE_CHECKING:
    from megatron_embed.bridge.encoder import Encoder


def dtype_option(dtype: torch.dtype) -> str:
    """How a caller, or the model's own config, asks for a dtype."""
    return f'dtype={dtype}, or "dtype": "{dtype_name(dtype)}" in its config.json,'


@dataclass(frozen=True)
class ModelSource:
    """A model that encoders can be filled from.

    Attributes:
        path: as the user named it.
        config: the encoder.
        files: folder with the model's ``config.json`` and tokenizer.
        settings: prompts, lengths, pooling and all else that the model states, or None where it states nothing.
        made_bidirectional: it comes from an embedder of causal attention, taken as a base model.
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
        """Recognise and open; no weight is read yet.

        Args:
            megatron: take nothing but a Megatron checkpoint.
            bidirectional: take a ready embedder of causal attention, as a base model.
            consent: how the user can say so.

        Raises:
            UserError: neither form, damaged, or an embedder of causal attention without ``bidirectional``.
        """
        if megatron or checkpoint_folder.has_checkpoint(path) or _looks_like_megatron(Path(path)):
            iter_dir = checkpoint_folder.resolve(path)
            config = checkpoint_folder.encoder_config(iter_dir)
            if config is None:
                raise UserError(
                    f"{iter_dir}: says nothing of its model (no run_config.yaml with 'encoder:', no hf/config.json); "
                    f"wanted a checkpoint written by `convert_checkpoints.py import` or by training"
                )
            made = checkpoint_folder.was_made_bidirectional(iter_dir, bidirectional=bidirectional, consent=consent)
            settings = checkpoint_folder.sentence_settings(iter_dir, config)
            files = iter_dir / checkpoint_folder.SIDECARS
            return cls(str(path), config, files, settings, iter_dir=iter_dir, made_bidirectional=made)
        hf = HFFolder(path)
        made = made_bidirectional(hf.path, hf.config, bidirectional=bidirectional, consent=consent)
        stated = read_sentence_settings(hf.path)
        config = hf.encoder_config()
        if stated is not None:
            config = config.replace(pooling=stated.pooling, normalize=stated.normalize)
        return cls(str(path), config, hf.path, stated, hf=hf, made_bidirectional=made)

    def for_scores(self) -> ModelSource:
        """The same model with vectors whose scalar product is its similarity: normalised where that is the cosine."""
        if self.settings is None or self.settings.similarity == "dot":
            return self
        return replace(self, config=self.config.replace(normalize=True))

    def fill(
        self,
        encoders: list[Encoder],
        *,
        tp_rank: int,
        tp_size: int,
        rounding: bool = True,
        ask: Callable[[torch.dtype], str] = dtype_option,
    ) -> list[str]:
        """Load this rank's weights, reading only its own slices of them; all ranks call this together.

        Args:
            rounding: whether the encoders' dtype was asked for, so that a Hugging Face folder's values may be rounded.
            ask: how the user asks for a dtype, for messages.

        Returns:
            One line that says how many values were rounded, the same on every rank; none where none was, or where the
            source is a checkpoint: megatron-core casts that as it loads.

        Raises:
            UserError: on every rank: a weight does not fit, or has a value that the encoders' dtype cannot hold.
        """
        from megatron.core import parallel_state

        from megatron_embed.conversion.megatron.direct import load_hf_weights, refuse_overflow
        from megatron_embed.conversion.megatron.model_state import load_model_state

        stages = [(encoder, encoder.layer_offset) for encoder in encoders]
        casts = Casts(self.path, rounding=rounding or self.hf is None, ask=ask)

        def load() -> Rounded:
            if self.iter_dir is not None:
                load_model_state(self.iter_dir, encoders)
                refuse_overflow(stages, self.iter_dir, self.config, casts)
            elif self.hf is not None:
                load_hf_weights(stages, self.hf, self.config, tp_rank=tp_rank, tp_size=tp_size, casts=casts)
            # replicas hold the same weights: one of them counts
            return casts.rounded if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0 else {}

        return told(merged(on_every_rank(load)))

    def check(self) -> None:
        """Look at every weight's name and shape, and whether the files are whole; no value is read.

        Raises:
            UserError: listing what is missing, misshapen or too much.
        """
        if self.hf is not None:
            self.hf.check(self.config)
            return
        from megatron_embed.conversion.megatron.tensors import CheckpointReader
        from megatron_embed.conversion.megatron.weights import CheckpointWeights

        assert self.iter_dir is not None
        reader = CheckpointReader(self.iter_dir)
        CheckpointWeights(reader, self.config)
        reader.check_files()


def open_model(cfg: RecipeConfig) -> ModelSource:
    """The model to start from, with the recipe's pooling, normalisation and temperature.

    Raises:
        UserError: there is none, it is damaged, or it has no tokenizer; by its key.
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
    """A folder that was meant as a checkpoint gets the checkpoint's message, not the Hugging Face one."""
    return path.is_dir() and not (path / "config.json").is_file() and any(path.glob("iter_*"))
