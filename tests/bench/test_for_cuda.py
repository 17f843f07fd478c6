"""The benchmarks' GPU paths as far as a machine without a GPU can follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from bench.support import activations, llama, peers
from tests.support.fakecuda import fake_cuda, launches

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
M, N, K = 16, 256, 512


@pytest.fixture
def hopper() -> Iterator[None]:
    with fake_cuda((9, 0)), torch.no_grad():
        yield


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_row_wise_peer_is_one_kernel_and_the_library(hopper: None) -> None:
    def peer(x: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
        a, scale_a = peers.quantize_rows(x)
        return peers.multiply(a, b, scale_a, scale_b, True)

    weight = empty(N, K, dtype=FP8), empty(1, N, dtype=torch.float32)
    found = launches(peer, empty(M, K), *weight)
    assert found[0].startswith("triton_")
    assert found[1:] == ["extern_kernels._scaled_mm"]


def test_static_peer_is_one_kernel_and_the_library(hopper: None) -> None:
    def peer(x: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return peers.multiply(peers.quantize_static(x, scale), b, scale, scale, True)

    one = empty(dtype=torch.float32)
    assert len(launches(peer, empty(M, K), empty(N, K, dtype=FP8), one)) == 2


def test_block_wise_peer_gives_torch_the_layout_it_wants() -> None:
    # The shapes are those of torch's own check, which the meta device runs.
    weight = torch.empty(N, K, dtype=BF16, device="meta")
    codes, scale_a = peers.quantize_blocks(torch.empty(M, K, dtype=BF16, device="meta"))
    for copy in (peers.block_weight(weight), peers._clones(peers.block_weight(weight))):
        assert peers.multiply_blocks(codes, copy[0], scale_a, copy[1]).shape == (M, N)


def test_block_scales_are_where_the_peer_looks_for_them() -> None:
    weight = torch.randn(N, 384).to(BF16)
    codes, scale = peers.block_weight(weight)
    assert scale.shape == (4, N // 128)  # 3 blocks of K, padded
    assert scale.stride() == (1, 4)
    values = codes.float() * scale[:3].t().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert float((values - weight.float()).norm() / weight.float().norm()) < 0.04


CASES = [("add + RMSNorm", "fp8_per_token"), ("silu * up", "fp8_per_block")]


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_inductor_fuses_what_it_is_given(hopper: None, name: str, quantization: str) -> None:
    producer, how = activations.PRODUCERS[name], activations.QUANTIZATIONS[quantization]

    def whole(*given: Tensor) -> object:
        *kept, last = producer.plain(*given[:-1])
        return (*kept, how.plain(last, given[-1]))

    tensors = [empty(M, K), empty(M, K), *([empty(K)] if producer.results else [])]
    assert 1 <= len(launches(whole, *tensors, empty(dtype=torch.float32))) <= 3


def step(layer: nn.Module) -> Callable[..., Tensor]:
    """A layer without its attention, of which a machine without a GPU cannot compile the masks."""
    attention = layer.self_attn

    def run(x: Tensor) -> Tensor:
        normed = layer.input_layernorm(x)
        heads = [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)]
        hidden = x + attention.o_proj(heads[0] + (heads[1] + heads[2]).sum())
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return run


def layer(convert: llama.Convert) -> nn.Module:
    return llama.build_layer(llama.TINY.config(), convert, torch.device("cpu"), seed=0)


def test_scaled_mm_layer_traces_for_cuda() -> None:
    built = layer(llama.ScaledMMLinear)
    with fake_cuda((9, 0)), torch.no_grad():
        run = step(moved(built))
        found = launches(run, empty(1, M, llama.TINY.hidden))
    assert found.count("extern_kernels._scaled_mm") == 7


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
def test_our_layer_traces_for_cuda(format: str) -> None:
    built = layer(llama.quantized(format))
    with fake_cuda((9, 0)), torch.no_grad():
        run = step(moved(built))
        found = launches(run, empty(1, M, llama.TINY.hidden))
    assert sum(name.startswith("mokernels.") for name in found) >= 4


def moved(module: nn.Module) -> nn.Module:
    """Its tensors replaced by ones of the faked device: nothing can be copied there."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made = empty(*tensor.shape, dtype=tensor.dtype)
                    keep = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(made, requires_grad=False) if keep else made
    return module
