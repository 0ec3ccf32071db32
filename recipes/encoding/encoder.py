"""Encode texts as vectors with any checkpoint, under any layout."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_embed.bridge import parallel
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.cpu.packed_weights import pack_weights
from megatron_embed.bridge.encoder import build_stages, transformer_config
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.conversion.files.casts import dtype_name
from megatron_embed.conversion.hf.sentence_files import SentenceSettings
from megatron_embed.recipes.datasets.tokenization import Kind, TextTokenizer
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan, MicroBatch
from megatron_embed.recipes.encoding.schedule import encode_micro_batches, share_last_stage
from megatron_embed.recipes.encoding.source import ModelSource


class Encoder:
    """A model ready to encode. Use it as a context manager, or call :meth:`close`, to leave its process groups.

    Example:
        >>> encoder = Encoder.from_pretrained("runs/demo/checkpoints")
        >>> vectors = encoder.encode(["where is it?"], kind="query")
    """

    def __init__(
        self,
        stages: Sequence[torch.nn.Module],
        config: EncoderConfig,
        tokenizer: TextTokenizer,
        plan: BatchingPlan,
        *,
        resources: ExitStack | None = None,
        source: ModelSource | None = None,
    ):
        self.source = source
        self.stages, self.config, self.tokenizer, self.plan = list(stages), config, tokenizer, plan
        self._resources = resources or ExitStack()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        layout: Layout | None = None,
        max_tokens: int | None = None,
        bidirectional: bool = False,
        scores: bool = False,
    ) -> Encoder:
        """Load a Hugging Face folder, an exported embedder, or a Megatron checkpoint.

        Args:
            device: ``auto``, ``cpu`` or ``cuda``.
            dtype: dtype of the computation; None: that of the model's config, which must hold the weights exactly.
            layout: parallel layout; None: each process holds the whole model, and torchrun's processes share the texts.
            max_tokens: token budget of a micro-batch; None: :func:`token_budget`. A longer text gets its own
                micro-batch.
            bidirectional: accept a ready embedder with causal attention as a base model; the vectors then differ from
                the embedder's own.
            scores: return vectors whose scalar product is the model's similarity. If that is the cosine, normalise them
                even if the model does not.

        Raises:
            UserError: the model does not exist, cannot be loaded, or is an embedder with causal attention.
        """
        parallel.select_device(device)
        source = ModelSource.open(path, bidirectional=bidirectional)
        source = source.for_scores() if scores else source
        layout = layout or Layout()
        with ExitStack() as resources:
            if not parallel_state.model_parallel_is_initialized():
                resources.enter_context(parallel.parallel_world(layout))
            wanted = dtype or getattr(torch, source.config.dtype)
            stages = build_stages(source.config, transformer_config(source.config, layout, dtype=wanted))
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            notes = source.fill(stages, tp_rank=tp_rank, tp_size=layout.tp, rounding=dtype is not None)
            for note in notes:
                logging.getLogger(__name__).info("%s: %s", path, note)
            pack_weights(stages)
            settings = source.settings or SentenceSettings(query_prompt="", passage_prompt="")
            tokenizer = TextTokenizer.from_settings(source.files, settings)
            plan = BatchingPlan(
                pad_id=tokenizer.pad_token_id,
                packed=True,
                max_tokens=max_tokens or token_budget(wanted),
                multiple_of=layout.tp * layout.cp,
                longer_alone=True,
            )
            return cls(stages, source.config, tokenizer, plan, resources=resources.pop_all(), source=source)

    def encode(
        self,
        texts: str | Sequence[str],
        kind: Kind = "query",
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Encode texts. Every rank must call this, and every rank gets all vectors.

        Args:
            kind: selects prompt and maximal length: ``query``, ``passage``, or ``text`` for any other text. The kinds
                correspond to sentence-transformers' ``encode_query``, ``encode_document`` and plain ``encode``.
            prompt: replaces the kind's own prompt.
            prompt_name: name of one of the model's prompts that replaces the kind's own.

        Returns:
            ``[len(texts), hidden]`` fp32, in the order of the texts; ``[hidden]`` for a single text.

        Raises:
            UserError: the model has no prompt of this name.
        """
        if prompt_name is not None:
            prompt = self.named_prompt(prompt_name) if prompt is None else prompt
        if isinstance(texts, str):
            return self.encode([texts], kind, prompt=prompt, show_progress=show_progress)[0]
        prompts = None if prompt is None else [prompt] * len(texts)
        sequences = self.tokenizer.tokenize(list(texts), kind, prompts)
        return encode_sequences(self.stages, self.plan, sequences, self.config.hidden_size, progress=show_progress)

    def named_prompt(self, name: str) -> str:
        """Return the model's prompt of this name.

        Raises:
            UserError: the model has no prompt of this name.
        """
        stated = None if self.source is None else self.source.settings
        prompts = {} if stated is None else stated.all_prompts
        if name not in prompts:
            raise UserError(f"prompt {name!r}: the model has none of this name; known: {', '.join(prompts) or 'none'}")
        return prompts[name]

    def close(self) -> None:
        """Leave the process groups that :meth:`from_pretrained` entered."""
        self._resources.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._resources.__exit__(kind, value, trace)


def token_budget(dtype: torch.dtype) -> int:
    """Return the tokens of a micro-batch for encoding: 16384 on CUDA, 16384 / bytes of a value for a CPU's caches."""
    return 16384 if host.device().type == "cuda" else 16384 // dtype.itemsize


def encode_sequences(
    stages: Sequence[torch.nn.Module],
    plan: BatchingPlan,
    sequences: Sequence[Sequence[int]],
    hidden_size: int,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Encode token ids; return ``[n, hidden]`` fp32 on every rank. Data-parallel ranks share all lengths evenly."""
    if not sequences:
        return np.zeros((0, hidden_size), dtype=np.float32)
    rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    vectors = torch.zeros(len(sequences), hidden_size, device=host.device())
    mine = by_length[rank::world]
    found = encode_here(stages, plan, [sequences[i] for i in mine], hidden_size, progress=progress)
    if found is not None:
        vectors[mine] = found
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True) and world > 1:
        dist.all_reduce(vectors, group=parallel_state.get_data_parallel_group())
    return share_last_stage(vectors).cpu().numpy()


def encode_here(
    stages: Sequence[torch.nn.Module],
    plan: BatchingPlan,
    sequences: Sequence[Sequence[int]],
    hidden_size: int,
    *,
    progress: bool = False,
) -> torch.Tensor | None:
    """Encode token ids; return ``[n, hidden]`` fp32 on the last stage of this model replica and None on the others.

    The ranks of a replica must call this together. Other replicas take no part.

    Raises:
        UserError: a vector is not finite; a search would rank it silently.
    """
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    vectors = torch.zeros(len(sequences), hidden_size, device=host.device()) if last else None
    modes = [stage.training for stage in stages]
    for stage in stages:
        stage.eval()
    for window in _windows(plan.split(sequences), progress=progress):
        found = encode_micro_batches(stages, window)
        if found is not None and vectors is not None:
            for micro_batch, rows in zip(window, found, strict=True):
                vectors[micro_batch.texts.to(vectors.device)] = rows.float()
    for stage, mode in zip(stages, modes, strict=True):
        stage.train(mode)
    if vectors is not None and (bad := int((~vectors.isfinite()).any(1).sum())):
        dtype = dtype_name(stages[-1].config.params_dtype)
        raise UserError(
            f"{bad} of {len(vectors)} vectors hold numbers that are not finite, computed in {dtype}: "
            f"take a dtype of a wider range (bf16, fp32), or look whether the weights are finite"
        )
    return vectors


def _windows(batches: list[MicroBatch], *, progress: bool) -> list[list[MicroBatch]]:
    """Cut micro-batches into windows that each fill a pipeline; with ``progress``, rank 0 shows a bar over them."""
    size = 4 * parallel_state.get_pipeline_model_parallel_world_size()
    windows = [batches[i : i + size] for i in range(0, len(batches), size)]
    if progress and dist.get_rank() == 0:
        from tqdm import tqdm

        return tqdm(windows, desc="encoding", unit="window", file=sys.stderr)  # type: ignore[return-value]
    return windows
