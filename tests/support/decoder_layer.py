"""Decoder layers of transformers with quantized projections, on a device that is not there.

To be used inside ``fake_cuda``. Nothing has values: what is looked at is what Inductor launches.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mokernels.formats import FORMATS, Activation
from mokernels.layers import Siblings, link_siblings, make_layer
from mokernels.layers.linear import FP8Linear

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
ATTENTION = "mokernels_tests.attention"
"""An operator that Inductor cannot look into, as attention kernels are."""

_LIBRARY = torch.library.Library("mokernels_tests", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("mokernels_tests::attention", lib=_LIBRARY)
def _fake_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, size = q.shape
    return q.new_empty(batch, tokens, heads, size)


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **keywords: Any
) -> tuple[Tensor, None]:
    return torch.ops.mokernels_tests.attention(q, k, v), None


ALL_ATTENTION_FUNCTIONS.register("mokernels_tests", _attention)


class DecoderLayer(nn.Module):
    """One decoder layer of Llama 3.1 8B's size, as ``forward(hidden, cos, sin)``.

    Args:
        architecture: name in transformers: ``"Llama"``, ``"Gemma2"``, ...
        format: of all its linear layers; None for bf16.
        activation: what happens to their inputs; None for what the format asks for.
        siblings: what loading makes of q, k and v, and of gate and up: ``"laid"`` in one buffer, as
            on a GPU; ``"apart"`` with one activation scale, as where weights are sharded; or
            ``"strangers"`` with an activation scale each.
    """

    def __init__(
        self,
        architecture: str,
        format: str | None,
        activation: Activation | None = None,
        *,
        siblings: str = "laid",
    ) -> None:
        super().__init__()
        self.layer = _bf16_layer(architecture)
        if format is not None:
            _quantize(self.layer, format, activation)
            if siblings != "strangers":
                _link(self.layer, laid=siblings == "laid")

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, T, K] to [1, T, K]; cos and sin [1, T, head]."""
        out = self.layer(hidden, position_embeddings=(cos, sin), attention_mask=None)
        return out[0] if isinstance(out, tuple) else out


def hidden_states(tokens: int, *, dynamic: bool = False) -> list[Tensor]:
    """What ``DecoderLayer`` takes, with the number of tokens fixed or free."""
    sizes = (HIDDEN, HEAD, HEAD)
    found = [torch.empty(1, tokens, n, dtype=torch.bfloat16, device="cuda") for n in sizes]
    if dynamic:
        for tensor in found:
            torch._dynamo.mark_dynamic(tensor, 1)
    return found


def _bf16_layer(architecture: str) -> nn.Module:
    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        num_hidden_layers=1,
        pad_token_id=None,
    )
    config._attn_implementation = "mokernels_tests"
    package = getattr(transformers, f"{architecture}Model").__module__
    layer_class = getattr(import_module(package), f"{architecture}DecoderLayer")
    with torch.device("meta"):
        layer: nn.Module = layer_class(config, 0)
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return layer.eval()


def _quantize(layer: nn.Module, format: str, activation: Activation | None) -> None:
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            quantized = make_layer(module, FORMATS[format], activation=activation)
            if isinstance(quantized, FP8Linear) and quantized.input_scale is not None:
                # What refresh() derives from the value of the input_scale.
                quantized.input_multiplier = torch.empty((), device="cuda")
                quantized.input_divisor = torch.empty((), device="cuda")
            layer.set_submodule(name, quantized)


def _link(layer: nn.Module, *, laid: bool) -> None:
    # Fake tensors have no values to compare and are no plain parameters; all else is as it is.
    def refresh(group: Siblings) -> None:
        group.same_input_scale = True
        if laid:
            group.lay_side_by_side()

    with (
        mock.patch.object(Siblings, "refresh", refresh),
        mock.patch("mokernels.layers.siblings._can_lie_side_by_side", return_value=True),
    ):
        link_siblings(layer)
