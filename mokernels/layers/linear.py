"""Quantized linear layers.

The tensors of a layer have the names, dtypes and shapes of the checkpoint, so that loading is
assignment and saving gives the same bytes back. Tensors with a dimension are parameters (tensor
parallelism shards parameters), scalars are buffers (FSDP refuses scalar parameters). The layers
subclass ``nn.Linear`` and keep the global ``in_features`` and ``out_features``, so that adapters
and parallelism plans recognise them; the arithmetic goes by the local shape of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mokernels.errors import ArgumentError
from mokernels.formats import E2M1, Activation, Format
from mokernels.numerics import static_fp8_scales
from mokernels.ops.registry import operator

if TYPE_CHECKING:
    from mokernels.layers.siblings import Siblings


@dataclass(frozen=True)
class StoredSpec:
    """dtype and shape of one tensor as the checkpoint stores it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored quantized; base of one class per weight arithmetic.

    Args:
        format: the row of :data:`mokernels.formats.FORMATS` that the weight is stored in.
        in_features: K, of the whole layer.
        out_features: N, of the whole layer.
        tensors: what the checkpoint stores for the layer, by leaf name, the bias aside; a required
            tensor that is not listed gets ModelOpt's shape.
        bias: dtype of the bias, or None for a layer without.
        activation: what happens to the input; None for what the format asks for.
        device: of the (uninitialised) tensors.

    Raises:
        ArgumentError: ``activation`` is none that the format can run with.
    """

    # transformers shards the parameters of such a module itself, by its tensor parallel plan.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        format: Format,
        in_features: int,
        out_features: int,
        *,
        tensors: Mapping[str, StoredSpec] | None = None,
        bias: torch.dtype | None = None,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.in_features = in_features
        self.out_features = out_features
        self.activation = _checked_activation(format, activation)
        # Set by mokernels.layers.siblings for projections that share an input.
        self.siblings: Siblings | None = None
        self.position = 0
        self.plan_n = 0
        for leaf, spec in _specs(format, out_features, in_features, tensors).items():
            self._declare(leaf, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        empty_bias = None if bias is None else torch.empty(out_features, dtype=bias, device=device)
        self.register_parameter(
            "bias", None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False)
        )
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def _declare(self, leaf: str, tensor: Tensor) -> None:
        if tensor.dim() == 0:
            self.register_buffer(leaf, tensor)
        else:
            self.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    def refresh(self) -> None:
        """Recompute what is derived from the stored tensors; call it after changing them."""
        if self.siblings is not None:
            self.siblings.refresh()

    def _operand(self, leaf: str) -> Tensor | None:
        """A stored tensor as the operator gets it: while compiling, rows of the group's."""
        own: Tensor | None = getattr(self, leaf)
        if self.siblings is None or not _is_fused():
            return own
        return self.siblings.operand(self, leaf, own)

    def _input_tensor(self, leaf: str) -> Tensor | None:
        """A scale of the activations: while compiling, the group's."""
        own: Tensor | None = getattr(self, leaf)
        if self.siblings is None or not _is_fused():
            return own
        return self.siblings.input_tensor(self, leaf)

    def reset_parameters(self) -> None:
        """Do nothing: the tensors come from a checkpoint, random codes would mean nothing."""

    @property
    def stored_leaves(self) -> tuple[str, ...]:
        """Names of the stored tensors of the quantized weight, in the checkpoint's order."""
        leaves = [stored.leaf for stored in self.format.tensors(1, self.format.k_multiple)]
        return tuple(leaf for leaf in leaves if getattr(self, leaf, None) is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves are obeyed; casts to another dtype reach the bias, never codes or scales."""
        kept = {id(tensor) for tensor in self._kept_tensors()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        super()._apply(keep_dtype, recurse)
        if self.siblings is not None:
            self.siblings.settle()
        return self

    def _kept_tensors(self) -> list[Tensor]:
        own = [*self._parameters.items(), *self._buffers.items()]
        return [tensor for name, tensor in own if name != "bias" and tensor is not None]

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for, rounded once to ``dtype``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Format and activations after nn.Linear's own numbers."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return (
            f"{text}, bias={self.bias is not None}, format={self.format.name}, "
            f"activations={self.activation.value}"
        )


class FP8Linear(QuantizedLinear):
    """E4M3 weight with fp32 scales: FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO."""

    weight_scale: Tensor
    input_multiplier: Tensor | None
    input_divisor: Tensor | None

    def __init__(self, format: Format, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(format, in_features, out_features, **kwargs)
        if not hasattr(self, "input_scale"):
            self.register_buffer("input_scale", None)
        # m = 448 / amax and 1 / m: codes are E4M3(x m), their scale is 1 / m (not input_scale,
        # which is an ulp off). Not stored; None until refresh() has seen a real input_scale.
        self.register_buffer("input_multiplier", None, persistent=False)
        self.register_buffer("input_divisor", None, persistent=False)

    def refresh(self) -> None:
        """Recompute m and 1 / m from ``input_scale``."""
        scale = self.input_scale
        if scale is None or scale.is_meta:
            self.input_multiplier = self.input_divisor = None
        else:
            scales = static_fp8_scales(scale.detach().reshape(()))
            self.input_multiplier, self.input_divisor = scales
        super().refresh()

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype of the input."""
        weight, bias = self._operand("weight"), self._operand("bias")
        scale = _two_dimensional(self._operand("weight_scale"))
        if self.activation is Activation.FP8_STATIC:
            stored = self.input_divisor is None
            divisor = self._input_tensor("input_scale" if stored else "input_divisor")
            multiplier = self._input_tensor("input_multiplier")
            return _FP8_LINEAR(input, weight, scale, divisor, bias, multiplier, self.plan_n)
        return _FP8_OPERATORS[self.activation](input, weight, scale, bias, self.plan_n)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for, rounded once to ``dtype``."""
        return _DEQUANTIZE_FP8(self.weight, _two_dimensional(self.weight_scale), _name(dtype))


class NVFP4Linear(QuantizedLinear):
    """Packed E2M1 weight with E4M3 block scales and one global scale: NVFP4."""

    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype of the input."""
        leaves = ("weight", "weight_scale", "weight_scale_2")
        weight, bias = [self._operand(leaf) for leaf in leaves], self._operand("bias")
        if self.activation is Activation.NONE:
            return _NVFP4_WEIGHT_ONLY(input, *weight, bias, self.plan_n)
        return _NVFP4_LINEAR(input, *weight, self._input_tensor("input_scale"), bias, self.plan_n)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for, rounded once to ``dtype``."""
        return _DEQUANTIZE_NVFP4(self.weight, self.weight_scale, self.weight_scale_2, _name(dtype))


class MXFP8Linear(QuantizedLinear):
    """E4M3 weight with one power of two for 32 elements: MXFP8."""

    weight_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype of the input."""
        run = _MXFP8_WEIGHT_ONLY if self.activation is Activation.NONE else _MXFP8_LINEAR
        weight, scale = self._operand("weight"), self._operand("weight_scale")
        return run(input, weight, scale, self._operand("bias"), self.plan_n)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for, rounded once to ``dtype``."""
        return _DEQUANTIZE_MXFP8(self.weight, self.weight_scale, _name(dtype))


def _refresh_after_load(module: QuantizedLinear, keys: object) -> None:
    """State-dict hook; a function of the module, since hooks are pickled with the layer."""
    module.refresh()


def linear_class(format: Format) -> type[QuantizedLinear]:
    """The class that holds weights of ``format``."""
    if format.element is E2M1:
        return NVFP4Linear
    return MXFP8Linear if format.scale_dtype == torch.uint8 else FP8Linear


def stored_weight(
    format: Format,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight that stored tensors stand for, rounded once to ``dtype``.

    Args:
        format: of the tensors.
        tensors: leaf -> tensor: codes and scales of the weight, without the activations' scale.
        shape: (N, K) of the weight.
        dtype: of the result.
    """
    specs = {leaf: StoredSpec(t.dtype, tuple(t.shape)) for leaf, t in tensors.items()}
    n, k = shape
    module = linear_class(format)(format, k, n, tensors=specs, device="meta")
    module.load_state_dict(dict(tensors), assign=True)
    with torch.no_grad():
        return module.dequantized_weight(dtype)


def _checked_activation(format: Format, activation: Activation | None) -> Activation:
    chosen = format.activation if activation is None else activation
    if chosen not in format.activations:
        legal = ", ".join(repr(choice.value) for choice in format.activations)
        raise ArgumentError(
            f"A layer in {format.name} cannot run with activations {chosen.value!r}; wanted one of "
            f"{legal}."
        )
    return chosen


def _specs(
    format: Format, n: int, k: int, given: Mapping[str, StoredSpec] | None
) -> dict[str, StoredSpec]:
    """Every tensor that the layer holds: as the checkpoint has it, else as ModelOpt writes it."""
    if given is not None:
        return dict(given)
    stored = format.tensors(n, k)
    return {tensor.leaf: StoredSpec(tensor.dtype, tensor.shapes[0]) for tensor in stored}


def _is_fused() -> bool:
    """Whether this call is being compiled; exported programs keep the layers' own tensors."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _two_dimensional(scale: Any) -> Any:
    """ModelOpt's [N / 128, 1, K / 128, 1] as [N / 128, K / 128]; other ranks as they are."""
    return scale.squeeze(3).squeeze(1) if scale.dim() == 4 else scale


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The overloads are looked up once: a call through torch.ops.mokernels.<name> resolves them anew.
_FP8_LINEAR = operator("fp8_linear")
_FP8_OPERATORS: Mapping[Activation, Callable[..., Tensor]] = {
    Activation.NONE: operator("fp8_weight_only_gemm"),
    Activation.FP8_PER_TOKEN: operator("fp8_per_token_linear"),
    Activation.FP8_BLOCK: operator("fp8_block_linear"),
}
_NVFP4_LINEAR = operator("nvfp4_linear")
_NVFP4_WEIGHT_ONLY = operator("nvfp4_weight_only_gemm")
_MXFP8_LINEAR = operator("mxfp8_linear")
_MXFP8_WEIGHT_ONLY = operator("mxfp8_weight_only_gemm")
_DEQUANTIZE_FP8 = operator("dequantize_fp8")
_DEQUANTIZE_NVFP4 = operator("dequantize_nvfp4")
_DEQUANTIZE_MXFP8 = operator("dequantize_mxfp8")
