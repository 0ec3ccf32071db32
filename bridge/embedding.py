"""The embedding table."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_embed.bridge.transforms import padded_vocab_size


class TokenEmbedding(MegatronModule):
    """Map of token ids ``[b, s]`` to ``[s, b, hidden]``, with ``s`` divided by TP under sequence parallelism.

    It equals megatron-core's ``LanguageModelEmbedding`` without positions, token types and dropout.

    Args:
        table: megatron-core's class of the table, or one with another lookup.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        table: type[VocabParallelEmbedding] = VocabParallelEmbedding,
    ):
        super().__init__(config=config)
        self.word_embeddings = table(
            num_embeddings=padded_vocab_size(vocab_size, world=config.tensor_model_parallel_size),
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up the embeddings of the tokens."""
        found = self.word_embeddings(input_ids)
        # under sequence parallelism the table itself puts the sequence first, before it is divided
        return found if self.word_embeddings.reduce_scatter_embeddings else found.transpose(0, 1).contiguous()
