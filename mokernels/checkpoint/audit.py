"""The audit of a checkpoint: is every tensor of every quantized layer what it has to be?

A wrong scale gives wrong text and no error, so everything is looked at before anything is loaded.
Each rule has a short stable name. The rules on values are in :mod:`mokernels.checkpoint.values`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Literal, get_args

from mokernels.checkpoint.coverage import check_coverage
from mokernels.checkpoint.files import checked_folder
from mokernels.checkpoint.listed import check_group_sizes
from mokernels.checkpoint.modules import (
    EXPORT_AGAIN,
    check_kv_scales,
    check_module,
)
from mokernels.checkpoint.plan import (
    CheckpointPlan,
    Group,
    evident_formats,
    fits,
    group_modules,
    is_quantized,
    join,
    make_plan,
    split_kv_scales,
)
from mokernels.checkpoint.reader import Checkpoint, open_checkpoint
from mokernels.checkpoint.report import Report
from mokernels.checkpoint.schema import QuantizationConfig
from mokernels.checkpoint.values import check_values
from mokernels.errors import ArgumentError, CheckpointError, Finding
from mokernels.formats import KV_CACHE_FORMATS, Activation

Values = Literal["all", "scales", "none"]


def check(path: str | os.PathLike[str], *, values: Values = "all") -> Report:
    """Audit a checkpoint folder: no GPU, no model class, one piece of a tensor in memory at a time.

    Args:
        path: the folder.
        values: ``"all"`` reads every tensor, ``"scales"`` only the scales, ``"none"`` only the
            headers.

    Returns:
        The report; broken files and unsupported formats are errors in it.

    Raises:
        CheckpointError: there is no folder at ``path``.
        ArgumentError: ``values`` is none of the three.
    """
    _check_choice(values)
    folder = checked_folder(path)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        return Report(str(folder), error.findings, CheckpointPlan(QuantizationConfig()), values)
    with checkpoint:
        return audit(checkpoint, values=values)


def audit(
    checkpoint: Checkpoint,
    *,
    values: Values = "scales",
    linear_names: Collection[str] | None = None,
) -> Report:
    """Audit an open checkpoint.

    Args:
        checkpoint: as :func:`open_checkpoint` gave it.
        values: see :func:`check`.
        linear_names: the checkpoint's names of the modules that are ``nn.Linear`` in the model;
            each has to be quantized or excluded. Without them that is judged by name and shape.

    Raises:
        ArgumentError: ``values`` is none of the three.
    """
    _check_choice(values)
    config = checkpoint.config
    groups = group_modules(checkpoint.tensors)
    plan = make_plan(groups, config)
    findings = [*config.findings, *_check_config(config, groups)]
    for module, group in groups.items():
        cache, rest = split_kv_scales(module, group)
        findings += check_kv_scales(module, cache)
        findings += check_module(module, rest, config)
    findings += _check_input_scales(plan)
    findings += check_coverage(groups, config, linear_names)
    findings += check_values(checkpoint, plan, values)
    return Report(
        path=str(checkpoint.path),
        findings=tuple(findings),
        plan=plan,
        values=values,
        files=checkpoint.files,
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
    )


def _check_choice(values: str) -> None:
    if values not in get_args(Values):
        raise ArgumentError(f"values is {values!r}, wanted one of {', '.join(get_args(Values))}.")


def _check_config(config: QuantizationConfig, groups: dict[str, Group]) -> Iterator[Finding]:
    """The configuration against the checkpoint as a whole."""
    quantized = [module for module, group in groups.items() if is_quantized(group)]
    file = config.files[0] if config.files else None
    if quantized and not config.formats:
        rows = evident_formats(groups[quantized[0]])
        guess = f" They look like {' or '.join(row.name for row in rows)}." if rows else ""
        yield Finding(
            "config-missing" if file is None else "config-contradicts-tensors",
            "the checkpoint holds quantized weights, and nothing says which algorithm made them",
            found=f"{len(quantized)} quantized modules",
            wanted="a quant_algo in hf_quant_config.json or config.json",
            remedy=f"Loaded as plain weights they would give garbage.{guess} {EXPORT_AGAIN}",
            file=file,
            layer=quantized[0],
        )
    elif not quantized and config.formats:
        yield Finding(
            "nothing-quantized",
            "the configuration names an algorithm and no module is quantized",
            found=f"{config.algorithm} and no weight_scale",
            wanted="quantized layers, or quant_algo null",
            remedy=EXPORT_AGAIN,
            file=file,
        )
    elif not quantized and file is None:
        yield Finding(
            "not-quantized",
            "this is not a quantized checkpoint",
            found="no quantization in the JSON files and no scales",
            remedy="The weights are loaded as they are.",
            severity="warning",
        )
    yield from check_group_sizes(config)
    if config.kv_cache and config.kv_cache not in KV_CACHE_FORMATS:
        yield Finding(
            "kv-cache-unknown",
            "the algorithm of the KV cache is unknown",
            found=config.kv_cache,
            wanted=f"one of {', '.join(KV_CACHE_FORMATS)}",
            remedy="The cache stays in the model's dtype.",
            file=file,
            severity="warning",
        )


def _check_input_scales(plan: CheckpointPlan) -> Iterator[Finding]:
    """FP8: all layers have an input_scale, or none; a part of them is a damaged checkpoint."""
    static = [
        layer
        for layer in plan.layers
        if layer.format.activation is Activation.FP8_STATIC and fits(layer.format, layer.tensors)
    ]
    without = [layer for layer in static if "input_scale" not in layer.tensors]
    if without and len(without) == len(static):
        yield Finding(
            "input-scale-absent",
            "no FP8 layer has an input_scale",
            found=f"{len(static)} without",
            wanted="calibrated activation scales",
            remedy="Activations are quantized with one dynamic scale per token instead.",
            severity="warning",
        )
        return
    for layer in without:
        yield Finding(
            "input-scale-partial",
            "the layer has no input_scale, and other FP8 layers of the checkpoint have one",
            found=f"{len(without)} of {len(static)} FP8 layers without",
            wanted=repr(join(layer.name, "input_scale")),
            remedy=f"A guessed scale gives wrong numbers. {EXPORT_AGAIN}",
            file=layer.tensors["weight"].file,
            layer=layer.name,
        )
