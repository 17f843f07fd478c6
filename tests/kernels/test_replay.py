"""Calls that are replayed give the bits of calls that are planned; others are planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mokernels
from mokernels.ops import launch, tuned
from mokernels.ops.configs import choose
from mokernels.ops.kinds import Kind
from mokernels.ops.launch import direct, plan, replay
from mokernels.ops.launch.replay import Recipe, Replayed
from mokernels.ops.quantize import QUANTIZERS
from mokernels.ops.table_files import Key
from mokernels.ops.target import SM_90, SM_100, Target, target_of
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting
from tests.support.operators import cases

K, N = 1024, 64
BF16 = torch.bfloat16
# A large K and a small N: some products are split, and have workspaces and counters.
TARGETS: tuple[Target, ...] = (SM_90, SM_100) if interpreting() else ()


class Interpreted:
    """What stands for a compiled kernel: gives the interpreter its arguments as they were planned.

    Triton compiles a kernel for the dtypes of what was planned, and then looks at addresses alone;
    the interpreter looks at the tensors.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel, self._planned, self._options = kernel, args, options

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        given = tuple(map(seen_as, self._planned, args))
        self._kernel[grid](*given, **self._options)


def seen_as(planned: Any, given: Any) -> Any:
    """What starts at the address of ``given``, of the dtype and shape of ``planned``."""
    if type(planned) is tuple:
        assert len(planned) == len(given)
        return tuple(map(seen_as, planned, given))
    if not isinstance(planned, Tensor):
        assert type(planned) is type(given)
        assert planned == given
        return given
    start, rest = divmod(given.storage_offset() * given.itemsize, planned.itemsize)
    assert rest == 0
    empty = torch.empty(0, dtype=planned.dtype, device=planned.device)
    return empty.set_(given.untyped_storage(), start, planned.shape, planned.stride())


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recipes that are followed, one for each replayed call; interpreted where all kernels are."""
    followed: list[Any] = []
    follow, launch_directly = Recipe.__call__, direct.launch

    def find(kernel: Any, args: Any, constants: Any, options: Any) -> Any:
        given = {name: options[name] for name in ("num_warps", "num_stages")}
        return Interpreted(kernel, args, {**constants, **given}), ()

    def launch_interpreted(*given: Any) -> None:
        with torch._C._DisableTorchDispatch():  # what a GPU does is not seen either
            launch_directly(*given)

    def interpret(compiled: Any, grid: Any, stream: int, args: Any) -> None:
        compiled(grid, args)

    def note(self: Recipe, *given: Any) -> Any:
        followed.append(self)
        return follow(self, *given)

    monkeypatch.setattr(Recipe, "__call__", note)
    if interpreting():
        monkeypatch.setattr(plan, "launch", launch_interpreted)
        monkeypatch.setattr(direct, "find", find)
        monkeypatch.setattr(direct, "launch_compiled", interpret)
        monkeypatch.setattr(direct, "go_through_triton", lambda kernels: False)
        monkeypatch.setattr(direct, "current_device", lambda: -1)  # as a tensor's of the CPU
        monkeypatch.setattr(direct, "current_stream", lambda device: 0)
    return followed


def calls(m: int, device: torch.device, seed: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of every product for m rows, by its name."""
    torch.manual_seed(seed)
    multiplier = torch.tensor(1 / 0.01)
    for name, case in cases(K, N, (m,)).items():
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in case.args)
        yield name, args
        if name == "fp8_linear":
            yield "fp8_linear/multiplier", (*args, multiplier.to(device))


def planned(name: str, target: Target) -> Callable[..., Any]:
    return partial(getattr(launch, name.partition("/")[0]), target=target)


def targets(device: torch.device) -> tuple[Target, ...]:
    return TARGETS or (target_of(device),)


@pytest.mark.parametrize("m", [1, 5])
def test_products_have_the_bits_of_planned_ones(device, replays, m):
    target = targets(device)[0 if m == 1 else -1]
    operators = {name: Replayed(planned(name, target)) for name, _ in calls(m, device, 0)}
    for seed in range(2):
        for name, args in calls(m, device, seed):
            expected = planned(name, target)(*args)
            replays.clear()
            assert_same_bits(operators[name](*args), expected)
            assert bool(replays) == (seed > 0), name


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_have_the_bits_of_planned_ones(device, replays, name):
    extra = (torch.tensor(0.02, device=device),) if QUANTIZERS[name].extra else ()
    (target, *_) = targets(device)
    weight = torch.rand(256, device=device)
    make = {
        f"quantize_{name}": lambda x: (x, *extra),
        f"rms_norm_quantize_{name}": lambda x: (x, weight, 1e-5, "llama", *extra),
        f"add_rms_norm_quantize_{name}": lambda x: (x, -2 * x, weight, 1e-6, "gemma", *extra),
        f"gated_quantize_{name}": lambda x: (x, x + 1, "silu", *extra),
    }
    for operator, arguments in make.items():
        producer, _, quantizer = operator.rpartition("quantize_")
        whole = getattr(launch, operator if not producer else f"{producer}quantize")
        call = partial(whole, *([quantizer] if producer else []), target=target)
        replayed = Replayed(call)
        for seed in range(3):
            torch.manual_seed(seed)
            args = arguments(torch.randn(3, 256, dtype=BF16).to(device))
            replays.clear()
            results, expected = replayed(*args), call(*args)
            assert len(replays) == (seed > 0), operator
            assert isinstance(results, tuple) == isinstance(expected, tuple)
            pairs = (
                zip(results, expected, strict=True)
                if isinstance(results, tuple)
                else [(results, expected)]
            )
            for result, wanted in pairs:
                assert_same_bits(result, wanted)
                assert result.stride() == wanted.stride()


class Weights:
    """A product of 16-bit activations, and how often it is planned."""

    def __init__(self, device: torch.device) -> None:
        (target, *_) = targets(device)
        self.target = replace(target, processors=2)
        self.weight = torch.randn(N, 256).to(torch.float8_e4m3fn).to(device)
        self.scale = torch.rand(N, device=device)
        self.count = 0
        self.replayed = Replayed(self._call)

    def _call(self, *args: Any) -> Tensor:
        self.count += 1
        return launch.fp8_weight_only_gemm(*args, target=self.target)

    def __call__(self, x: Tensor, *args: Any) -> bool:
        """Whether a call is planned; the result is checked."""
        args = args or (self.weight, self.scale)
        count = self.count
        result = self.replayed(x, *args)
        planned = self.count - count
        assert_same_bits(result, self._call(x, *args))
        return bool(planned)


@pytest.fixture
def product(device):
    return Weights(device)


@pytest.fixture
def x(device):
    return torch.randn(3, 256, dtype=BF16).to(device)


def test_what_is_different_is_planned(device, product, x):
    assert product(x)
    assert not product(x)
    assert not product(x.clone())
    assert product(x[:2])
    assert product(x[None])
    assert product(x.half())
    assert product(x, product.weight, product.scale[:1].reshape(()))
    assert product(x, product.weight, product.scale, torch.ones(N, dtype=BF16, device=device))
    assert not product(x)


def test_addresses_between_two_multiples_of_16_bytes_are_told_apart(device, product, x):
    assert product(x)
    between = torch.empty(x.numel() + 1, dtype=BF16, device=device)[1:].view(x.shape).copy_(x)
    assert product(between)
    assert not product(x)


@pytest.mark.parametrize("change", [lambda x: x.mT.contiguous().mT, lambda x: x[:0]])
def test_what_takes_a_copy_or_nothing_is_planned_each_time(product, x, change):
    changed = change(x)
    assert product(changed)
    assert product(changed)


def test_padded_rows_are_replayed(device, product):
    wide = torch.randn(3, 320, dtype=BF16).to(device)
    assert product(wide[:, :256])
    assert not product(wide[:, :256])
    assert product(wide[:, :256].contiguous())


def test_arguments_that_are_one_tensor_are_not_taken_for_each_other(device):
    """A call with one scale for two would otherwise be replayed with the first for both."""
    weight = torch.randn(N, 256).to(torch.float8_e4m3fn).to(device)
    x = torch.randn(20, 256).to(torch.float8_e4m3fn).to(device)
    call = partial(launch.fp8_gemm, target=targets(device)[0])
    replayed = Replayed(call)
    one, two = torch.tensor(1.0, device=device), torch.tensor(2.0, device=device)
    for scales in ((one, one), (one, two), (two, one)):
        assert_same_bits(replayed(x, weight, *scales), call(x, weight, *scales))


def test_large_calls_are_planned(product, x, monkeypatch):
    monkeypatch.setattr(replay, "MOST_ELEMENTS", 2 * 256)
    assert product(x)
    assert product(x)
    assert product(x[:2])
    assert not product(x[:2])


def test_calls_are_not_remembered_without_end(product, x, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 2)
    for rows in (1, 2, 3):
        assert product(x[:rows])
    assert product(x[:1])
    assert not product(x[:3])


def test_another_order_of_addition_is_planned(product, x):
    assert product(x)
    with mokernels.batch_invariant():
        assert product(x)
        assert not product(x)
    assert not product(x)


def test_another_configuration_is_planned(product, x):
    assert product(x)
    chosen = choose(Kind.HALF_FP8, 3, N, 256, product.target)
    with tuned.forced(Key(Kind.HALF_FP8, 16, N, 256), replace(chosen, num_warps=2)):
        assert product(x)
        assert not product(x)
    assert product(x)


def test_what_is_watched_is_planned(product, x, monkeypatch):
    assert product(x)
    with monkeypatch.context() as patch:
        patch.setattr(direct, "go_through_triton", lambda kernels: True)
        assert product(x)
        assert product(x[:2])
    assert not product(x)
    assert product(x[:2])
    assert not product(x[:2])


def test_a_call_that_fails_is_not_remembered(product, x):
    with pytest.raises(AttributeError):
        product.replayed(x, None, None)
    assert product(x)
    assert not product(x)
