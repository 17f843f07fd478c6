"""The rules on the values of tensors: what no shape and no dtype can show.

Tensors are read in pieces, so that the memory needed does not depend on the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mokernels.checkpoint.header import TensorInfo
from mokernels.checkpoint.plan import CheckpointPlan, LayerPlan, join
from mokernels.checkpoint.reader import Checkpoint
from mokernels.errors import Finding, Severity
from mokernels.formats import (
    E4M3,
    E8M0_NAN,
    MXFP8_MAX_EXPONENT,
    NVFP4_MAX_INPUT_SCALE,
    Format,
    Granularity,
)

_E4M3_NAN = 0x7F
"""Byte of E4M3's NaN without its sign, and the largest byte of a value without a sign."""
_EXPORT_AGAIN = "Export the model again with nvidia-modelopt."


@dataclass(frozen=True)
class _Rule:
    """A test that no element of a tensor may meet.

    Attributes:
        name: of the rule.
        what: the problem as a clause.
        bad: elements of a piece of the tensor to a bool tensor of its shape.
        wanted: what a correct tensor holds.
        remedy: what the user can do.
        severity: of the finding.
    """

    name: str
    what: str
    bad: Callable[[Tensor], Tensor]
    wanted: str
    remedy: str = _EXPORT_AGAIN
    severity: Severity = "error"


def _float_rules(leaf: str) -> tuple[_Rule, ...]:
    """For fp32 scales."""
    wanted = "finite numbers above 0"
    return (
        _Rule("scale-not-finite", f"the {leaf} is not finite", _not_finite, wanted),
        _Rule("scale-negative", f"the {leaf} is negative", lambda x: x < 0, wanted),
        _Rule(
            "scale-zero",
            f"the {leaf} is zero",
            lambda x: x == 0,
            wanted,
            "A zero scale wipes the layer out, and is written for a layer that saw no data or is "
            f"all zero. {_EXPORT_AGAIN}",
        ),
    )


def _not_finite(x: Tensor) -> Tensor:
    return ~x.isfinite()


def _nan_codes(x: Tensor) -> Tensor:
    return (x.view(torch.uint8) & _E4M3_NAN) == _E4M3_NAN


_ZERO_ROW = _Rule(
    "zero-row",
    "the scale of an output channel is zero",
    lambda x: x == 0,
    "finite numbers above 0",
    "ModelOpt's exporter writes scale 0 and NaN codes for a channel whose weights are all zero. "
    "Remove the channel, give it a tiny weight and export again, or quantize with mokernels.",
)
_BLOCK_RULES = (
    _Rule("scale-not-finite", "a block scale is NaN", _nan_codes, "E4M3 numbers of at least 0"),
    _Rule(
        "scale-negative",
        "a block scale is negative",
        lambda x: (x.view(torch.uint8) > _E4M3_NAN) & ~_nan_codes(x),
        "E4M3 numbers of at least 0",
    ),
)
_EXPONENT_RULES = (
    _Rule(
        "exponent-nan", "a shared exponent is NaN", lambda x: x == E8M0_NAN, "bytes from 0 to 254"
    ),
    _Rule(
        "exponent-range",
        "a shared exponent is so large that its weights leave bf16's range",
        lambda x: (x > MXFP8_MAX_EXPONENT) & (x != E8M0_NAN),
        f"bytes from 0 to {MXFP8_MAX_EXPONENT}",
    ),
)
_LARGE_INPUT_SCALE = _Rule(
    "input-scale-large",
    "the input_scale is so large that ModelOpt's rule for tiny blocks no longer gives zeros",
    lambda x: (x > NVFP4_MAX_INPUT_SCALE) & x.isfinite(),
    f"at most {NVFP4_MAX_INPUT_SCALE:g} (an activation amax of about 112,000)",
    "The calibration of this layer went wrong; calibrate and export the model again.",
)
_NAN_CODES = _Rule(
    "code-nan",
    "the weight holds NaN codes",
    _nan_codes,
    "numbers",
    f"The model was NaN before it was quantized, or the file is damaged. {_EXPORT_AGAIN}",
)
_BIAS_RULE = _Rule("bias-not-finite", "the bias is not finite", _not_finite, "finite numbers")
_PLAIN_RULE = _Rule(
    "plain-not-finite",
    "a tensor that is not quantized is not finite",
    _not_finite,
    "finite numbers",
    "The model is loaded as it is; expect NaN where the tensor is used.",
    "warning",
)


def check_values(checkpoint: Checkpoint, plan: CheckpointPlan, values: str) -> Iterator[Finding]:
    """Check the scales (``values`` is "scales"), everything ("all") or nothing ("none").

    A tensor whose dtype is not the format's has been reported and is skipped.
    """
    if values == "none":
        return
    for layer in plan.layers:
        for leaf, info in layer.tensors.items():
            if leaf != "weight" or values == "all":
                rules = _layer_rules(layer.format, leaf, info)
                yield from _apply(checkpoint, layer.name, leaf, info, rules)
        if layer.bias is not None and values == "all":
            yield from _apply(checkpoint, layer.name, "bias", layer.bias, _plain(layer, _BIAS_RULE))
    for module, group in plan.kv_scales.items():
        for leaf, info in group.items():
            yield from _apply(checkpoint, module, leaf, info, _kv_rules(leaf, info))
    if values == "all":
        for name in plan.plain:
            info = checkpoint.tensors[name]
            if info.dtype.is_floating_point and info.dtype.itemsize > 1:
                module, _, leaf = name.rpartition(".")
                yield from _apply(checkpoint, module, leaf, info, (_PLAIN_RULE,))


def _layer_rules(format: Format, leaf: str, info: TensorInfo) -> tuple[_Rule, ...]:
    if leaf == "weight":
        return (_NAN_CODES,) if info.dtype == E4M3.storage and format.element is E4M3 else ()
    if leaf == "weight_scale" and info.dtype != format.scale_dtype:
        return ()
    if info.dtype == torch.uint8:
        return _EXPONENT_RULES
    if info.dtype == torch.float8_e4m3fn:
        return _BLOCK_RULES
    if info.dtype != torch.float32:
        return ()
    rules = _float_rules(leaf)
    if leaf == "weight_scale" and format.granularity is Granularity.CHANNEL:
        return (*rules[:2], _ZERO_ROW)
    if leaf == "input_scale" and format.scale_dtype == torch.float8_e4m3fn:
        return (*rules, _LARGE_INPUT_SCALE)
    return rules


def _plain(layer: LayerPlan, rule: _Rule) -> tuple[_Rule, ...]:
    dtype = layer.bias.dtype if layer.bias else torch.bool
    return (rule,) if dtype.is_floating_point and dtype.itemsize > 1 else ()


def _kv_rules(leaf: str, info: TensorInfo) -> tuple[_Rule, ...]:
    if leaf.endswith("_bias"):
        usable = info.dtype.is_floating_point and info.dtype.itemsize > 1
        return (_float_rules(leaf)[0],) if usable else ()
    return _float_rules(leaf) if info.dtype == torch.float32 else ()


def _apply(
    checkpoint: Checkpoint, module: str, leaf: str, info: TensorInfo, rules: tuple[_Rule, ...]
) -> Iterator[Finding]:
    """One finding for each rule that some element breaks, with the number and the first of them."""
    if not rules or 0 in info.shape:
        return
    name = join(module, leaf)
    counts = [0] * len(rules)
    firsts: list[tuple[tuple[int, ...], float] | None] = [None] * len(rules)
    for start, piece in checkpoint.chunks(name):
        for index, rule in enumerate(rules):
            bad = rule.bad(piece)
            if not bad.any():
                continue
            counts[index] += int(bad.sum())
            firsts[index] = firsts[index] or _first(piece, bad, start)
    for rule, count, first in zip(rules, counts, firsts, strict=True):
        if first is not None:
            yield Finding(
                rule.name,
                rule.what,
                found=_describe(info, count, *first),
                wanted=rule.wanted,
                remedy=rule.remedy,
                file=info.file,
                tensor=name,
                layer=module or None,
                severity=rule.severity,
            )


def _first(piece: Tensor, bad: Tensor, start: int) -> tuple[tuple[int, ...], float]:
    """Index in the whole tensor, and value, of the first bad element of a piece."""
    flat = int(bad.reshape(-1).to(torch.uint8).argmax())
    value = float(piece.reshape(-1)[flat].float())
    index: list[int] = []
    for size in reversed(piece.shape):
        flat, position = divmod(flat, size)
        index.insert(0, position)
    if index:
        index[0] += start
    return tuple(index), value


def _describe(info: TensorInfo, count: int, index: tuple[int, ...], value: float) -> str:
    if not index:
        return f"{value:g}"
    total = 1
    for size in info.shape:
        total *= size
    return f"{value:g} at {list(index)}, {count} of {total} elements"
