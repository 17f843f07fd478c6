"""Decoder-like blocks of quantized layers, and a backend that checks a rewrite without compiling.

Code for the CPU takes seconds to compile for every graph. Most of what has to be known about the
pass needs none: the graph that it gets and the graph that it makes of it can be run node by node,
and their results compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from mokernels.compile.fusion import FusionPass
from mokernels.compile.graph import name_of
from mokernels.compile.options import FusionOptions
from mokernels.compile.reports import CompileReport
from mokernels.formats import FORMATS, Activation
from mokernels.layers import QuantizedLinear, finish_loading, make_layer
from tests.support.compare import assert_same_bits
from tests.support.models import INPUT_SCALE, quantized_tensors

CASES: dict[str, tuple[str, Activation | None]] = {
    **{name: (name, None) for name in FORMATS},
    "FP8_PB_WO-fp8_block": ("FP8_PB_WO", Activation.FP8_BLOCK),
    "FP8-16bit": ("FP8", Activation.NONE),
    "NVFP4-16bit": ("NVFP4", Activation.NONE),
    "MXFP8-16bit": ("MXFP8", Activation.NONE),
}
"""Format and activations (None: the format's own) of each way to run a checkpoint."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6


def quantized(
    case: str, n: int, k: int, *, seed: int, bias: torch.dtype | None = None, scale: float = 1.0
) -> QuantizedLinear:
    """A layer [n, k] with random weights; ``scale`` multiplies the calibrated activation scale."""
    format, activation = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()
    scales = (
        {"input_scale": torch.tensor(INPUT_SCALE[format] * scale)} if format in INPUT_SCALE else {}
    )
    float_layer = nn.Linear(
        k, n, bias=bias is not None, dtype=bias or torch.bfloat16, device="meta"
    )
    layer = make_layer(float_layer, FORMATS[format], activation=activation).to_empty(device="cpu")
    for leaf, tensor in quantized_tensors(format, weight, **scales).items():
        getattr(layer, leaf).data = tensor
    if bias is not None:
        layer.bias.data.copy_(torch.randn(n, generator=generator) * 0.1)
    return layer


def _wide_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)


def _llama(x: Tensor, weight: Tensor) -> Tensor:
    return weight * _wide_norm(x).to(x.dtype)


def _gemma(x: Tensor, weight: Tensor) -> Tensor:
    return (_wide_norm(x) * (1.0 + weight.float())).type_as(x)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, EPS)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "llama": _llama,
    "gemma": _gemma,
    "torch": _torch,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
}


class Block(nn.Module):
    """A projection of the input, then a decoder layer without attention: norm, q/k/v, o, norm, MLP.

    Sizes are no powers of two, and not multiples of anything but what the format asks for.

    Args:
        case: of :data:`CASES`.
        norm: of :data:`NORMS`.
        activation: of :data:`ACTIVATIONS`.
        dtype: of norms, biases and input.
        bias: whether the first projection, q, k, v and down have one.
        scales: what multiplies the calibrated activation scales of q, k and v.
    """

    def __init__(
        self,
        case: str,
        norm: str = "llama",
        activation: str = "silu",
        *,
        dtype: torch.dtype = torch.bfloat16,
        bias: bool = False,
        scales: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        step = FORMATS[CASES[case][0]].k_multiple
        self.hidden, half, inner = (3 * step, step // 2, 5 * step) if step > 1 else (131, 17, 75)
        self.norm, self.activation, self.dtype = NORMS[norm], ACTIVATIONS[activation], dtype
        self.norms = nn.ParameterList(
            torch.rand(self.hidden, generator=torch.Generator().manual_seed(i)).to(dtype) + 0.5
            for i in range(2)
        ).requires_grad_(False)
        b = dtype if bias else None
        self.in_proj = quantized(case, self.hidden, self.hidden, seed=7, bias=b)
        self.q_proj = quantized(case, 2 * half, self.hidden, seed=0, bias=b, scale=scales[0])
        self.k_proj = quantized(case, half, self.hidden, seed=1, bias=b, scale=scales[1])
        self.v_proj = quantized(case, half, self.hidden, seed=2, bias=b, scale=scales[2])
        self.o_proj = quantized(case, self.hidden, 2 * half, seed=3)
        self.gate_proj = quantized(case, inner, self.hidden, seed=4)
        self.up_proj = quantized(case, inner, self.hidden, seed=5)
        self.down_proj = quantized(case, self.hidden, inner, seed=6, bias=b)
        finish_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        x = self.in_proj(x)
        h = self.norm(x, self.norms[0])
        x = x + self.o_proj(self.q_proj(h) * torch.cat([self.k_proj(h), self.v_proj(h)], -1))
        h = self.norm(x, self.norms[1])
        return x + self.down_proj(self.activation(self.gate_proj(h)) * self.up_proj(h))

    def input(self, *lead: int, seed: int = 0) -> Tensor:
        """Random activations [*lead, hidden]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*lead, self.hidden, generator=generator).to(self.dtype)


class Checked:
    """A backend for torch.compile: runs each graph before and after the pass and compares the bits.

    The graphs are those that Inductor hands to its post-grad passes, and FX runs them.

    Args:
        options: of the pass.
        compares: whether to compare; what the pass only does on a GPU has the bits of the modules
            on the CPU, not those of Inductor's decompositions (of erf, for one).

    Attributes:
        graphs: how many have been compiled.
        operators: names of our operators in each graph after the pass, in order.
        fusion: the pass; its reports say what it did.
    """

    def __init__(self, options: FusionOptions | None = None, *, compares: bool = True) -> None:
        self.graphs = 0
        self.operators: list[list[str]] = []
        self.compares = compares
        self.fusion = FusionPass(options)

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, inner_compile=self._compile)

    @property
    def report(self) -> CompileReport:
        """What the pass did."""
        return CompileReport(tuple(self.fusion.reports))

    def _compile(self, gm: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        self.graphs += 1
        gm.graph.eliminate_dead_code()
        before = fx.GraphModule(gm, _copied(gm.graph))
        self.fusion(gm.graph)
        gm.recompile()
        self.operators.append([name for node in gm.graph.nodes if (name := name_of(node))])

        def run(args: list[Any]) -> Any:
            results = gm(*args)
            expected = before(*args) if self.compares else results
            args.clear()
            for result, wanted in zip(results, expected, strict=True):
                if isinstance(wanted, Tensor):
                    assert_same_bits(result, wanted)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
