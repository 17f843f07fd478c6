"""What a GPU launches for a decoder layer of 8B size, for three generations of GPUs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from mokernels.compile import FusionOptions
from mokernels.compile.fusion import FusionPass
from mokernels.compile.reports import GraphReport
from mokernels.formats import Activation
from tests.support.decoder_layer import ATTENTION, HIDDEN, DecoderLayer, hidden_states
from tests.support.fakecuda import Capability, Generated, compile_kernels, fake_cuda, generate

ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)
CAPABILITIES = (ADA, HOPPER, BLACKWELL)
TOKENS = 24  # a number that nothing else in the source is
# What each format launches: quantizer, GEMM, and the operator that does both after attention.
QUANTIZED = {
    "FP8": ("fp8", "fp8_gemm", "fp8_linear"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_per_token", "fp8_gemm", "fp8_per_token_linear"),
    "fp8_block": ("fp8_per_block", "fp8_gemm", "fp8_block_linear"),
    "NVFP4": ("nvfp4", "nvfp4_gemm", "nvfp4_linear"),
    "MXFP8": ("mxfp8", "mxfp8_gemm", "mxfp8_linear"),
}
INDUCTOR = "kernel by Inductor"


def layer_of(kind: str, architecture: str = "Llama", **options: Any) -> DecoderLayer:
    if kind == "fp8_block":
        return DecoderLayer(architecture, "FP8_PB_WO", Activation.FP8_BLOCK, **options)
    return DecoderLayer(architecture, kind, **options)


def compiled(
    make: Any, capability: Capability, *, dynamic: bool = True, options: Any = None
) -> tuple[Generated, GraphReport]:
    """The source that Inductor writes for what ``make()`` returns, and what the pass did."""
    ours = FusionPass(options)
    with fake_cuda(capability):
        tensors = hidden_states(TOKENS, dynamic=dynamic)
        generated = generate(make(), *tensors, passes=ours)
        ours.count_kernels()
    (report,) = ours.reports
    return generated, report


def plain(launches: list[str]) -> list[str]:
    return [INDUCTOR if name.startswith("triton_") else name for name in launches]


def expected(kind: str, capability: Capability, gemms: tuple[int, int] = (1, 1)) -> list[str]:
    """The launches of a Llama layer; ``gemms`` for q, k, v and for gate, up."""
    quantizer, gemm, linear = QUANTIZED[kind]
    if kind in ("NVFP4", "MXFP8") and capability < BLACKWELL:
        quantizer, gemm = f"{quantizer}_to_bf16", f"{quantizer}_weight_only_gemm"
    return [
        f"mokernels.rms_norm_quantize_{quantizer}",
        *[f"mokernels.{gemm}"] * gemms[0],
        INDUCTOR,  # rotary embedding of q
        INDUCTOR,  # and of k
        ATTENTION,
        f"mokernels.{linear}",
        f"mokernels.add_rms_norm_quantize_{quantizer}",
        *[f"mokernels.{gemm}"] * gemms[1],
        f"mokernels.gated_quantize_{quantizer}",
        f"mokernels.{gemm}",
        INDUCTOR,  # the last residual
    ]


def assert_nothing_wide(source: str) -> None:
    """No fp32 intermediate as wide as a row: scales have a number to a token or a block."""
    allocated = re.findall(r"empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.float32\)", source)
    widths = [int(shape.rpartition(",")[2] or 1) for shape in allocated]
    assert [width for width in widths if width > HIDDEN // 16] == []


@pytest.mark.parametrize(
    ("capability", "dynamic"), [*((c, True) for c in CAPABILITIES), (HOPPER, False)], ids=str
)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_llama_layer(kind: str, capability: Capability, dynamic: bool) -> None:
    generated, report = compiled(lambda: layer_of(kind), capability, dynamic=dynamic)
    assert plain(generated.launches) == expected(kind, capability)
    assert_nothing_wide(generated.source)
    fixed = re.search(rf"empty_strided_cuda\([^)]*\b{TOKENS}\b", generated.source)
    assert bool(fixed) == (not dynamic)
    assert report.calls_per_layer() == {"": 7}
    assert report.inductor_kernels == 3
    assert [r.what for r in report.rewrites if r.why] == []


def test_weights_only_are_quantized() -> None:
    generated, _ = compiled(lambda: layer_of("FP8_PB_WO"), HOPPER)
    gemm = "mokernels.fp8_weight_only_gemm"
    assert plain(generated.launches) == [
        INDUCTOR, gemm, INDUCTOR, INDUCTOR, ATTENTION, gemm,
        INDUCTOR, gemm, INDUCTOR, gemm, INDUCTOR,
    ]  # fmt: skip
    assert_nothing_wide(generated.source)


@pytest.mark.parametrize("kind", ["FP8", "NVFP4"])
def test_weights_that_lie_apart_share_a_quantization(kind: str) -> None:
    apart, report = compiled(lambda: layer_of(kind, siblings="apart"), HOPPER)
    assert plain(apart.launches) == expected(kind, HOPPER, gemms=(3, 2))
    assert [r.what for r in report.rewrites[:2]] == [f"one quantization for {n}" for n in (3, 2)]
    assert [path.rpartition(".")[2] for path in report.rewrites[1].modules] == [
        "gate_proj",
        "up_proj",
    ]


def test_activation_scales_that_differ_are_each_kept() -> None:
    # q, k and v of one input, but calibrated apart: one scale for all would be another model.
    generated, report = compiled(lambda: layer_of("NVFP4", siblings="strangers"), HOPPER)
    launches = plain(generated.launches)
    quantized = [INDUCTOR, *["mokernels.quantize_nvfp4_to_bf16"] * 3]
    assert sorted(launches[:7]) == sorted([*quantized, *["mokernels.nvfp4_weight_only_gemm"] * 3])
    assert not report.rewrites[0].what.startswith("one quantization")


def test_merging_can_be_left_out() -> None:
    options = FusionOptions(merge_projections=False)
    generated, _ = compiled(lambda: layer_of("FP8"), HOPPER, options=options)
    assert plain(generated.launches) == expected("FP8", HOPPER, gemms=(3, 2))


class TwoLayers(nn.Module):
    """Where the residual of the first is added, the norm of the second begins."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer_of("MXFP8"), layer_of("MXFP8")])

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return hidden


def test_the_last_residual_joins_the_next_layer() -> None:
    generated, report = compiled(TwoLayers, HOPPER)
    one = expected("MXFP8", HOPPER)
    joined = f"mokernels.add_{one[0].removeprefix('mokernels.')}"
    assert plain(generated.launches) == [*one[:-1], joined, *one[1:]]
    assert report.calls_per_layer() == {"layers.0": 7, "layers.1": 7}


# Normalised q and k are one kernel each, biases are the GEMM's, a norm after attention or the MLP
# is Inductor's, and Phi's q, k, v and gate, up are one projection each in the checkpoint already.
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("Qwen2", "FP8"),
        ("Qwen3", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("Mistral", "NVFP4"),
        ("Phi3", "MXFP8"),
        ("Gemma", "fp8_block"),
    ],
)
def test_other_architectures(architecture: str, kind: str) -> None:
    generated, _ = compiled(lambda: layer_of(kind, architecture), HOPPER)
    assert plain(generated.launches) == expected(kind, HOPPER)
    assert_nothing_wide(generated.source)


def test_norms_on_both_sides() -> None:
    generated, report = compiled(lambda: layer_of("FP8", "Gemma2"), HOPPER)
    wanted = expected("FP8", HOPPER)
    assert plain(generated.launches) == [*wanted[:6], INDUCTOR, *wanted[6:]]
    assert "gelu_tanh * up + quantize" in [r.what for r in report.rewrites]


def test_norms_behind_the_projections_leave_the_quantization_to_inductor() -> None:
    # OLMo 2 normalises what attention and the MLP return: nothing comes before q, k, v.
    generated, report = compiled(lambda: layer_of("FP8_PER_CHANNEL_PER_TOKEN", "Olmo2"), HOPPER)
    assert plain(generated.launches) == [
        "mokernels.fp8_per_token_linear", INDUCTOR, INDUCTOR, ATTENTION,
        "mokernels.fp8_per_token_linear", INDUCTOR, "mokernels.fp8_gemm",
        "mokernels.gated_quantize_fp8_per_token", "mokernels.fp8_gemm", INDUCTOR,
    ]  # fmt: skip
    assert "quantize left to Inductor" in [r.what for r in report.rewrites]


WITHOUT_OURS = FusionOptions(fuse_norm=False, fuse_activation=False)


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL], ids=str)
def test_what_inductor_writes_rounds_as_our_kernels_do(capability: Capability) -> None:
    make = lambda: layer_of("FP8_PER_CHANNEL_PER_TOKEN")  # noqa: E731
    generated, _ = compiled(make, capability, options=WITHOUT_OURS)
    # Norm and quantization, residual, norm and quantization: one kernel each.
    kernels = [name for name in generated.launches if "amax" in name and "silu" not in name]
    assert len(kernels) == 2
    for name, configs in compile_kernels(generated.source, capability).items():
        if name in kernels:
            for kernel in configs:
                assert not approximate_divisors(kernel.ptx)
                assert "rcp.approx" not in kernel.ptx


def approximate_divisors(ptx: str) -> list[str]:
    """Registers that are divided by in a faster way than rounding to nearest takes.

    But for constants, here powers of two that a mean divides by, which triton 3.6 does not turn to
    factors: exact this way too.
    """
    divisors = re.findall(r"div\.full\.f32\s+%\w+, %\w+, (%\w+);", ptx)
    return [name for name in divisors if not re.search(rf"mov\.b32\s+{name}, 0f", ptx)]


def test_casts_that_round_twice_are_not_inductors() -> None:
    make = lambda: layer_of("FP8_PER_CHANNEL_PER_TOKEN")  # noqa: E731
    generated, _ = compiled(make, ADA, options=WITHOUT_OURS)
    assert not [name for name in generated.launches if "amax" in name]
    assert generated.launches.count("mokernels.quantize_fp8_per_token") == 3
    assert "float8e4nv" not in generated.source
