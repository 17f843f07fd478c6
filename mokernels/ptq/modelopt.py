"""Reading ModelOpt's quantization configurations: ``mtq.FP8_DEFAULT_CFG`` and those like it.

They are lists of rules on the names of quantizers (``<module>.weight_quantizer``,
``<module>.input_quantizer``), of which later ones change what earlier ones said. Before ModelOpt
0.40 they were dictionaries of the same rules; both are read, without ModelOpt.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS, FP8_BLOCK, MXFP8_BLOCK, NVFP4_BLOCK, Format, supported_names

DEFAULT_DISABLED: tuple[str, ...] = (
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mlp.gate.*",
    "*mlp.shared_expert_gate.*",
    "*output_layer*",
    "*proj_out.*",
    "*router*",
    "mtp.*",
    "output.*",
    "*embed_vision*",
    "*vision_tower*",
    "*visual*",
    "*vision_model*",
    "*multi_modal_projector*",
)
"""Quantizers that every preset of ModelOpt 0.47 switches off: outputs, routers, vision towers."""

_ALGORITHMS = (None, "max")
_E4M3, _E2M1, _E8M0 = (4, 3), (2, 1), (8, 0)
_NAMED_BITS: Mapping[str, tuple[int, int]] = {"e4m3": _E4M3, "e2m1": _E2M1, "e8m0": _E8M0}


@dataclass(frozen=True)
class _Quantizer:
    """One quantizer's settings: what can tell the formats apart.

    Attributes:
        bits: of an element, (exponent, mantissa), or a number for integers.
        axis: the dimension that keeps scales of its own, or None.
        blocks: elements to a scale by dimension (-1 is K), where given.
        scale_bits: of a block's scale, or None for fp32.
        dynamic: scales are computed from the tensor at hand.
    """

    bits: Any = 8
    axis: Any = None
    blocks: tuple[tuple[int, Any], ...] = ()
    scale_bits: Any = None
    dynamic: bool = False


_FP8 = _Quantizer(_E4M3)
_PER_TOKEN = _Quantizer(_E4M3, None, ((-1, None),), None, True)
_NVFP4 = _Quantizer(_E2M1, None, ((-1, NVFP4_BLOCK),), _E4M3, True)
_MXFP8 = _Quantizer(_E4M3, None, ((-1, MXFP8_BLOCK),), _E8M0, True)
_SQUARE = _Quantizer(_E4M3, None, ((-2, FP8_BLOCK), (-1, FP8_BLOCK)))
_FORMATS: Mapping[tuple[_Quantizer, _Quantizer | None], str] = {
    (_FP8, _FP8): "FP8",
    (_Quantizer(_E4M3, 0), _PER_TOKEN): "FP8_PER_CHANNEL_PER_TOKEN",
    (_SQUARE, None): "FP8_PB_WO",
    (_NVFP4, _NVFP4): "NVFP4",
    (_MXFP8, _MXFP8): "MXFP8",
}
"""(weights, activations) of the formats that this version runs; None is one left alone."""


def is_modelopt_config(config: Mapping[str, Any]) -> bool:
    """Whether a mapping is a configuration of ModelOpt's, not one of patterns and names."""
    return "quant_cfg" in config


class ModelOptRules:
    """The rules of one configuration.

    Args:
        config: with ``quant_cfg``, and ``algorithm`` "max" or None.

    Attributes:
        kv_cache: the KV cache that the rules ask for, or None.

    Raises:
        ArgumentError: it asks for an algorithm that this version does not run, or is malformed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        _check_algorithm(config.get("algorithm"))
        self._rules = [_Rule.read(entry) for entry in _entries(config["quant_cfg"])]
        self.kv_cache = self._kv_cache()

    def choose(self, module: str) -> Format | None:
        """The format that a linear layer gets, or None.

        Raises:
            ArgumentError: the layer's quantizers make no format that this version runs.
        """
        weight, activation = (
            self._settings(f"{module}.{part}_quantizer") for part in ("weight", "input")
        )
        if weight is None and activation is None:
            return None
        name = _FORMATS.get((weight, activation)) if weight is not None else None
        if name is None:
            raise ArgumentError(
                f"The configuration quantizes the layer {module!r} with weights {_brief(weight)} "
                f"and activations {_brief(activation)}, which makes none of the formats that this "
                f"version runs: {supported_names()}. Exclude the layer, or choose another preset."
            )
        return FORMATS[name]

    def _settings(self, quantizer: str) -> _Quantizer | None:
        settings, enabled = _Quantizer(), True
        for rule in self._rules:
            if rule.matches(quantizer):
                settings = settings if rule.settings is None else rule.settings
                enabled = rule.enabled
        return settings if enabled else None

    def _kv_cache(self) -> str | None:
        # A name that rules on keys and values match, and rules on layers do not.
        key = self._settings("layer.attention.k_bmm_quantizer")
        if not any("bmm" in rule.pattern for rule in self._rules) or key is None:
            return None
        known = {_FP8: "FP8", _NVFP4: "NVFP4"}
        if key not in known:
            raise ArgumentError(
                f"The configuration quantizes the KV cache with {_brief(key)}, wanted FP8 (E4M3) "
                "or NVFP4, without a bias."
            )
        return known[key]


@dataclass(frozen=True)
class _Rule:
    """One entry: which quantizers, their settings (None to keep them) and whether they are on."""

    pattern: str
    settings: _Quantizer | None
    enabled: bool
    applies: bool = True

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> _Rule:
        pattern = entry.get("quantizer_name")
        if not isinstance(pattern, str):
            raise _malformed(entry)
        given = entry.get("cfg")
        enabled = entry.get("enable", True)
        if not isinstance(enabled, bool):
            raise _malformed(entry)
        # Classes other than those of linear layers are never quantized here.
        applies = entry.get("parent_class") in (None, "nn.Linear")
        return cls(pattern, None if given is None else _read_settings(given), enabled, applies)

    def matches(self, quantizer: str) -> bool:
        return self.applies and fnmatch.fnmatchcase(quantizer, self.pattern)


def _entries(quant_cfg: Any) -> Iterator[Mapping[str, Any]]:
    """The rules in order, from a list (ModelOpt 0.40 and later) or a dictionary (before)."""
    if isinstance(quant_cfg, Mapping):
        for pattern, given in quant_cfg.items():
            yield from _old_entry(str(pattern), given)
    elif isinstance(quant_cfg, Iterable) and not isinstance(quant_cfg, str):
        for entry in quant_cfg:
            if not isinstance(entry, Mapping):
                raise _malformed(entry)
            yield entry
    else:
        raise _malformed(quant_cfg)


def _old_entry(pattern: str, given: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(given, Mapping):
        if isinstance(given, (list, tuple)):
            yield {"quantizer_name": pattern, "cfg": given}
            return
        raise _malformed({pattern: given})
    if pattern.startswith("nn."):  # rules on a class: its quantizers by name
        for inner, settings in given.items():
            for entry in _old_entry(str(inner), settings):
                yield {**entry, "parent_class": pattern}
        return
    settings = {key: value for key, value in given.items() if key != "enable"}
    name = "*" if pattern == "default" else pattern
    cfg = {"cfg": settings} if settings else {}
    yield {"quantizer_name": name, **cfg, "enable": given.get("enable", True)}


def _read_settings(given: Any) -> _Quantizer:
    if isinstance(given, (list, tuple)):
        raise ArgumentError(
            "The configuration quantizes a tensor twice in a row (as W4A8 does), which this "
            f"version does not run. Choose one of {supported_names()}."
        )
    if not isinstance(given, Mapping):
        raise _malformed(given)
    blocks = given.get("block_sizes") or {}
    sizes = sorted((int(k), v) for k, v in blocks.items() if str(k).lstrip("-").isdigit())
    dynamic = "dynamic" in (given.get("type"), blocks.get("type"))
    unknown = sorted(set(map(str, {**given, **blocks})) - _KNOWN - {str(k) for k, _ in sizes})
    if any({**given, **blocks}.get(key) not in (None, False) for key in unknown):
        raise ArgumentError(
            f"The configuration sets {', '.join(unknown)} of a quantizer, which this version does "
            f"not run. Choose a preset of one of {supported_names()}."
        )
    return _Quantizer(
        _bits(given.get("num_bits", 8)),
        given.get("axis"),
        tuple(sizes),
        _bits(blocks.get("scale_bits")),
        dynamic,
    )


_KNOWN = frozenset(
    {"num_bits", "axis", "block_sizes", "type", "scale_bits", "enable", "effective_bits"}
    # What changes no number of the formats above.
    | {"trt_high_precision_dtype", "calibrator", "fake_quant", "narrow_range", "learn_amax"}
    | {"unsigned", "pass_through_bwd", "scale_block_sizes"}
)


def _bits(given: Any) -> Any:
    if isinstance(given, str):
        return _NAMED_BITS.get(given.lower(), given)
    return tuple(given) if isinstance(given, (list, tuple)) else given


def _check_algorithm(algorithm: Any) -> None:
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    if method not in _ALGORITHMS:
        raise ArgumentError(
            f"The configuration asks for the algorithm {method!r}, wanted 'max' or None: this "
            "version calibrates scales and does not change weights (AWQ, SmoothQuant, SVDQuant)."
        )


def _brief(quantizer: _Quantizer | None) -> str:
    if quantizer is None:
        return "left alone"
    parts = [f"of {quantizer.bits} bits"]
    parts += [f"axis {quantizer.axis}"] if quantizer.axis is not None else []
    parts += [f"blocks {dict(quantizer.blocks)}"] if quantizer.blocks else []
    parts += [f"scales of {quantizer.scale_bits} bits"] if quantizer.scale_bits else []
    return " ".join(parts) + (" (dynamic)" if quantizer.dynamic else "")


def _malformed(entry: object) -> ArgumentError:
    text = repr(entry)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return ArgumentError(
        f"The configuration's quant_cfg holds {shown}, wanted rules such as {{'quantizer_name': "
        "'*weight_quantizer', 'cfg': {'num_bits': (4, 3), 'axis': None}}."
    )
