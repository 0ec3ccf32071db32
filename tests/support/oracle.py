"""Independent answers: Hugging Face modules and hand-written mathematics in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

Ids = list[list[int]]


def hf_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32, exact_norms: bool = False) -> Any:
    """A random stock model of the config's family, bidirectional.

    Args:
        exact_norms: replace HF's RMSNorm, which computes in fp32 whatever its input, by torch's.
    """
    torch.manual_seed(seed)
    config.is_causal = False
    model = AutoModel.from_config(config)
    with torch.no_grad():  # norms of 1 would hide a norm that is not applied
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype).eval()
    if exact_norms:
        use_exact_norms(model)
    return model


def use_exact_norms(model: Any) -> None:
    """Replace HF's RMSNorm, which computes in fp32 whatever its input, by torch's."""
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if "RMSNorm" in type(child).__name__:
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(parent, name, norm)


def embed(model: Any, texts: Ids, *, pad_id: int = 11) -> Tensor:
    """Mean-pooled, normalised embeddings of right-padded texts, by the book."""
    longest = max(map(len, texts))
    ids = torch.tensor([t + [pad_id] * (longest - len(t)) for t in texts])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].to(states.dtype)
    pooled = (states * weights).sum(1) / weights.sum(1)
    return pooled / pooled.norm(dim=1, keepdim=True)


def info_nce(queries: Tensor, passages: Tensor, positives: Sequence[int], temperature: float) -> Tensor:
    """-1/n Σ log softmax, written out."""
    scores = queries @ passages.T / temperature
    rows = [scores[i, p] - torch.logsumexp(scores[i], 0) for i, p in enumerate(positives)]
    return -torch.stack(rows).mean()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())
