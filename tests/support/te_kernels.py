"""Transformer Engine's own Python on a CPU: the few compiled kernels that its layers call are written in torch.

What these tests show of Transformer Engine: constructors, masks, packed lengths, weight layout, sequence parallelism,
communication, fused weight gradients, the optimizer's checkpoints. What they cannot show: its kernels' own rounding,
FlashAttention's and cuDNN's attention, FP8, NCCL, speed.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

Tensors = list[list[Tensor]]

ENUMS = {
    "DType": "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat8E8M0 kFloat4E2M1",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_Fused_Attn_Backend": "NVTE_F16_max512_seqlen NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend",
    "CommOverlapType": "RS AG",
}
#: packages that Transformer Engine imports for what no test reaches: kernels in Triton, ONNX, inference
UNUSED = ("einops", "triton", "triton.language", "triton.language.standard", "onnxscript", "onnx", "onnx_ir")
CLASSES = ("FP8TensorMeta", "CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "CommOverlapCore")
#: Transformer Engine's way to say: attention in plain torch, no compilation, no compiled library to look for
ENVIRONMENT = {
    "NVTE_PROJECT_BUILDING": "1",
    "NVTE_FLASH_ATTN": "0",
    "NVTE_FUSED_ATTN": "0",
    "NVTE_UNFUSED_ATTN": "1",
    "NVTE_MASKED_SOFTMAX_FUSION": "0",
    "NVTE_TORCH_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
}


class Missing:
    """A compiled function that nothing stands in for."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self.name} has no stand-in")


class Kernels(types.ModuleType):
    """The compiled module."""

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(name)


def generic_gemm(
    a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None, *rest: Any, **_: Any
) -> tuple[Tensor, None, None, None]:
    """cuBLAS sees columns, so with rows the result is ``op(b) op(a)``; ``out`` gets it, or has it added."""
    out_dtype, accumulate = rest[1], rest[9]
    a2, b2 = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    result = (b2.t() if transb else b2).float() @ (a2.t() if transa else a2).float()
    if not transb and b.dim() > 2:
        result = result.reshape(*b.shape[:-1], -1)
    if out is None:
        assert not accumulate
        return result.to(b.dtype if out_dtype is None else TORCH_DTYPES[out_dtype]), None, None, None
    result = result.view_as(out).to(out.dtype)
    return (out.add_(result) if accumulate else out.copy_(result)), None, None, None


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any, margin: int, zero: bool
) -> tuple[Tensor, None, Tensor]:
    assert quantizer is None
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    return (x.float() * rsigma[..., None] * (weight.float() + zero)).to(x.dtype), None, rsigma


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    dz, normed = dz.reshape(x.shape).float(), x.float() * rsigma[..., None]
    dweight = (dz * normed).reshape(-1, x.shape[-1]).sum(0)
    dz = dz * (weight.float() + zero)
    dx = rsigma[..., None] * (dz - normed * (dz * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight.to(weight.dtype)


def convert_thd_to_bshd(thd: Tensor, ends: Tensor, batch: int, length: int) -> Tensor:
    out = thd.new_zeros(batch, length, *thd.shape[1:])
    for i in range(batch):
        out[i, : ends[i + 1] - ends[i]] = thd[ends[i] : ends[i + 1]]
    return out


def convert_bshd_to_thd(bshd: Tensor, ends: Tensor, tokens: int) -> Tensor:
    return torch.cat([bshd[i, : ends[i + 1] - ends[i]] for i in range(len(ends) - 1)])


def multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    lists: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Kingma and Ba 2014, with Loshchilov and Hutter's (2017) weight decay."""
    assert decoupled
    right1, right2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        gradient = gradient.float()
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / right1) / ((square / right2).sqrt() + eps) + weight_decay * parameter.float()
        parameter.sub_((lr * update).to(parameter.dtype))


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Tensors, factor: float) -> None:
    for source, into in zip(*lists, strict=True):
        into.copy_(source * factor)


def multi_tensor_l2norm(chunk: int, overflow: Tensor, lists: Tensors, each: bool = False) -> tuple[Tensor, Tensor]:
    assert not each
    norms = [tensor.float().norm() for tensor in lists[0]]
    return torch.stack(norms).norm().reshape(1), torch.empty(0)


#: what FusedAdam, the gradient norm and clipping call
OPTIMIZER = {
    "multi_tensor_adam": multi_tensor_adam,
    "multi_tensor_scale": multi_tensor_scale,
    "multi_tensor_l2norm": multi_tensor_l2norm,
}
LAYERS: dict[str, Any] = {
    **{name: Missing(name) for name in ("layernorm_fwd", "layernorm_bwd")},
    "generic_gemm": generic_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "convert_thd_to_bshd": convert_thd_to_bshd,
    "convert_bshd_to_thd": convert_bshd_to_thd,
}
TORCH_DTYPES: dict[Any, torch.dtype] = {}


class Nothing:
    """A stream or an event: every method does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Properties:
    """Of an H100."""

    major, minor, multi_processor_count, name, total_memory = 9, 0, 132, "stand-in", 80 << 30


def install(*, on_gpu: bool = True) -> None:
    """Put the stand-ins in place and import Transformer Engine; call before megatron-core is imported.

    Args:
        on_gpu: False makes a process with ``device=cpu`` beside Transformer Engine, whose kernels it cannot call.
    """
    os.environ.update(ENVIRONMENT)
    importlib.import_module("torch._dynamo")  # looks for the real Triton, and is content without it
    _put_modules({**LAYERS, **OPTIMIZER} if on_gpu else {})
    with warnings.catch_warnings(action="ignore"):  # it finds no compiled library
        import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    from megatron_embed.bridge.cpu import host

    _answer_cuda_calls()
    import transformer_engine.pytorch
    import transformer_engine.pytorch.cpp_extensions.gemm as gemm

    for name in UNUSED:
        del sys.modules[name]
    gemm.get_cublas_workspace = lambda *_: torch.empty(1, dtype=torch.uint8)
    host.run_on_cpu()
    if not on_gpu:
        return
    # Layers and optimizer assert that there is a GPU and that their tensors are on it.
    torch.cuda.is_available = _asked_by_transformer_engine  # type: ignore[assignment]
    _choose_transformer_engine()
    _map_devices_in_backward()
    torch.Tensor.is_cuda = property(_asked_by_transformer_engine)  # type: ignore[assignment]


def _asked_by_transformer_engine(*_: Any) -> bool:
    """Return whether the caller is Transformer Engine's code; for all other code this process is one without a GPU."""
    return str(sys._getframe(1).f_globals.get("__name__")).startswith("transformer_engine")


def _choose_transformer_engine() -> None:
    from megatron_embed.bridge import layer_spec, te_import
    from megatron_embed.recipes.training import optimizer

    assert te_import.problem() is None
    layer_spec.transformer_engine_is_usable = lambda: True
    optimizer._use_fused_kernels = lambda: None


def _map_devices_in_backward() -> None:
    """Map CUDA devices inside of backward too: torch's modes are off inside of a call that they handle."""
    from megatron_embed.bridge.cpu import host

    run = torch.autograd._engine_run_backward

    def run_inside(*args: Any, **kwargs: Any) -> Any:
        with host._CudaMeansCpu():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_inside


def _put_modules(kernels: dict[str, Any]) -> None:
    tex: Any = Kernels("transformer_engine_torch")
    tex.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    for name, members in ENUMS.items():
        setattr(tex, name, enum.IntEnum(name, members.split(), start=0))
    for name in CLASSES:
        setattr(tex, name, type(name, (), {}))
    tex.get_cudnn_version, tex.get_cublasLt_version = (lambda: 91500), (lambda: 130000)
    for name, function in kernels.items():
        setattr(tex, name, function)
    TORCH_DTYPES.update(
        {tex.DType.kFloat32: torch.float32, tex.DType.kFloat16: torch.float16, tex.DType.kBFloat16: torch.bfloat16}
    )
    sys.modules["transformer_engine_torch"] = tex
    for name in UNUSED:
        sys.modules[name] = MagicMock(name=name, __version__="0", __spec__=importlib.machinery.ModuleSpec(name, None))


def _answer_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_properties = lambda *_, **__: Properties
    cuda.get_device_capability = lambda *_, **__: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = lambda *_, **__: Nothing()
    cuda.Stream = cuda.Event = Nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment,method-assign]
