"""Other ways to multiply activations by a weight, quantized or not.

Each function makes one :class:`Peer` for a :class:`Product`. Quantization in a peer is plain torch
that Inductor compiles for the very shape, as somebody without mokernels would write it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.support.contest import Contender, Peer, Setting, UnavailableError, Work
from bench.support.timing import Call
from mokernels import numerics

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
BLOCK = 128


@dataclass
class Product:
    """x [M, K] by a weight [N, K], bf16; peers quantize the weight their own way beforehand."""

    setting: Setting
    x: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape[0], *self.weight.shape

    @cached_property
    def static_scale(self) -> Tensor:
        """What calibration on these activations would store: amax / 448."""
        return self.x.abs().amax().float() / 448

    def work(self, weight_bytes: int, unit: str, activation_bytes: int = 2) -> Work:
        """Of one call: the weight, x in the width given, and the bf16 result."""
        m, n, k = self.shape
        return Work(2.0 * m * n * k, weight_bytes + activation_bytes * m * k + 2 * m * n, unit)


def rotating(setting: Setting, run: Callable[..., Any], *weights: Tensor) -> list[Call]:
    """Calls of ``run(*weights)`` with as many copies of the weights as outgrow the caches."""
    size = nbytes(weights)
    copies = [weights, *(_clones(weights) for _ in range(setting.copies(size) - 1))]
    return [partial(run, *copy) for copy in copies]


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _clones(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # clone() of a transposed tensor keeps its strides, which _scaled_mm insists on.
    return tuple(t.clone() for t in tensors)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and one fp32 scale for each row, [M, 1]."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(FP8), scale


def quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes with a scale that is known beforehand."""
    return (x.float() / scale).clamp(-448, 448).to(FP8)


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and fp32 scales for 1x128, [M, K / 128] with the rows next to each other."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1).clamp(min=1e-12) / 448
    codes = (blocks / scale.unsqueeze(-1)).to(FP8).flatten(-2)
    return codes, scale.t().clone(memory_format=torch.contiguous_format).t()


def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Tensor:
    """``torch._scaled_mm`` of codes [M, K] and [N, K]."""
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=BF16, use_fast_accum=fast
    )


def multiply_blocks(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """1x128 by 128x128 through the public function, which is young."""
    api = torch.nn.functional
    if not hasattr(api, "scaled_mm"):
        raise UnavailableError(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm")
    kinds = api.ScalingType
    recipes = (kinds.BlockWise1x128, kinds.BlockWise128x128)
    return api.scaled_mm(
        a, b.t(), scale_a, recipes[0], scale_b, recipes[1], output_dtype=BF16, use_fast_accum=False
    )


def row_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales as ``_scaled_mm`` wants them, [1, N]."""
    codes, scale = numerics.quantize_fp8_channel_weight(weight)
    return codes, scale.reshape(1, -1)


def block_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [K / 128 padded to fours, N / 128], K contiguous."""
    codes, scale = numerics.quantize_fp8_block_weight(weight)
    n, k = (-(-side // BLOCK) for side in weight.shape)
    padded = torch.ones(n, k + -k % 4, device=weight.device)
    padded[:, :k] = scale.reshape(n, k)
    return codes, padded.t()


def bf16_matmul(p: Product) -> Peer:
    def make() -> Contender:
        calls = rotating(p.setting, lambda w: torch.mm(p.x, w.t()), p.weight)
        return Contender("bf16 matmul", calls, p.work(nbytes([p.weight]), "bf16"))

    return Peer("bf16 matmul", make)


def row_wise(p: Product, *, fast: bool, quantized: bool = False) -> Peer:
    """Row-wise ``_scaled_mm``; behind Inductor's quantization, or of codes that are there."""
    name = f"{'' if quantized else 'Inductor quantize + '}_scaled_mm row-wise{_accuracy(fast)}"

    def make() -> Contender:
        codes, scale = row_weight(p.weight)
        quantize = p.setting.compiled(quantize_rows)
        ready = quantize_rows(p.x)

        def run(b: Tensor, scale_b: Tensor) -> Tensor:
            a, scale_a = ready if quantized else quantize(p.x)
            return multiply(a, b, scale_a, scale_b, fast)

        calls = rotating(p.setting, run, codes, scale)
        return Contender(name, calls, _fp8_work(p, codes, quantized))

    return Peer(name, make)


def tensor_wise(p: Product, *, fast: bool, quantized: bool = False) -> Peer:
    """Tensor-wise ``_scaled_mm`` with a static activation scale."""
    name = f"{'' if quantized else 'Inductor quantize + '}_scaled_mm tensor-wise{_accuracy(fast)}"

    def make() -> Contender:
        codes, scale = numerics.quantize_fp8_tensor_weight(p.weight)
        quantize = p.setting.compiled(quantize_static)
        ready = quantize_static(p.x, p.static_scale)

        def run(b: Tensor, scale_b: Tensor) -> Tensor:
            a = ready if quantized else quantize(p.x, p.static_scale)
            return multiply(a, b, p.static_scale, scale_b, fast)

        calls = rotating(p.setting, run, codes, scale)
        return Contender(name, calls, _fp8_work(p, codes, quantized))

    return Peer(name, make)


def scales_left_out(p: Product) -> Peer:
    """Per-token quantization and the fastest recipe, which cannot apply its scales: a bound.

    Nobody gets the right product this fast: the scales are multiplied in for the check only.
    """
    name = "Inductor quantize rows + _scaled_mm tensor-wise, scales left out"

    def make() -> Contender:
        codes, scale = row_weight(p.weight)
        quantize, one = p.setting.compiled(quantize_rows), torch.ones((), device=p.x.device)

        def run(b: Tensor) -> Tensor:
            a, _ = quantize(p.x)
            return multiply(a, b, one, one, True)

        def restored(y: Tensor) -> Tensor:
            return y.float() * quantize_rows(p.x)[1] * scale

        return Contender(name, rotating(p.setting, run, codes), _fp8_work(p, codes), restored)

    return Peer(name, make)


def block_wise(p: Product, *, quantized: bool = False) -> Peer:
    """1x128 by 128x128 scales, torch's own."""
    name = f"{'' if quantized else 'Inductor quantize + '}scaled_mm 1x128 by 128x128"

    def make() -> Contender:
        codes, scale = block_weight(p.weight)
        quantize = p.setting.compiled(quantize_blocks)
        ready = quantize_blocks(p.x)

        def run(b: Tensor, scale_b: Tensor) -> Tensor:
            a, scale_a = ready if quantized else quantize(p.x)
            return multiply_blocks(a, b, scale_a, scale_b)

        calls = rotating(p.setting, run, codes, scale)
        return Contender(name, calls, _fp8_work(p, codes, quantized))

    return Peer(name, make)


def deep_gemm(p: Product, *, quantized: bool = False) -> Peer:
    """DeepGEMM's block-scaled product, behind Inductor's quantization or without."""
    name = f"{'' if quantized else 'Inductor quantize + '}DeepGEMM 1x128 by 128x128"

    def make() -> Contender:
        library = imported("deep_gemm")
        codes, scale = numerics.quantize_fp8_block_weight(p.weight)
        scale = scale.reshape(-(-codes.shape[0] // BLOCK), -(-codes.shape[1] // BLOCK))
        quantize = p.setting.compiled(quantize_blocks)
        ready = quantize_blocks(p.x)
        y = torch.empty(p.x.shape[0], codes.shape[0], dtype=BF16, device=p.x.device)

        def run(b: Tensor, scale_b: Tensor) -> Tensor:
            library.fp8_gemm_nt(ready if quantized else quantize(p.x), (b, scale_b), y)
            return y

        calls = rotating(p.setting, run, codes, scale)
        return Contender(name, calls, _fp8_work(p, codes, quantized))

    return Peer(name, make)


def tinygemm_int4(p: Product) -> Peer:
    """int4 weights in groups of 128 with bf16 activations, the 4-bit product inside torch."""
    name = "int4 tinygemm (weight only)"

    def make() -> Contender:
        if p.setting.device.type != "cuda":
            raise UnavailableError("its packed layout is that of CUDA devices")
        packed, scales = int4_weight(p.weight)
        packed = torch.ops.aten._convert_weight_to_int4pack(packed, 8)

        def run(b: Tensor, scale_b: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(p.x, b, BLOCK, scale_b)

        calls = rotating(p.setting, run, packed, scales)
        return Contender(name, calls, p.work(nbytes((packed, scales)), "bf16"))

    return Peer(name, make)


def int4_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte, the even one high, [N, K / 2]; (scale, zero) bf16 [K / 128, N, 2].

    A code q stands for (q - 8) * scale + zero.
    """
    groups = weight.float().unflatten(-1, (-1, BLOCK))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    both = torch.cat([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous()
    return (codes[:, ::2] << 4) | codes[:, 1::2], both.to(BF16)


def gemlite(p: Product, *, name: str, helper: str, bits: float, unit: str = "bf16") -> Peer:
    """A layer of gemlite, quantization of the activations included where it has one.

    Args:
        p: what is multiplied.
        name: in results.
        helper: the class in ``gemlite.helper`` that makes the layer.
        bits: of a weight, its scales included.
        unit: matrix units that could do it fastest.
    """

    def make() -> Contender:
        maker = getattr(imported("gemlite.helper"), helper, None)
        if maker is None:
            raise UnavailableError(f"this gemlite has no gemlite.helper.{helper}")
        linear = torch.nn.Linear(p.weight.shape[1], p.weight.shape[0], bias=False, dtype=BF16)
        linear.weight = torch.nn.Parameter(p.weight.clone(), requires_grad=False)
        size = int(p.weight.numel() * bits / 8)
        build = maker(device=str(p.setting.device), dtype=BF16)
        # del_orig: by default the first layer would take the weight away from the others.
        count = p.setting.copies(size)
        layers = [build.from_linear(linear, del_orig=False) for _ in range(count)]
        calls = [partial(layer, p.x) for layer in layers]
        return Contender(name, calls, p.work(size, unit))

    return Peer(name, make)


gemlite_fp8 = partial(
    gemlite, name="gemlite FP8 dynamic", helper="A8W8_fp8_dynamic", bits=8, unit="fp8"
)
gemlite_mxfp8 = partial(
    gemlite, name="gemlite MXFP8 dynamic", helper="A8W8_MXFP_dynamic", bits=8.25
)
gemlite_nvfp4 = partial(gemlite, name="gemlite NVFP4 dynamic", helper="A4W4_NVFP_dynamic", bits=4.5)
gemlite_mxfp4 = partial(gemlite, name="gemlite MXFP4 (weight only)", helper="A16W4_MXFP", bits=4.25)


def imported(module: str) -> Any:
    """A package that is no dependency of ours."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported ({error})") from error


def _fp8_work(p: Product, codes: Tensor, quantized: bool = False) -> Work:
    return p.work(nbytes([codes]), "fp8", activation_bytes=1 if quantized else 2)


def _accuracy(fast: bool) -> str:
    return " (fast)" if fast else ""
