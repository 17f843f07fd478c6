"""Projections that share an input: q, k and v; gate and up.

They are planned as one GEMM from the moment they are loaded: each is told the N of the group
(``plan_n``), so that one that runs alone adds in the same order as the group. On a GPU their
weights are laid side by side in one buffer, of which their parameters become views; while a model
is compiled the layers pass slices of that buffer to their operators, from which the compile pass
sees that one GEMM will do. Each keeps its own scales: scalars are repeated for each of its rows.

Everything here changes speed only. Names, shapes and bytes of the parameters stay the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mokernels.formats import FP8_BLOCK
from mokernels.layers.linear import QuantizedLinear

NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names under which models keep projections of one input. A name that is no such projection costs
nothing but another plan: operators are merged only where the graph shows one input."""


class Siblings:
    """A group of layers of one format that share an input.

    Args:
        members: two or more, in the order in which they lie side by side.

    Attributes:
        members: the layers.
        same_input_scale: their stored activation scales are equal, so that one quantization serves.
        buffers: what lies side by side, by leaf name; None while every layer has its own.
    """

    def __init__(self, members: Iterable[QuantizedLinear]) -> None:
        self.members = tuple(members)
        self.same_input_scale = False
        self.buffers: dict[str, Tensor] | None = None
        self._laid: tuple[Tensor, ...] = ()
        self._apart = False
        rows = [member.weight.shape[0] for member in self.members]
        self._starts = (0, *accumulate(rows))
        for position, member in enumerate(self.members):
            member.siblings, member.position, member.plan_n = self, position, sum(rows)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold every tensor once: their members have tensors of their own."""
        return {**self.__dict__, "buffers": None, "_laid": ()}

    def compare_input_scales(self) -> None:
        """Find out whether one quantization of the input serves all members."""
        scales = [getattr(member, "input_scale", None) for member in self.members]
        if all(scale is None for scale in scales):
            self.same_input_scale = True
        else:
            known = [float(s) for s in scales if isinstance(s, Tensor) and not s.is_meta]
            self.same_input_scale = len(known) == len(scales) and len(set(known)) == 1

    def operand(self, member: QuantizedLinear, leaf: str, own: Tensor | None) -> Tensor | None:
        """``own``, or the same as rows of the group's buffer; for use while compiling."""
        if self.buffers is None or leaf not in self.buffers:
            return own
        # Tools that replace a parameter (offload, sharding) are obeyed.
        if member._parameters["weight"] is not self._laid[member.position]:
            return own
        buffer = self.buffers[leaf]
        start, stop = self._starts[member.position : member.position + 2]
        if _has_square_blocks(buffer):
            start, stop = start // FP8_BLOCK, -(-stop // FP8_BLOCK)
        return buffer.narrow(0, start, stop - start)

    def input_tensor(self, member: QuantizedLinear, leaf: str) -> Tensor | None:
        """An activation scale: the same tensor for all members, if they agree on its value."""
        own: Tensor | None = getattr(member, leaf)
        shared: Tensor | None = getattr(self.members[0], leaf)
        if not self.same_input_scale or shared is None or own is None:
            return own
        return shared if shared.device == own.device else own

    def settle(self) -> None:
        """Lay the weights side by side if they have come to one GPU, or notice that they left."""
        if self.buffers is not None and not all(map(self._is_in_place, self.members)):
            self.buffers, self._laid = None, ()
        on_gpu = all(member.weight.device.type not in ("cpu", "meta") for member in self.members)
        if self.buffers is None and on_gpu and not self._apart:
            self.lay_side_by_side()

    def refresh(self) -> None:
        """Take over what has changed in the members' tensors."""
        self.compare_input_scales()
        self.settle()
        for leaf, buffer in (self.buffers or {}).items():
            parts = [getattr(member, leaf) for member in self.members]
            if parts[0].dim() == 0:
                buffer.copy_(self._repeated(parts))

    def lay_side_by_side(self) -> bool:
        """Move the members' tensors into common buffers; returns whether they can lie so."""
        if not _can_lie_side_by_side(self.members):
            return False
        first = self.members[0]
        leaves = [leaf for leaf in first.stored_leaves if leaf != "input_scale"]
        leaves += [] if first.bias is None else ["bias"]
        buffers = {}
        for leaf in leaves:
            parts = [getattr(member, leaf) for member in self.members]
            buffers[leaf] = self._repeated(parts) if parts[0].dim() == 0 else _moved(parts)
            # As weights have: sizes that are numbers in every graph, and a fixed address, so that
            # CUDA graphs need not copy them.
            torch._dynamo.mark_static(buffers[leaf])
            torch._dynamo.mark_static_address(buffers[leaf], guard=False)
        self.buffers = buffers
        self._laid = tuple(member._parameters["weight"] for member in self.members)  # type: ignore[misc]
        return True

    def separate(self) -> None:
        """Give every member tensors of its own again, and keep them apart."""
        self._apart = True
        if self.buffers is None:
            return
        self.buffers, self._laid = None, ()
        for member in self.members:
            for parameter in member._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.clone()

    def _is_in_place(self, member: QuantizedLinear) -> bool:
        if self.buffers is None or member._parameters["weight"] is not self._laid[member.position]:
            return False
        rows = self.buffers["weight"][self._starts[member.position] :]
        here = rows.device == member.weight.device
        return here and bool(rows.data_ptr() == member.weight.data_ptr())

    def _repeated(self, parts: list[Tensor]) -> Tensor:
        """Scalars as a vector: each for the rows of its member."""
        rows = [member.weight.shape[0] for member in self.members]
        return torch.cat([p.detach().expand(n) for p, n in zip(parts, rows, strict=True)])


def link_siblings(model: nn.Module) -> list[Siblings]:
    """Find projections that share an input, and plan each group as one.

    Call it once the tensors are loaded. Layers that are linked already are left alone.

    Args:
        model: any module; children of one parent with one of the names in :data:`NAMES` are a
            group if they agree in format, activations, K and whether they have a bias.

    Returns:
        The new groups.
    """
    linked = []
    for parent in list(model.modules()):
        for names in NAMES:
            children = [getattr(parent, name, None) for name in names]
            layers = [c for c in children if isinstance(c, QuantizedLinear) and c.siblings is None]
            for group in _alike(layers):
                linked.append(Siblings(group))
                linked[-1].refresh()
    return linked


def separate_projections(model: nn.Module) -> None:
    """Give all projections of a model tensors of their own, before a tool shards or moves them."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.siblings is not None:
            module.siblings.separate()


def _alike(layers: list[QuantizedLinear]) -> Iterator[list[QuantizedLinear]]:
    """Layers that one GEMM could compute, two or more."""
    groups: dict[tuple[object, ...], list[QuantizedLinear]] = {}
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.dtype
        key = (layer.format, layer.activation, layer.weight.shape[1:], bias)
        groups.setdefault(key, []).append(layer)
    return (group for group in groups.values() if len(group) > 1)


def _can_lie_side_by_side(members: tuple[QuantizedLinear, ...]) -> bool:
    """Whole, resident weights on one device, with scales whose rows can be put together."""
    tensors = [t for m in members for t in m._parameters.values() if t is not None]
    devices = {tensor.device for tensor in tensors}
    whole = all(m.weight.shape[0] == m.out_features for m in members)
    if len(devices) != 1 or devices.pop().type == "meta" or not whole:
        return False
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return False  # sharded by something (DTensor)
    ranks = {tuple(getattr(m, leaf).dim() for leaf in m.stored_leaves) for m in members}
    blocks = _has_square_blocks(_matrix(members[0].weight_scale))
    full_blocks = all(m.weight.shape[0] % FP8_BLOCK == 0 for m in members[:-1])
    return len(ranks) == 1 and (full_blocks or not blocks)


def _moved(parts: list[Tensor]) -> Tensor:
    """The parts one below the other in a new tensor, of which they become views."""
    with torch.no_grad():
        buffer = torch.cat([_matrix(part).detach() for part in parts])
    start = 0
    for part in parts:
        rows = buffer[start : start + part.shape[0]]
        part.data = rows.view(part.shape)
        start += part.shape[0]
    return buffer


def _matrix(tensor: Tensor) -> Tensor:
    """ModelOpt's [N / 128, 1, K / 128, 1] as [N / 128, K / 128]; other ranks as they are."""
    return tensor.squeeze(3).squeeze(1) if tensor.dim() == 4 else tensor


def _has_square_blocks(scale: Tensor) -> bool:
    """fp32 scales of rank 2 belong to 128x128 blocks."""
    return bool(scale.dim() == 2 and scale.dtype == torch.float32)
