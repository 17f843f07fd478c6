"""What runs where, and why: a table of a model's linear layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from mokernels.formats import Activation, Granularity
from mokernels.layers.linear import QuantizedLinear
from mokernels.layers.trainable import FakeQuantizedLinear
from mokernels.ops import tuned
from mokernels.ops.configs import ANY_M, M_BUCKETS
from mokernels.ops.layer_kinds import has_dot, kind_of_layer, row_is_gemv
from mokernels.ops.table_files import Key
from mokernels.ops.target import Target, target_of


@dataclass(frozen=True)
class LayerExplanation:
    """One linear layer: what it holds and what runs it.

    Attributes:
        name: of the module.
        format: of its weight.
        activations: what happens to them.
        kernel: the family that runs it.
        why: it is that one.
        launch: where the tile and the pipeline come from: the closed form, or measurements.
    """

    name: str
    format: str
    activations: str
    kernel: str
    why: str
    launch: str = ""


@dataclass(frozen=True)
class Explanation:
    """The linear layers of a model, in its order; ``str()`` gives a readable table.

    Attributes:
        layers: one row per quantized layer.
        unquantized: names of the linear layers that hold plain weights.
        notes: what holds for the whole model.
    """

    layers: tuple[LayerExplanation, ...]
    unquantized: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = LayerExplanation("layer", "format", "activations", "kernel", "why", "launch")
        rows = [
            (r.name, r.format, r.activations, r.kernel, r.launch, r.why)
            for r in (header, *self.layers)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]])
            for row in rows
        ]
        counts = Counter(f"{row.format} ({row.activations})" for row in self.layers)
        for what, count in sorted(counts.items()):
            lines.append(f"{count} layer{'s' * (count != 1)} in {what}")
        if self.unquantized:
            lines.append(f"{len(self.unquantized)} not quantized: {', '.join(self.unquantized)}")
        return "\n".join([*lines, *self.notes])


def explain(model: nn.Module) -> Explanation:
    """Say for every linear layer which format it holds, which kernels run it, and why.

    Args:
        model: any module; the layers that mokernels made are recognised by their class.

    Returns:
        An :class:`Explanation`; print it for a table.
    """
    rows, plain = [], []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            rows.append(_explain_layer(name, module))
        elif isinstance(module, FakeQuantizedLinear):
            treatment = _TREATMENT[module.activation]
            row = LayerExplanation(name, module.format.name, treatment, "fake-quantized", _TRAINED)
            rows.append(row)
        elif isinstance(module, nn.Linear):
            plain.append(name)
    return Explanation(tuple(rows), tuple(plain), (*_notes(model), *_files(model)))


def _explain_layer(name: str, layer: QuantizedLinear) -> LayerExplanation:
    kernel, why = kernel_family(layer, layer.weight.device)
    treatment = _TREATMENT[layer.activation]
    if layer.activation is not layer.format.activation:
        why = f"{why}; {_why_other_activations(layer)}"
    launch = launch_source(layer, layer.weight.device)
    return LayerExplanation(name, layer.format.name, treatment, kernel, why, launch)


def kernel_family(layer: QuantizedLinear, device: torch.device) -> tuple[str, str]:
    """Name of the kernels that run ``layer`` on ``device``, and the reason, as two phrases."""
    if device.type in ("cpu", "meta"):
        return "reference", "CPU: dequantized to fp32 and multiplied in fp32"
    return triton_family(layer, target_of(device))


def triton_family(layer: QuantizedLinear, target: Target) -> tuple[str, str]:
    """The Triton kernel family of ``layer`` on ``target``, and the reason.

    One row may have a kernel apart, which the reason says.
    """
    kernel, why = _matrix_family(layer, target)
    if row_is_gemv(layer.format, layer.activation, *_planned_shape(layer), target):
        why = f"{why}; one row by fp32 multiply-adds, without matrix units"
    return kernel, why


def _matrix_family(layer: QuantizedLinear, target: Target) -> tuple[str, str]:
    weight_only = layer.activation is Activation.NONE
    if layer.format.granularity is Granularity.GROUP:
        if has_dot(layer.format, target) and not weight_only:
            return "native", f"{target.name} multiplies block-scaled operands itself"
        what = "weights are" if weight_only else "weights and activations are"
        return "decode", f"{what} decoded to 16 bit exactly, global scales on the accumulator"
    if layer.format.granularity is Granularity.BLOCK or layer.activation is Activation.FP8_BLOCK:
        return "block", "scales of 128 elements of K go on the fp32 accumulator"
    if weight_only:
        return "epilogue", "FP8 weights are decoded to the activations' dtype"
    how = "" if target.has_fp8_dot else f"; {target.name} has no FP8 product, codes are decoded"
    return "epilogue", f"scales are applied once, after the product{how}"


def launch_source(layer: QuantizedLinear, device: torch.device) -> str:
    """Who chooses the launches of a layer on ``device``; ``"-"`` where nothing is launched."""
    if device.type in ("cpu", "meta"):
        return "-"
    choices = [tuned.choice_of(key, target_of(device)) for key in _keys(layer, target_of(device))]
    measured = sum(choice.source != tuned.CLOSED_FORM for choice in choices)
    if not measured:
        return tuned.CLOSED_FORM
    return f"measured for {measured} of {len(choices)} ranges of rows"


def _keys(layer: QuantizedLinear, target: Target) -> list[Key]:
    """What tables call the products of a layer with 16-bit activations."""
    kind = kind_of_layer(layer.format, layer.activation, target)
    return [Key(kind, rows, *_planned_shape(layer)) for rows in (*M_BUCKETS, ANY_M)]


def _planned_shape(layer: QuantizedLinear) -> tuple[int, int]:
    """N, of the fused group if there is one, and K."""
    n, items = layer.weight.shape
    return layer.plan_n or n, items * layer.format.element.per_item


def _files(model: nn.Module) -> tuple[str, ...]:
    """The files of measurements that count for a model, and what they were measured with."""
    devices = {m.weight.device for m in model.modules() if isinstance(m, QuantizedLinear)}
    targets = {target_of(d) for d in devices if d.type not in ("cpu", "meta")}
    return tuple(
        f"Measured launch configurations are read from {path} ({table.device}, torch "
        f"{table.torch}, triton {table.triton}, {table.date})."
        for target in targets
        for path, table in tuned.tables_of(target)
    )


def _why_other_activations(layer: QuantizedLinear) -> str:
    if layer.format.name == "FP8" and layer.activation is Activation.FP8_PER_TOKEN:
        return "the checkpoint has no input_scale, so activations are quantized per token"
    return f"activations={layer.activation.value!r} was asked for"


def _notes(model: nn.Module) -> tuple[str, ...]:
    kept = [name for name, _ in model.named_buffers() if name.endswith((".k_scale", ".v_scale"))]
    if not kept:
        return ()
    return (f"{len(kept)} KV-cache scales are kept; the cache itself stays in the model's dtype.",)


_TRAINED = "the float weight is trained and rounded in every call; mokernels.convert packs it"
_TREATMENT = {
    Activation.NONE: "not quantized",
    Activation.FP8_STATIC: "E4M3, static",
    Activation.FP8_PER_TOKEN: "E4M3, per token",
    Activation.FP8_BLOCK: "E4M3, 1x128",
    Activation.NVFP4: "NVFP4, static global scale",
    Activation.MXFP8: "MXFP8",
}
