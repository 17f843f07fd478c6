"""The rules on the values of tensors: what no shape and no dtype can show.

Tensors are read in pieces, so that the memory needed does not depend on the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mokernels.checkpoint.header import TensorInfo
from mokernels.checkpoint.plan import CheckpointPlan, join
from mokernels.checkpoint.reader import Checkpoint
from mokernels.errors import Finding, Severity
from mokernels.formats import (
    E4M3,
    E8M0_NAN,
    MXFP8_MAX_EXPONENT,
    NVFP4_MAX_INPUT_SCALE,
    Activation,
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


@dataclass(frozen=True)
class Check:
    """Rules with a quick way to see that none of them is broken.

    Attributes:
        fine: whether a piece of a tensor meets no rule, in one or two passes over it. Block scales
            are a sixteenth of a model, and a load waits for them.
        rules: looked at one by one where ``fine`` is False.
    """

    fine: Callable[[Tensor], bool]
    rules: tuple[_Rule, ...]


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


def _all_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _all_positive(x: Tensor) -> bool:
    # A NaN makes both extremes NaN, and every comparison with it is False.
    low, high = torch.aminmax(x)
    return float(low) > 0 and float(high) < float("inf")


def _all_small_enough(x: Tensor) -> bool:
    return _all_positive(x) and float(x.max()) <= NVFP4_MAX_INPUT_SCALE


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
_BLOCK_CHECK = Check(
    lambda x: int(x.view(torch.uint8).max()) < _E4M3_NAN,
    (
        _Rule("scale-not-finite", "a block scale is NaN", _nan_codes, "E4M3 numbers of at least 0"),
        _Rule(
            "scale-negative",
            "a block scale is negative",
            lambda x: (x.view(torch.uint8) > _E4M3_NAN) & ~_nan_codes(x),
            "E4M3 numbers of at least 0",
        ),
    ),
)
_EXPONENT_CHECK = Check(
    lambda x: int(x.max()) <= MXFP8_MAX_EXPONENT,
    (
        _Rule(
            "exponent-nan",
            "a shared exponent is NaN",
            lambda x: x == E8M0_NAN,
            "bytes from 0 to 254",
        ),
        _Rule(
            "exponent-range",
            "a shared exponent is so large that its weights leave bf16's range",
            lambda x: (x > MXFP8_MAX_EXPONENT) & (x != E8M0_NAN),
            f"bytes from 0 to {MXFP8_MAX_EXPONENT}",
        ),
    ),
)
_LARGE_INPUT_SCALE = _Rule(
    "input-scale-large",
    "the input_scale is so large that ModelOpt's rule for tiny blocks no longer gives zeros",
    lambda x: (x > NVFP4_MAX_INPUT_SCALE) & x.isfinite(),
    f"at most {NVFP4_MAX_INPUT_SCALE:g} (an activation amax of about 112,000)",
    "The calibration of this layer went wrong; calibrate and export the model again.",
)
_CODE_CHECK = Check(
    lambda x: int((x.view(torch.uint8) & _E4M3_NAN).max()) < _E4M3_NAN,
    (
        _Rule(
            "code-nan",
            "the weight holds NaN codes",
            _nan_codes,
            "numbers",
            f"The model was NaN before it was quantized, or the file is damaged. {_EXPORT_AGAIN}",
        ),
    ),
)
_BIAS_CHECK = Check(
    _all_finite,
    (_Rule("bias-not-finite", "the bias is not finite", _not_finite, "finite numbers"),),
)
_PLAIN_CHECK = Check(
    _all_finite,
    (
        _Rule(
            "plain-not-finite",
            "a tensor that is not quantized is not finite",
            _not_finite,
            "finite numbers",
            "The model is loaded as it is; expect NaN where the tensor is used.",
            "warning",
        ),
    ),
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
                check = layer_check(layer.format, leaf, info.dtype)
                yield from _apply(checkpoint, layer.name, leaf, info, check)
        if layer.bias is not None and values == "all" and _holds_floats(layer.bias.dtype):
            yield from _apply(checkpoint, layer.name, "bias", layer.bias, _BIAS_CHECK)
    for module, group in plan.kv_scales.items():
        for leaf, info in group.items():
            yield from _apply(checkpoint, module, leaf, info, _kv_check(leaf, info.dtype))
    if values == "all":
        for name in plan.plain:
            info = checkpoint.tensors[name]
            if _holds_floats(info.dtype):
                module, _, leaf = name.rpartition(".")
                yield from _apply(checkpoint, module, leaf, info, _PLAIN_CHECK)


def layer_check(format: Format, leaf: str, dtype: torch.dtype) -> Check | None:
    """What the values of one tensor of a layer have to be; None if they may be anything."""
    if leaf == "weight":
        return _CODE_CHECK if dtype == E4M3.storage and format.element is E4M3 else None
    if leaf == "weight_scale" and dtype != format.scale_dtype:
        return None
    if dtype == torch.uint8:
        return _EXPONENT_CHECK
    if dtype == torch.float8_e4m3fn:
        return _BLOCK_CHECK
    if dtype != torch.float32:
        return None
    rules = _float_rules(leaf)
    if leaf == "weight_scale" and format.granularity is Granularity.CHANNEL:
        return Check(_all_positive, (*rules[:2], _ZERO_ROW))
    if leaf == "input_scale" and format.activation is Activation.NVFP4:
        return Check(_all_small_enough, (*rules, _LARGE_INPUT_SCALE))
    return Check(_all_positive, rules)


def _holds_floats(dtype: torch.dtype) -> bool:
    return bool(dtype.is_floating_point and dtype.itemsize > 1)


def _kv_check(leaf: str, dtype: torch.dtype) -> Check | None:
    rules = _float_rules(leaf)
    if leaf.endswith("_bias"):
        return Check(_all_finite, rules[:1]) if _holds_floats(dtype) else None
    return Check(_all_positive, rules) if dtype == torch.float32 else None


def _apply(
    checkpoint: Checkpoint, module: str, leaf: str, info: TensorInfo, check: Check | None
) -> Iterator[Finding]:
    """One finding for each rule that some element breaks, with the number and the first of them."""
    if check is None or 0 in info.shape:
        return
    name = join(module, leaf)
    counts = [0] * len(check.rules)
    firsts: list[tuple[tuple[int, ...], float] | None] = [None] * len(check.rules)
    for start, piece in checkpoint.chunks(name):
        if check.fine(piece):
            continue
        for index, rule in enumerate(check.rules):
            bad = rule.bad(piece)
            if bad.any():
                counts[index] += int(bad.sum())
                firsts[index] = firsts[index] or _first(piece, bad, start)
    for rule, count, first in zip(check.rules, counts, firsts, strict=True):
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
    return f"{value:g} at {list(index)}, {count} of {math.prod(info.shape)} elements"
