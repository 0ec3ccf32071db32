"""The model, and how its weights correspond to Hugging Face's. Knows nothing of training."""

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError

__all__ = ["EncoderConfig", "UserError"]
