"""Graphs before and after the compile pass, run by the kernels of a GPU: not a bit may change.

On the CPU the pass leaves projections apart and norms to Inductor. Here it takes a graph for one of
a GPU, and both graphs are run node by node, mokernels' operators by their launchers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Interpreter

from mokernels.compile import FusionOptions, fusion
from mokernels.compile.fusion import FusionPass
from mokernels.compile.graph import name_of
from mokernels.formats import FORMATS, Activation
from mokernels.layers import Siblings, finish_loading, make_layer
from mokernels.ops import launch, quantizing
from mokernels.ops.launch.plan import Launch
from mokernels.ops.layer_kinds import has_dot
from mokernels.ops.target import Target
from tests.kernels.products import TARGETS
from tests.support.compare import assert_same_bits
from tests.support.models import quantized_tensors

K, INNER = 256, 128
SIZES = {
    "q_proj": (K, 128), "k_proj": (K, 128), "v_proj": (K, 128), "o_proj": (128, K),
    "gate_proj": (K, INNER), "up_proj": (K, INNER), "down_proj": (INNER, K),
}  # fmt: skip
KINDS: dict[str, tuple[str, Activation | None]] = {
    "FP8": ("FP8", None),
    "FP8 per token": ("FP8_PER_CHANNEL_PER_TOKEN", None),
    "FP8 1x128": ("FP8_PB_WO", Activation.FP8_BLOCK),
    "FP8 weight-only": ("FP8_PB_WO", None),
    "NVFP4": ("NVFP4", None),
    "NVFP4 weight-only": ("NVFP4", Activation.NONE),
    "MXFP8": ("MXFP8", None),
    "MXFP8 weight-only": ("MXFP8", Activation.NONE),
}
WITHOUT_PRODUCERS = FusionOptions(fuse_norm=False, fuse_activation=False, expand=False)


class Block(nn.Module):
    """A decoder layer without attention; its seven projections have scales of their own.

    Args:
        kind: of :data:`KINDS`.
        device: where it lives.
        bias: whether the projections have biases.
    """

    def __init__(self, kind: str, device: torch.device, *, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(len(kind))
        torch.manual_seed(len(kind))  # of the biases
        self.norm_1 = nn.Parameter(torch.rand(K, generator=generator).bfloat16() + 0.5)
        self.norm_2 = nn.Parameter(torch.rand(K, generator=generator).bfloat16() + 0.5)
        for position, (name, (k, n)) in enumerate(SIZES.items()):
            # Weights and so scales differ by 2 between projections that share an input.
            weight = torch.randn(n, k, generator=generator) * 2.0 ** (position % 3 - 4)
            linear = nn.Linear(k, n, bias=bias, dtype=torch.bfloat16)
            self.add_module(name, _quantized(kind, linear, weight.bfloat16()))
        self.to(device)
        finish_loading(self)
        for group in {id(m.siblings): m.siblings for m in self.children()}.values():
            if isinstance(group, Siblings) and group.buffers is None:
                assert group.lay_side_by_side()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = x + residual
        h = _normed(hidden, self.norm_1)
        # Where attention would be there is a product of two: Inductor writes that one.
        hidden_2 = hidden + self.o_proj(self.q_proj(h) * self.v_proj(h))
        h_2 = _normed(hidden_2, self.norm_2)
        mlp = self.down_proj(nn.functional.silu(self.gate_proj(h_2)) * self.up_proj(h_2))
        return torch.cat([mlp, self.k_proj(h), hidden_2, hidden], dim=-1)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as Llama has it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def _quantized(kind: str, linear: nn.Linear, weight: Tensor) -> nn.Module:
    format, activation = KINDS[kind]
    layer = make_layer(linear, FORMATS[format], activation=activation)
    for leaf, tensor in quantized_tensors(format, weight).items():
        getattr(layer, leaf).data = tensor
    if linear.bias is not None:
        layer.bias.data = linear.bias.data
    return layer


@dataclass(frozen=True)
class Captured:
    """The graph that AOTAutograd makes of a block, for any number of tokens, and its inputs.

    Attributes:
        graph: of operators as the layers call them.
        inputs: values of its placeholders for FEW tokens.
        tokens: the ones among them that are activations.
    """

    graph: GraphModule
    inputs: tuple[Any, ...]
    tokens: tuple[Tensor, ...]

    def inputs_for(self, m: int) -> list[Any]:
        """Values of the placeholders for m tokens; the size of a dimension may be among them."""
        device = self.tokens[0].device
        others = dict(zip(map(id, self.tokens), tokens(m, device), strict=True))
        return [m if value is FEW else others.get(id(value), value) for value in self.inputs]


FEW = 5


@cache
def captured(kind: str, device: torch.device, *, bias: bool, laid: bool) -> Captured:
    """Compile a block for ``kind`` with a backend that keeps what it is given.

    Args:
        kind: of :data:`KINDS`.
        device: where the block lives.
        bias: whether its projections have biases.
        laid: whether they take their tensors from the buffers of their group, as they do while
            they are compiled, or their own, as in eager mode.
    """
    graphs: list[GraphModule] = []
    given: list[tuple[Any, ...]] = []

    def keep(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            given.append(values)
            return graph.forward(*values)

        graphs.append(graph)
        return make_boxed_func(call)

    def is_fused() -> bool:
        return laid

    torch._dynamo.reset()
    block, few = Block(kind, device, bias=bias), tokens(FEW, device)
    for tensor in few:
        torch._dynamo.mark_dynamic(tensor, 0)
    backend = aot_autograd(
        fw_compiler=keep, inference_compiler=keep, decompositions=select_decomp_table()
    )
    with torch.no_grad(), mock.patch("mokernels.layers.linear._is_fused", is_fused):
        torch.compile(block, backend=backend, fullgraph=True)(*few)
    return Captured(graphs[0], given[0], tuple(few))


def tokens(m: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m)
    return [torch.randn(m, K, generator=generator).bfloat16().to(device) for _ in range(2)]


class Launched(Interpreter):
    """Runs a graph; mokernels' operators by their launchers for a target."""

    def __init__(self, graph: GraphModule, target: Target) -> None:
        super().__init__(graph)
        self.target = target

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(SimpleNamespace(target=target))
        if not name:
            return super().call_function(target, args, kwargs)
        for producer in ("add_rms_norm_quantize", "rms_norm_quantize", "gated_quantize"):
            if name.startswith(producer):
                args, name = (name.removeprefix(f"{producer}_"), *args), producer
        return getattr(launch, name)(*args, **kwargs, target=self.target)


def rewritten(graph: GraphModule, target: Target, options: FusionOptions) -> GraphModule:
    """What the pass makes of a graph on a GPU of this kind."""
    result = copy.deepcopy(graph)
    with (
        mock.patch.object(fusion, "_on_cpu", return_value=False),
        mock.patch(
            "mokernels.compile.split.multiplies",
            side_effect=lambda format, _: has_dot(format, target),
        ),
        torch.no_grad(),
    ):
        FusionPass(options)(result.graph)
    result.recompile()
    return result


def names(graph: GraphModule) -> list[str]:
    return [name_of(node) for node in graph.graph.nodes if name_of(node)]


def cases() -> Iterator[tuple[str, int, Target]]:
    """Every format, by two families of kernels for few tokens, and by one target's for more."""
    for position, kind in enumerate(KINDS):
        families = {(t.has_fp8_dot, t.has_nvfp4_dot): t for t in reversed(TARGETS)}
        for place, target in enumerate(families.values()):
            if len(families) < 3 or place != position % 3:  # two of the three
                yield kind, 3, target
        yield kind, 40, TARGETS[position % len(TARGETS)]


@pytest.mark.parametrize(
    ("kind", "m", "target"), list(cases()), ids=lambda v: getattr(v, "name", v)
)
def test_sharing_and_merging_change_no_bit(device, kind, m, target) -> None:
    eager = captured(kind, device, bias=m == 3, laid=False)
    block = captured(kind, device, bias=m == 3, laid=True)
    after = rewritten(block.graph, target, WITHOUT_PRODUCERS)
    products = [name for name in names(after) if "gemm" in name or "linear" in name]
    assert len(products) == 4 < len(names(eager.graph)) == 7
    (wanted,) = Launched(eager.graph, target).run(*eager.inputs_for(m))
    (found,) = Launched(after, target).run(*block.inputs_for(m))
    assert_same_bits(found, wanted)


def gemv_cases() -> Iterator[tuple[str, Target]]:
    """Each kind on two targets of three: without the codes' type, with it, and with MXFP8's dot."""
    targets = list({(t.has_fp8_type, t.has_mxfp8_dot): t for t in TARGETS}.values())
    for position, kind in enumerate(("FP8 weight-only", "MXFP8 weight-only", "MXFP8")):
        for target in {targets[(position + place) % len(targets)] for place in (0, 1)}:
            yield kind, target


@pytest.mark.parametrize(
    ("kind", "target"), sorted(gemv_cases(), key=str), ids=lambda v: getattr(v, "name", v)
)
def test_one_row_without_matrix_units_has_one_result_too(device, kind, target, monkeypatch) -> None:
    monkeypatch.setattr(quantizing, "E4M3_WEIGHTS_WORTH_A_GEMV", 2 * INNER * K)
    eager = captured(kind, device, bias=True, laid=False)
    block = captured(kind, device, bias=True, laid=True)
    after = rewritten(block.graph, target, WITHOUT_PRODUCERS)
    with counted_gemvs() as counts:
        (wanted,) = Launched(eager.graph, target).run(*eager.inputs_for(1))
        (found,) = Launched(after, target).run(*block.inputs_for(1))
    # Projections of one input are large enough together: five before, merged to two.
    native = kind == "MXFP8" and target.has_mxfp8_dot
    assert counts == ([] if native else ["gemv_e4m3"] * (5 + 2))
    assert_same_bits(found, wanted)


@contextmanager
def counted_gemvs() -> Iterator[list[str]]:
    """Names of the GEMVs that are launched."""
    names: list[str] = []
    stock = Launch.run

    def run(self: Launch, dependent: bool = False) -> None:
        if self.kernel.__name__.startswith("gemv"):
            names.append(self.kernel.__name__)
        stock(self, dependent)

    with mock.patch.object(Launch, "run", run):
        yield names


# The kernels add the squares of a norm in another order than torch: where the last bit of a norm
# differs, so may a code, by its distance to the next one (2 ** -3 for E4M3, 2 ** -1 for E2M1), and
# with a row's largest element all codes of the row by a little.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "weight-only" not in kind])
def test_norms_and_gates_join_the_quantization(device, kind) -> None:
    target = TARGETS[len(kind) % len(TARGETS)]
    eager = captured(kind, device, bias=False, laid=False)
    block = captured(kind, device, bias=False, laid=True)
    after = rewritten(block.graph, target, FusionOptions(expand=False))
    fused = [name.partition("_quantize")[0] for name in names(after) if "_quantize_" in name]
    assert sorted(fused) == ["add_rms_norm", "add_rms_norm", "gated"]
    (wanted,) = Launched(eager.graph, target).run(*eager.inputs_for(9))
    (found,) = Launched(after, target).run(*block.inputs_for(9))
    off = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    assert (off <= 2.0**-6).all()
    assert torch.equal(found[:, -K:], wanted[:, -K:])  # sums of two are exact
