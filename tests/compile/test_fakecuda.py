"""Compiling for a CUDA device that is not there, and leaving no trace of it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import mokernels  # noqa: F401  (registers the operators)
from mokernels.ops.target import target_of
from tests.support.fakecuda import Capability, compile_kernels, fake_cuda, generate, launches
from tests.support.inductor_source import launches_of

CAPABILITIES = ((8, 9), (9, 0), (10, 0))
HIDDEN = 4096
N = 512
LINEAR = "mokernels.fp8_per_token_linear"


def norm_then_linear(
    x: Tensor, residual: Tensor, norm: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """What a decoder layer begins with: add, RMSNorm as Llama has it, a projection."""
    hidden = x + residual
    wide = hidden.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    normed = norm * (wide * torch.rsqrt(variance + 1e-6)).to(x.dtype)
    return torch.ops.mokernels.fp8_per_token_linear(normed, weight, scale), hidden


def arguments(tokens: int = 16, dynamic: bool = False) -> list[Tensor]:
    """Those of ``norm_then_linear``, on the device."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    rows = [empty(tokens, HIDDEN), empty(tokens, HIDDEN)]
    if dynamic:
        for tensor in rows:
            torch._dynamo.mark_dynamic(tensor, 0)
    weight = empty(N, HIDDEN, dtype=torch.float8_e4m3fn)
    return [*rows, empty(HIDDEN), weight, empty(dtype=torch.float32)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_residual_norm_and_linear_are_two_launches(capability: Capability, dynamic: bool) -> None:
    with fake_cuda(capability):
        found = launches(norm_then_linear, *arguments(dynamic=dynamic))
    assert found[0].startswith("triton_")
    assert found[1:] == [LINEAR]


def test_dynamic_tokens_are_symbols() -> None:
    with fake_cuda((9, 0)):
        static = generate(norm_then_linear, *arguments(tokens=24)).source
        dynamic = generate(norm_then_linear, *arguments(tokens=24, dynamic=True)).source
    assert f"empty_strided_cuda((24, {HIDDEN})" in static
    assert f"empty_strided_cuda((24, {HIDDEN})" not in dynamic


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_the_capability(capability: Capability) -> None:
    with fake_cuda(capability):
        generated = generate(norm_then_linear, *arguments())
    compiled = compile_kernels(generated.source, capability)
    assert list(compiled) == generated.launches[:1]
    for kernel in compiled[generated.launches[0]]:
        assert f".target sm_{capability[0]}{capability[1]}" in kernel.ptx
        assert kernel.cubin
        assert not kernel.spills


def test_kernels_of_another_capability_are_refused() -> None:
    with fake_cuda((9, 0)):
        generated = generate(torch.nn.functional.silu, arguments()[0])
    with pytest.raises(ValueError, match=r"generated for sm_90, not for sm_100"):
        compile_kernels(generated.source, (10, 0))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_target_is_the_faked_one(capability: Capability) -> None:
    with fake_cuda(capability):
        assert target_of(torch.device("cuda")).name == f"sm_{capability[0]}{capability[1]}"


def test_names_of_library_calls() -> None:
    with fake_cuda((9, 0)):
        x, weight = arguments()[0], torch.empty(HIDDEN, 8, dtype=torch.bfloat16, device="cuda")
        assert launches(torch.mm, x, weight) == ["extern_kernels.mm"]


def test_passes_and_options_reach_inductor() -> None:
    seen: list[torch.fx.Graph] = []
    with fake_cuda((9, 0)):
        usual = launches(norm_then_linear, *arguments(), passes=seen.append)
        single = launches(norm_then_linear, *arguments(), options={"max_fusion_size": 1})
    assert len(seen) == 1
    assert len(single) > len(usual)


def test_functions_without_a_graph_are_refused() -> None:
    with fake_cuda((9, 0)), pytest.raises(RuntimeError, match="wrote no source"):
        launches(lambda x: x, arguments()[0])


def test_calls_not_understood_are_refused() -> None:
    source = "def call(args):\n    surprise_launch(args)\n"
    with pytest.raises(RuntimeError, match="wrapper calls surprise_launch"):
        launches_of(source)


def test_unknown_capability() -> None:
    with pytest.raises(ValueError, match=r"no target of compute capability \(7, 0\)"):  # noqa: SIM117
        with fake_cuda((7, 0)):
            pass


def test_a_missing_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "_exchange_device")
    with pytest.raises(RuntimeError, match=r"lacks torch\.cuda\._exchange_device"):  # noqa: SIM117
        with fake_cuda((9, 0)):
            pass


def state() -> dict[str, Any]:
    """What ``fake_cuda`` replaces."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers

    return {
        **{f"cuda.{name}": value for name, value in vars(torch.cuda).items()},
        **{f"env.{name}": value for name, value in os.environ.items()},
        **{f"config.{name}": value for name, value in config.get_config_copy().items()},
        "interfaces": dict(device_interface.get_registered_device_interfaces()),
        "driver": triton.runtime.driver._active,
        "patterns": joint_graph.lazy_init,
        "set_driver": triton_helpers.set_driver_to_gpu,
        "versions": (torch.version.cuda, torch.version.hip),
        "mode": torch.utils._python_dispatch._get_current_dispatch_mode(),
    }


class DeliberateError(Exception):
    """What a test's body raises."""


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_patched(fails: bool) -> None:
    with fake_cuda((8, 9)):
        pass  # imports add names
    before = state()
    try:
        with fake_cuda((9, 0)):
            launches(norm_then_linear, *arguments())
            assert state() != before
            if fails:
                raise DeliberateError
    except DeliberateError:
        pass
    after = state()
    assert [name for name in {*before, *after} if before.get(name) != after.get(name)] == []
    assert target_of.cache_info().currsize == 0
    assert type(torch.empty(1)) is Tensor
