"""Shared parts of the benchmarks: a model with random weights, the description of the machine, and result files."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "megatron-core", "transformers", "sentence-transformers", "numpy")

#: about 10 M parameters outside the embedding table, with Ministral 3's vocabulary and rope
SMALL: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 262144,
}


def make_embedder(
    folder: Path,
    tokenizer: Path,
    *,
    seed: int = 0,
    embedding_std: float = 0.2,
    max_length: int = 512,
    **overrides: Any,
) -> Path:
    """Make a random bidirectional embedder with a real tokenizer, as a sentence-transformers folder.

    Args:
        embedding_std: standard deviation of the embedding table. With transformers' own 0.02, all texts have nearly the
            same vector.
    """
    from transformers import Ministral3Config, Ministral3Model

    from megatron_embed.bridge import EncoderConfig
    from megatron_embed.conversion.hf.sentence_files import SentenceSettings, write_sentence_files
    from megatron_embed.conversion.hf.tokenizer_files import write_tokenizer

    torch.manual_seed(seed)
    config = Ministral3Config(**{**SMALL, **overrides})
    config.is_causal = False
    model = Ministral3Model(config)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(embedding_std / config.initializer_range)
    model.save_pretrained(folder)
    write_tokenizer(tokenizer, folder, max_length=max_length)
    settings = SentenceSettings(query_max_length=max_length, passage_max_length=max_length)
    write_sentence_files(folder, EncoderConfig.from_hf(folder), settings)
    return folder


def matmul_flops(dtype: torch.dtype, *, size: int = 1536, seconds: float = 2.0) -> float:
    """Measure the floating-point operations a second of a matrix product on this machine."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    rates = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def resident(field: str) -> int:
    """Return bytes of resident memory of this process by ``/proc``: ``VmRSS`` is current, ``VmHWM`` is the peak.

    ``ru_maxrss`` is unsuitable, because a process inherits it from its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def machine() -> str:
    """Describe the processor, cores, threads and memory."""
    import psutil

    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = psutil.virtual_memory().total / 2**30
    return f"{name}, {psutil.cpu_count()} cores, {torch.get_num_threads()} torch threads, {memory:.0f} GiB"


def write_result(name: str, title: str, body: str, settings: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/YYYY-MM-DD-<name>.md`` with versions, machine and the full configuration."""
    path = Path(__file__).parent / "results" / f"{date.today():%Y-%m-%d}-{name}.md"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        f"# {title}",
        "",
        f"{date.today():%Y-%m-%d}. {machine()}. Python {platform.python_version()}, {versions}.",
        "",
    ]
    lines += [body.rstrip(), "", "## Configuration", ""]
    lines += [f"* `{key}`: {value}" for key, value in settings.items()]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{path.read_text(encoding='utf-8')}\nwritten to {path}")
    return path
