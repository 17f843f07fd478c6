"""Loading a checkpoint into a module that is not a transformers model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mokernels.checkpoint.audit import audit
from mokernels.checkpoint.plan import CheckpointPlan, LayerPlan
from mokernels.checkpoint.reader import Checkpoint, open_checkpoint
from mokernels.errors import CheckpointError, Finding
from mokernels.layers import (
    StoredSpec,
    attach_kv_scales,
    choose_activation,
    finish_loading,
    make_layer,
)

logger = logging.getLogger("mokernels")


def load_into(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    activations: str = "checkpoint",
    rename: Callable[[str], str] | None = None,
    strict: bool = True,
) -> nn.Module:
    """Load a ModelOpt checkpoint into any module, replacing the ``nn.Linear``s that it quantizes.

    Args:
        module: its parameters may be on the meta device; then they are created on the CPU. The
            others keep their device, and those that are not quantized keep their dtype.
        path: the checkpoint's folder; config.json is only read for its quantization.
        activations: ``"checkpoint"``, ``"16bit"`` or ``"fp8_block"``; see
            :func:`mokernels.from_pretrained`.
        rename: from the name of a tensor in the checkpoint to its name in the module, where they
            differ.
        strict: refuse tensors of the checkpoint that the module lacks, and the reverse.

    Returns:
        The module, changed in place, in the training mode that it had.

    Raises:
        CheckpointError: the checkpoint is broken, or does not fit the module; every problem is
            listed, and the module has not been changed.
        ArgumentError: ``activations`` is unknown or does not fit the checkpoint's format.
    """
    name = rename or (lambda key: key)
    with open_checkpoint(path) as checkpoint:
        report = audit(
            checkpoint, values="scales", linear_names=_linear_names(module, checkpoint, name)
        )
        findings = [*report.errors, *_misfits(module, checkpoint, report.plan, name, strict)]
        if findings:
            raise CheckpointError(checkpoint.path, findings)
        for warning in report.warnings:
            logger.warning("%s", warning)
        _swap(module, report.plan, name, activations)
        _copy(module, checkpoint, name)
    return module


def _linear_names(
    module: nn.Module, checkpoint: Checkpoint, name: Callable[[str], str]
) -> list[str]:
    modules = dict(module.named_modules())
    layers = [key.removesuffix(".weight") for key in checkpoint.tensors if key.endswith(".weight")]
    return [layer for layer in layers if isinstance(modules.get(_module(layer, name)), nn.Linear)]


def _module(layer: str, name: Callable[[str], str]) -> str:
    return name(f"{layer}.weight").removesuffix(".weight")


def _misfits(
    module: nn.Module,
    checkpoint: Checkpoint,
    plan: CheckpointPlan,
    name: Callable[[str], str],
    strict: bool,
) -> list[Finding]:
    """Where the checkpoint and the module do not fit each other."""
    modules = dict(module.named_modules())
    findings = []
    for layer in plan.layers:
        target = modules.get(_module(layer.name, name))
        if isinstance(target, nn.Linear):
            found = f"Linear({target.in_features}, {target.out_features})"
        else:
            found = "no such module" if target is None else type(target).__name__
        wanted = f"Linear({layer.k}, {layer.n})"
        if found != wanted:
            findings.append(_misfit(layer, found, wanted))
    quantized = {key for layer in plan.layers for key in _keys(layer.name, layer.tensors)}
    quantized |= {key for owner, tensors in plan.kv_scales.items() for key in _keys(owner, tensors)}
    layers = {_module(layer.name, name) for layer in plan.layers}
    expected = {
        key: value
        for key, value in module.state_dict().items()
        if key.rpartition(".")[0] not in layers or key.endswith(".bias")
    }
    plain = {name(key): key for key in checkpoint.tensors if key not in quantized}
    findings += _shape_misfits(plain, expected, checkpoint)
    return [*findings, *_strangers(plain, expected, plan, name)] if strict else findings


def _keys(owner: str, tensors: Mapping[str, object]) -> list[str]:
    return [f"{owner}.{leaf}" for leaf in tensors]


def _misfit(layer: LayerPlan, found: str, wanted: str) -> Finding:
    return Finding(
        "layer-not-in-model",
        "the module has no linear layer of that name and size",
        found=found,
        wanted=wanted,
        remedy="Build the module that the checkpoint was made from, or pass rename=.",
        layer=layer.name,
    )


def _shape_misfits(
    plain: Mapping[str, str], expected: Mapping[str, Tensor], checkpoint: Checkpoint
) -> list[Finding]:
    return [
        Finding(
            "tensor-shape",
            "a tensor has not the shape that the module wants",
            found=str(list(checkpoint.tensors[key].shape)),
            wanted=str(list(expected[target].shape)),
            remedy="Build the module that the checkpoint was made from.",
            file=checkpoint.tensors[key].file,
            tensor=key,
        )
        for target, key in plain.items()
        if target in expected and tuple(expected[target].shape) != checkpoint.tensors[key].shape
    ]


def _strangers(
    plain: Mapping[str, str],
    expected: Mapping[str, Tensor],
    plan: CheckpointPlan,
    name: Callable[[str], str],
) -> list[Finding]:
    biases = {name(f"{layer.name}.bias") for layer in plan.layers}
    missing = [key for key in expected if key not in plain and key not in biases]
    missing += [key for key in biases & expected.keys() if key not in plain]
    remedy = "Build the module that the checkpoint was made from, or pass strict=False."
    return [
        *(
            Finding("tensor-missing", "the module wants a tensor that the checkpoint lacks",
                    remedy=remedy, tensor=key)
            for key in sorted(set(missing))
        ),
        *(
            Finding("tensor-unexpected", "the module has no place for a tensor", remedy=remedy,
                    tensor=key)
            for target, key in plain.items()
            if target not in expected
        ),
    ]  # fmt: skip


def _swap(
    module: nn.Module, plan: CheckpointPlan, name: Callable[[str], str], activations: str
) -> None:
    for layer in plan.layers:
        target = _module(layer.name, name)
        specs = {
            leaf: StoredSpec(info.dtype, tuple(info.shape))
            for leaf, info in layer.tensors.items()
            if leaf != "bias"
        }
        activation = choose_activation(
            layer.format,
            activations,
            has_input_scale="input_scale" in specs,
            beside=plan.config.formats,
        )
        linear = module.get_submodule(target)
        assert isinstance(linear, nn.Linear)  # _misfits has looked
        new = make_layer(
            linear, layer.format, tensors=specs, activation=activation, name=layer.name
        )
        module.set_submodule(target, new)
    for owner, tensors in plan.kv_scales.items():
        specs = {leaf: StoredSpec(info.dtype, tuple(info.shape)) for leaf, info in tensors.items()}
        attach_kv_scales(module.get_submodule(_module(owner, name)), specs)


def _copy(module: nn.Module, checkpoint: Checkpoint, name: Callable[[str], str]) -> None:
    """Fill the module tensor by tensor, so that never more than one is there twice."""
    modules = dict(module.named_modules())
    for key in checkpoint.tensors:
        owner, _, leaf = name(key).rpartition(".")
        holder = modules.get(owner)
        current = getattr(holder, leaf, None)
        if holder is not None and isinstance(current, Tensor):
            _assign(holder, leaf, current, checkpoint.tensor(key))
    finish_loading(module)


def _assign(holder: nn.Module, leaf: str, current: Tensor, value: Tensor) -> None:
    if not current.is_meta:
        with torch.no_grad():
            current.copy_(value)
        return
    value = value.to(current.dtype)
    if isinstance(current, nn.Parameter):
        setattr(holder, leaf, nn.Parameter(value, requires_grad=current.requires_grad))
    else:
        holder.register_buffer(leaf, value)
