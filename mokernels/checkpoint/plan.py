"""From the tensors that are there and the configuration to what each layer is.

The tensors decide what is quantized: a module with a weight scale is, whatever the configuration
says. The configuration decides what the tensors cannot tell, the algorithm. Whether the two agree
is the business of :mod:`mokernels.checkpoint.audit`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from mokernels.checkpoint.header import TensorInfo
from mokernels.checkpoint.schema import QuantizationConfig
from mokernels.formats import (
    FOREIGN_LEAVES,
    FORMATS,
    FUSED_SUFFIXES,
    KV_CACHE_LEAVES,
    SCALE_LEAVES,
    Activation,
    Format,
    StoredTensor,
)

Group = Mapping[str, TensorInfo]
"""The tensors of one module, by leaf."""

FLOAT8_DTYPES = frozenset(
    {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)
_CODE_DTYPES = FLOAT8_DTYPES | {torch.uint8, torch.int8}
_DOTTED_LEAVES = tuple(f".{leaf}" for leaf in FOREIGN_LEAVES if "." in leaf)


@dataclass(frozen=True)
class LayerPlan:
    """One quantized linear layer.

    Attributes:
        name: of the module, as the checkpoint calls it.
        format: how its weight is stored.
        n: output features.
        k: input features.
        tensors: what is stored of the quantized weight, by leaf, the bias aside.
        bias: the bias, or None.
    """

    name: str
    format: Format
    n: int
    k: int
    tensors: Group
    bias: TensorInfo | None = None

    @property
    def activation(self) -> Activation:
        """What the checkpoint asks for: an FP8 layer without input_scale quantizes per token."""
        asked = self.format.activation
        if asked is Activation.FP8_STATIC and "input_scale" not in self.tensors:
            return Activation.FP8_PER_TOKEN
        return asked

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, the bias included."""
        bias = self.bias.nbytes if self.bias else 0
        return sum(info.nbytes for info in self.tensors.values()) + bias


@dataclass(frozen=True)
class CheckpointPlan:
    """What a checkpoint holds.

    Attributes:
        config: what its JSON files say.
        layers: the quantized linear layers, in natural order of their names.
        kv_scales: scales (and biases) of a quantized KV cache: projection -> leaf -> tensor.
        plain: names of all other tensors, which are loaded as they are.
    """

    config: QuantizationConfig
    layers: tuple[LayerPlan, ...] = ()
    kv_scales: Mapping[str, Group] = field(default_factory=lambda: MappingProxyType({}))
    plain: tuple[str, ...] = ()


def make_plan(groups: Mapping[str, Group], config: QuantizationConfig) -> CheckpointPlan:
    """Plan a checkpoint; a module whose tensors make no layer is left out (the audit names it).

    Args:
        groups: the tensors of every module, from :func:`group_modules`.
        config: what the JSON files say.
    """
    layers: list[LayerPlan] = []
    kv_scales: dict[str, Group] = {}
    plain: list[str] = []
    for module, group in groups.items():
        cache, rest = split_kv_scales(module, group)
        if cache:
            kv_scales[module] = MappingProxyType(cache)
        layer = _layer(module, rest, config.format_of(module))
        if layer:
            layers.append(layer)
        taken = {"bias", *layer.tensors} if layer else set()
        plain += [join(module, leaf) for leaf in rest if leaf not in taken]
    return CheckpointPlan(config, tuple(layers), MappingProxyType(kv_scales), tuple(plain))


def group_modules(tensors: Mapping[str, TensorInfo]) -> dict[str, Group]:
    """Module name to its tensors by leaf, in natural order ("layers.2" before "layers.10")."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name in sorted(tensors):
        module, leaf = split(name)
        groups.setdefault(module, {})[leaf] = tensors[name]
    return {module: MappingProxyType(groups[module]) for module in sorted(groups, key=_natural)}


def split(name: str) -> tuple[str, str]:
    """Module and leaf of a tensor's name; some foreign leaves have a dot of their own."""
    module, _, leaf = name.rpartition(".")
    if name.endswith(_DOTTED_LEAVES):
        module, _, quantizer = module.rpartition(".")
        leaf = f"{quantizer}.{leaf}"
    return module, leaf


def join(module: str, leaf: str) -> str:
    """Inverse of :func:`split`."""
    return f"{module}.{leaf}" if module else leaf


def split_kv_scales(
    module: str, group: Group
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """The KV-cache tensors of a key or value projection, and its other tensors."""
    leaves = KV_CACHE_LEAVES.get(module.rpartition(".")[2], ())
    cache = {leaf: info for leaf, info in group.items() if leaf in leaves}
    return cache, {leaf: info for leaf, info in group.items() if leaf not in leaves}


def is_quantized(group: Group) -> bool:
    """Whether a module's tensors show that its weight is no plain weight."""
    weight = group.get("weight")
    return (weight is not None and weight.dtype in _CODE_DTYPES) or any(
        leaf in FOREIGN_LEAVES or leaf in SCALE_LEAVES for leaf in group
    )


def shows_codes(name: str, info: TensorInfo) -> bool:
    """Whether one tensor by itself shows that a checkpoint is quantized."""
    leaf = split(name)[1]
    return (
        info.dtype in FLOAT8_DTYPES
        or leaf in ("weight_scale", "weight_scale_2")
        or leaf.endswith(FUSED_SUFFIXES)
    )


def weight_size(format: Format, weight: TensorInfo) -> tuple[int, int] | None:
    """(N, K) of a stored weight, or None if it is no matrix."""
    if len(weight.shape) != 2:
        return None
    return weight.shape[0], weight.shape[1] * format.element.per_item


def fits(format: Format, group: Group) -> bool:
    """Whether a module's tensors are just what a layer of ``format`` stores."""
    size = weight_size(format, group["weight"]) if "weight" in group else None
    if size is None or size[1] % format.k_multiple:
        return False
    stored = {spec.leaf: spec for spec in format.tensors(*size)}
    if not group.keys() <= {*stored, "bias"}:
        return False
    return all(_is(spec, group.get(leaf)) for leaf, spec in stored.items())


def evident_formats(group: Group) -> tuple[Format, ...]:
    """Every format that a module's tensors fit, going by the tensors alone."""
    return tuple(row for row in FORMATS.values() if fits(row, group))


def _is(spec: StoredTensor, info: TensorInfo | None) -> bool:
    if info is None:
        return not spec.required
    return info.dtype == spec.dtype and info.shape in spec.shapes


def _layer(module: str, group: Group, format: Format | None) -> LayerPlan | None:
    if format is None or not is_quantized(group) or "weight" not in group:
        return None
    size = weight_size(format, group["weight"])
    if size is None:
        return None
    leaves = [spec.leaf for spec in format.tensors(*size) if spec.leaf in group]
    tensors = MappingProxyType({leaf: group[leaf] for leaf in leaves})
    return LayerPlan(module, format, *size, tensors, group.get("bias"))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that compares runs of digits as numbers (of any length, so by length first)."""
    parts = re.split(r"([0-9]+)", name)
    numbers = [part.lstrip("0") for part in parts[1::2]] + [""]
    pairs = zip(parts[0::2], numbers, strict=True)
    return [key for text, number in pairs for key in ((-1, text), (len(number), number))]
