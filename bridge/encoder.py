"""The encoder as pipeline stages: the first has the embedding, each has layers, the last has norm and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_embed.bridge.attention import SequenceInfo
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.embedding import TokenEmbedding
from megatron_embed.bridge.families import FAMILIES
from megatron_embed.bridge.layer_spec import block_spec, choose_layers
from megatron_embed.bridge.layers import LayerKind
from megatron_embed.bridge.layout import Layout, check_layout, pipeline_split
from megatron_embed.bridge.mapping import parameters_with_weights
from megatron_embed.bridge.pooling import pool
from megatron_embed.bridge.rope import inverse_frequencies
from megatron_embed.bridge.sequences import TokenBatch
from megatron_embed.bridge.transforms import even_range


def transformer_config(
    config: EncoderConfig,
    layout: Layout,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool | None = None,
    recompute: str = "none",
    **overrides: Any,
) -> TransformerConfig:
    """Return megatron-core's config of this encoder under a layout.

    Args:
        dtype: dtype of parameters, activations and pipeline messages.
        sequence_parallel: None means: where TP > 1.
        recompute: ``none``, ``selective`` (core attention) or ``full`` (every layer).

    Raises:
        UserError: the layout cannot hold the model.
    """
    check_layout(config, layout)
    if layout.pp > 1:
        stages = layout.pp * (layout.vpp or 1)
        rows = [["decoder"] * count for count in pipeline_split(config.num_hidden_layers, stages)]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        overrides.setdefault("pipeline_model_parallel_layout", rows)
    if recompute == "selective":
        overrides.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    elif recompute == "full":
        overrides.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    overrides.setdefault("gradient_accumulation_fusion", False)
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=config.initializer_range,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.tp > 1 if sequence_parallel is None else sequence_parallel and layout.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Every parameter is loaded; a parameter that is not loaded is an error, not a random number.
        perform_initialization=False,
        masked_softmax_fusion=False,
        # On CPUs inductor would compile these, which needs a compiler; there the layers use the spec's SwiGLU.
        bias_activation_fusion=not host.cuda_is_hidden(),
        use_te_activation_func=host.cuda_is_hidden(),
        bias_dropout_fusion=not host.cuda_is_hidden(),
        persist_layer_norm=False,
        # Micro-batches differ in length; megatron-core ties this to an MoE setting.
        variable_seq_lengths=layout.pp > 1,
        moe_token_dispatcher_type="alltoall",
        # The default batched messages hang with interleaved stages.
        overlap_p2p_comm=bool(layout.vpp),
        batch_p2p_comm=not layout.vpp,
        batch_p2p_sync=False,  # waits for the GPU after each message, because of a fault of torch before 2.0
        # Plain stages wait for the end of a message before megatron-core frees the output that it carried. Interleaved
        # stages send while they compute: there megatron-core frees an output (`.data = empty(1)`) one step before it
        # waits for its message. gloo and NCCL keep the tensor, not its storage, and would send memory that has been
        # overwritten. So outputs stay until their backward, by which time the messages must have arrived. The cost is
        # `tokens × hidden_size` values per stage (but the last) and micro-batch in flight, as much as one layer keeps
        # under full recomputation; :meth:`Activations.chunk` counts it.
        deallocate_pipeline_outputs=layout.pp > 1 and not layout.vpp,
        **FAMILIES[config.family].layer_options,
        **overrides,
    )


class EncoderStage(MegatronModule):
    """One pipeline stage of the bidirectional encoder.

    Args:
        config: the model.
        transformer: from :func:`transformer_config`.
        pre_process, post_process: whether this stage holds the embedding, or the final norm and the pooling.
        vp_stage: index of this stage among the rank's interleaved stages.
        layers: kind of layers; None: see :func:`megatron_embed.bridge.layer_spec.choose_layers`.
        learn_temperature: whether the last stage also holds ``log_temperature [1]``, which starts at the config's
            temperature.
    """

    def __init__(
        self,
        config: EncoderConfig,
        transformer: TransformerConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        layers: LayerKind | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(config=transformer)
        self.encoder_config = config
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # megatron-core's schedules and gradient finalisation read these
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        classes = choose_layers(layers)
        if pre_process:
            self.embedding = TokenEmbedding(transformer, config.vocab_size, classes.table)
        self.decoder = TransformerBlock(
            config=transformer,
            spec=block_spec(get_num_layers_to_build(transformer, vp_stage), classes, qk_norm=transformer.qk_layernorm),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.layer_offset: int = get_transformer_layer_offset(transformer, vp_stage)
        self.log_temperature: torch.nn.Parameter | None = None
        if learn_temperature and post_process:
            assert config.temperature is not None
            # 16 bits would round the temperature to a percent or two
            wide = torch.promote_types(transformer.params_dtype, torch.float32)
            start = torch.tensor([config.temperature], dtype=wide, device=host.device()).log()
            self.log_temperature = torch.nn.Parameter(start)
        frequencies, self.rope_factor = inverse_frequencies(config)
        # This is no buffer: checkpoints must not hold it, and it must stay fp32 whatever the model is cast to.
        self._frequencies = frequencies.to(host.device())

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output; megatron-core's schedules call this."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Encode a micro-batch.

        Returns:
            On the last stage ``[n, hidden]``, one vector per sequence, in fp32 or wider, of length 1 where the config
            sets ``normalize``. On the others ``[s, b, hidden]`` (``s`` divided by TP under sequence parallelism).
        """
        dtype = self.config.params_dtype
        context = parallel_state.get_context_parallel_group()
        # this context-parallel rank's part of every row
        columns = even_range(batch.input_ids.shape[1], rank=context.rank(), world=context.size())
        info = SequenceInfo.of(batch, self.encoder_config, self._frequencies, self.rope_factor, dtype, columns)
        states = self.embedding(batch.input_ids[:, columns]) if self.pre_process else None
        states = self.decoder(hidden_states=states, attention_mask=None, packed_seq_params=info)
        if not self.post_process:
            return states
        if self.config.sequence_parallel:
            # Every TP rank continues with the whole sequence and the same loss, so backward keeps each rank's slice.
            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        pooled = pool(states, batch, self.encoder_config.pooling, columns)
        if context.size() > 1:
            # Each rank pools its slice and the ranks sum. A rank's gradient is for its own tokens, so backward is the
            # identity.
            pooled = tensor_parallel.reduce_from_tensor_model_parallel_region(pooled, group=context)
        return F.normalize(pooled, dim=-1) if self.encoder_config.normalize else pooled


def build_stages(
    config: EncoderConfig,
    transformer: TransformerConfig,
    *,
    layers: LayerKind | None = None,
    learn_temperature: bool = False,
) -> list[EncoderStage]:
    """Build this rank's pipeline stages (one, unless interleaved); parameters are allocated but not filled."""
    vpp = transformer.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = stage if vpp else None
        chunks.append(
            EncoderStage(
                config,
                transformer,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vpp is None, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vpp is None, vp_stage=vp_stage),
                vp_stage=vp_stage,
                layers=layers,
                learn_temperature=learn_temperature,
            )
        )
    for chunk in chunks:
        _mark_tensor_parallel(chunk, config)
    return chunks


def _mark_tensor_parallel(encoder: EncoderStage, config: EncoderConfig) -> None:
    """Give each parameter the attributes by which megatron-core counts it once in the gradient norm.

    megatron-core's layers set them in their random initialisation, which is off here. Without them every sliced weight
    counts as a replica, and under TP the norm (and so the clipping) is too small.
    """
    for name, parameter, weight in parameters_with_weights(encoder, config, layer_offset=encoder.layer_offset):
        if weight.tp_dim is None:
            continue
        if getattr(parameter, "tensor_model_parallel", False):
            assert parameter.partition_dim == weight.tp_dim, f"{name}: the table and the layer disagree"
        else:
            stride = 2 if weight.kind == "gate_up" else 1
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=weight.tp_dim, stride=stride)
