"""Division of a model over processes: only arithmetic, so that a recipe can be checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UsageError, UserError


@dataclass(frozen=True)
class Layout:
    """Division of the world by model parallelism; the remaining factor is data parallelism."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of data-parallel ranks; raise UsageError where tp × pp × cp does not divide the world."""
        if world_size % self.model_parallel_size:
            raise UsageError(
                f"world size: found {world_size}; wanted a multiple of {self.model_parallel_size} = "
                f"model.tensor_model_parallel_size {self.tp} × model.pipeline_model_parallel_size {self.pp} × "
                f"model.context_parallel_size {self.cp}: change one of these, or start so many processes with "
                f"torchrun --nproc-per-node"
            )
        return world_size // self.model_parallel_size

    def __str__(self) -> str:
        virtual = f" × VPP {self.vpp}" if self.vpp else ""
        return f"TP {self.tp} × PP {self.pp}{virtual} × CP {self.cp}"


def pipeline_split(num_layers: int, stages: int) -> list[int]:
    """Return the number of layers on each (virtual) pipeline stage, as even as possible.

    Where the stages do not divide the layers, stages in the middle take one more, because the first stage also holds
    the embedding and the last the final norm and the pooling. 26 layers at 4 stages → ``[6, 7, 7, 6]``.
    """
    base, extra = divmod(num_layers, stages)
    # middle stages first, the ends last
    middle_first = [*range(1, stages - 1), stages - 1, 0]
    heavier = set(middle_first[:extra])
    return [base + (stage in heavier) for stage in range(stages)]


def check_layout(config: EncoderConfig, layout: Layout) -> None:
    """Refuse a layout that cannot hold the model, before anything is loaded."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    divided = {name: getattr(config, name) for name in names}
    for name, value in divided.items():
        if value % layout.tp:
            common = math.gcd(*divided.values())
            fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
            raise UserError(
                f"model.tensor_model_parallel_size: {layout.tp} does not divide {name} {value}; wanted one of "
                f"{fitting}, which divide {', '.join(f'{name} {value}' for name, value in divided.items())}"
            )
    stages = layout.pp * (layout.vpp or 1)
    if stages > config.num_hidden_layers:
        raise UserError(
            f"model.pipeline_model_parallel_size: {layout.pp}{f' × {layout.vpp} virtual stages' if layout.vpp else ''} "
            f"is more than the model's {config.num_hidden_layers} layers; every stage needs one"
        )
