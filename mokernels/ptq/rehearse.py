"""Before hours of calibration: everything that would make them worthless in the end."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mokernels.checkpoint.excluded import summarize_excluded
from mokernels.checkpoint.schema import matches
from mokernels.errors import ArgumentError, CalibrationError
from mokernels.formats import Format
from mokernels.layers import FakeQuantizedLinear, QuantizedLinear
from mokernels.ptq.config import QuantizeConfig
from mokernels.ptq.convert import fused_groups

logger = logging.getLogger("mokernels")

_CONVERTIBLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What ModelOpt gives quantizers, and names among the excluded where they are off."""


def choose_layers(model: nn.Module, config: QuantizeConfig) -> dict[str, Format]:
    """The format of every linear layer that is to be quantized, in the model's order.

    Raises:
        ArgumentError: the model is quantized already, no layer would be, an expert's weights are
            no linear layer, or a layer's input features do not fit its format. All layers that do
            not fit are named.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ArgumentError(
            "The model holds quantized layers already. Load the original model and quantize that: "
            "what rounding took away does not come back."
        )
    if any(isinstance(module, FakeQuantizedLinear) for module in model.modules()):
        raise ArgumentError(
            "The model holds fake-quantized layers already. mokernels.convert packs them with the "
            "weights that they have now; to choose another format, load the original model."
        )
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    shared, needed = _weights_shared_with_embeddings(model), _needed_as_they_are(model, linears)
    chosen = {}
    for name, linear in linears.items():
        row = config.choose(name)
        if row is not None and id(linear.weight) not in shared and name not in needed:
            chosen[name] = row
    if not chosen:
        raise _nothing_to_quantize(model, len(linears))
    left = [name for name in needed if config.choose(name) is not None]
    if left:
        logger.warning(
            "%d layers stay plain, since %s reads their weights itself, wants them in fp32 or lets "
            "them compute something else: %s%s",
            len(left),
            type(model).__name__,
            ", ".join(left[:3]),
            ", ..." if len(left) > 3 else "",
        )
    _check_experts(model, config)
    _check_projections(chosen)
    check_features({name: linears[name].in_features for name in chosen}, chosen)
    return chosen


def excluded_patterns(model: nn.Module, chosen: Mapping[str, Format]) -> list[str]:
    """What the checkpoint will list as not quantized.

    Raises:
        ArgumentError: no list of patterns tells the quantized modules from the others.
    """
    plain = [
        name
        for name, module in model.named_modules()
        if _is_convertible(module) and name not in chosen
    ]
    return patterns_of([*plain, *_routers(model, chosen)], chosen)


def _is_convertible(module: nn.Module) -> bool:
    """Whether it is one of these kinds, and computes what they do: Gemma's embedding scales too."""
    kind = next((kind for kind in _CONVERTIBLE if isinstance(module, kind)), None)
    return kind is not None and type(module).forward is kind.forward


def _routers(model: nn.Module, chosen: Mapping[str, Format]) -> list[str]:
    """Routers that are no linear layers: servers would take what is not listed for quantized."""
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "experts"):
            continue
        for leaf in ("gate", "router", "shared_expert_gate"):
            weight = getattr(getattr(module, leaf, None), "weight", None)
            if isinstance(weight, torch.Tensor):
                found.append(f"{name}.{leaf}" if name else leaf)
    return [name for name in found if name not in chosen]


def patterns_of(plain: Iterable[str], chosen: Mapping[str, Format]) -> list[str]:
    """The same from the names of the plain modules; raises as :func:`excluded_patterns` does."""
    patterns = summarize_excluded(plain, list(chosen))
    wrong = [name for name in chosen if matches(name, patterns)]
    if wrong:
        raise ArgumentError(
            f"The layer {wrong[0]!r} would be listed as not quantized, since its name matches a "
            f"pattern of the excluded modules. Rename it, or exclude it too."
        )
    return patterns


def check_weights(model: nn.Module, chosen: Mapping[str, Format]) -> None:
    """Refuse weights of which no scale can be made; those that are offloaded are checked later.

    Raises:
        CalibrationError: a weight holds NaN or infinities, or is empty.
    """
    for name in chosen:
        weight = model.get_submodule(name).weight
        if not isinstance(weight, torch.Tensor) or weight.is_meta:
            continue
        if weight.numel() == 0 or not bool(weight.isfinite().all()):
            raise no_scale(name)


def no_scale(name: str) -> CalibrationError:
    """The error for a layer whose weight is empty or not finite."""
    return CalibrationError(
        f"The weight of the layer {name!r} is empty or holds NaN or infinities; such a "
        "weight has no scale. Repair the model, or exclude the layer."
    )


def check_destination(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Refuse a folder that could not be written in the end.

    Args:
        folder: where the checkpoint is to go.
        nbytes: how large it will be, about.

    Raises:
        ArgumentError: the folder exists and holds something, its parent does not exist or cannot
            be written, or the disk has not the room.
    """
    target = Path(folder).absolute()
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ArgumentError(
            f"The folder {str(folder)!r} exists and is not empty; nothing is overwritten. Choose "
            "another name, or remove it."
        )
    parent = target.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArgumentError(
            f"The folder {str(folder)!r} cannot be made: {str(parent)!r} is no folder that can be "
            "written to. Create it, or choose another place."
        )
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ArgumentError(
            f"The disk of {str(parent)!r} has {free / 1e9:.1f} GB left, wanted about "
            f"{nbytes / 1e9:.1f} GB for the checkpoint. Make room, or choose another disk."
        )


def checkpoint_nbytes(model: nn.Module, chosen: Mapping[str, Format]) -> int:
    """About how many bytes the checkpoint will have."""
    total, seen = 0, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        row = chosen.get(name.removesuffix(".weight"))
        if row is None or not name.endswith(".weight"):
            total += tensor.nbytes
            continue
        n, k = tensor.shape
        for spec in row.tensors(n, k):
            shape = torch.Size(spec.shapes[0])
            total += shape.numel() * spec.dtype.itemsize
    return total


def _nothing_to_quantize(model: nn.Module, linears: int) -> ArgumentError:
    text = f"Nothing of {type(model).__name__} would be quantized: "
    transposed = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    if transposed:
        return ArgumentError(
            f"{text}its {len(transposed)} layers like {transposed[0]!r} are transformers' Conv1D, "
            "whose weights are stored as [K, N], where ModelOpt's formats have [N, K]. Models of "
            "nn.Linear layers can be quantized."
        )
    return ArgumentError(
        f"{text}none of its {linears} linear layers is left by the configuration and the "
        "exclusions. Exclude less."
    )


def _needed_as_they_are(model: nn.Module, linears: Mapping[str, nn.Linear]) -> list[str]:
    """Linear layers that are more than what they compute.

    A class of its own may compute something else. Attention of torch multiplies by its output
    layer's weight without calling that layer. A model of transformers names what it keeps in fp32;
    T5 casts activations to the dtype of such a weight, which codes would make integers.
    """
    kept = [
        f".{entry}."
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for entry in getattr(model, attribute, None) or ()
    ]
    return [
        name
        for name, linear in linears.items()
        if isinstance(linear, NonDynamicallyQuantizableLinear)
        or type(linear).forward is not nn.Linear.forward
        or any(entry in f".{name}." for entry in kept)
    ]


def _weights_shared_with_embeddings(model: nn.Module) -> set[int]:
    """Weights of tied output layers: the lookup needs them as they are."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return {id(table) for table in tables}


def _check_experts(model: nn.Module, config: QuantizeConfig) -> None:
    """Experts that transformers keeps as one tensor would be left out without a word."""
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            is_expert = parameter.dim() == 3 and "expert" in f"{name}.{leaf}".lower()
            if is_expert and config.choose(f"{name}.{leaf}") is not None:
                raise ArgumentError(
                    f"The experts {name!r} of {type(model).__name__} are one tensor "
                    f"{list(parameter.shape)}, which this version does not quantize. Leave them "
                    f"plain with exclude=['{name}*'], and so those of the other layers."
                )


def _check_projections(chosen: Mapping[str, Format]) -> None:
    """Servers compute q, k and v, or gate and up, as one product, which has one format."""
    for group in fused_groups(chosen):
        if len({chosen[name] for name in group}) > 1:
            found = ", ".join(f"{name!r} in {chosen[name].name}" for name in group)
            names = ", ".join(name.rpartition(".")[2] for name in group)
            raise ArgumentError(
                f"The configuration gives projections of one input several formats: {found}; "
                f"wanted one format for {names}, which servers compute as one product. Give them "
                f"the same with one pattern, for example '{group[0].rpartition('.')[0]}.*', or "
                "exclude some."
            )


def check_features(features: Mapping[str, int], chosen: Mapping[str, Format]) -> None:
    """Refuse layers whose input features (by name) do not fit their format, all in one message."""
    misfits = [
        (name, count, chosen[name])
        for name, count in features.items()
        if count % chosen[name].k_multiple
    ]
    if misfits:
        lines = [
            f"{name!r} has {count} input features, wanted a multiple of {row.k_multiple} for "
            f"{row.name}"
            for name, count, row in misfits[:8]
        ]
        more = f", and {len(misfits) - 8} more layers" if len(misfits) > 8 else ""
        remedy = ", ".join(repr(name) for name, *_ in misfits[:3])
        raise ArgumentError(
            f"The format does not fit: {'; '.join(lines)}{more}. Leave them plain with "
            f"exclude=[{remedy}{', ...' if len(misfits) > 3 else ''}], or choose FP8."
        )
