"""Why a generation cannot be compiled or captured, as a clause, or None if it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel, StaticCache

from mokernels.compile.regional import CompiledLayer, repeated_layers
from mokernels.hf.experts import has_experts
from mokernels.hf.options import setting
from mokernels.hf.static_cache import unsupported_layers

# Option -> the values with which one row grows one token at a time in one cache that we made.
_USUAL: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "assistant_model": (None,),
    "cache": (None,),
    "cache_implementation": (None, "static"),
    "compile_config": (None,),
    "constraints": (None,),
    "custom_generate": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "past_key_values": (None,),
    "penalty_alpha": (None, 0),
    "prompt_lookup_num_tokens": (None,),
    "use_cache": (None, True),
    "use_mtp": (None, False),
}
_ATTENTION = ("sdpa", "eager")
_UNFIXED_ROPE = ("dynamic", "longrope")


def to_static_cache(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """What keeps a generation from a static cache and compiled layers.

    Args:
        model: anything with ``generate``.
        arguments: of ``generate``.
    """
    return next(_of_the_model(model), None) or next(_of_the_options(model, arguments), None)


def to_capture(model: Any, compiled: bool) -> str | None:
    """What keeps a step of such a generation from being a CUDA graph.

    Args:
        model: one that :func:`to_static_cache` has nothing against.
        compiled: whether its layers are.
    """
    return next(_of_the_step(model, compiled), None)


def _of_the_options(model: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, usual in _USUAL.items():
        value = setting(model, arguments, name)
        # Compared by type first: == of a cache or a tensor is no bool.
        if not any(value is wanted or _equal(value, wanted) for wanted in usual):
            shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
            wanted = " or ".join(map(repr, usual))
            yield f"the option {name} is {shown!r}, and a static cache wants {wanted}"


def _equal(value: Any, wanted: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and bool(value == wanted)


def _of_the_model(model: Any) -> Iterator[str]:
    if not (isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)):
        yield f"the model is a {type(model).__name__}, no causal language model of transformers"
        return
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        yield f"{type(model).__name__} is no decoder with a cache of keys and values alone"
        return
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1 or getattr(model, "tp_size", None) not in (None, 1):
        yield "the model's parts are on several devices"
    if has_experts(model):
        yield "its experts are chosen one after the other, by what the router says"
    attention = model.config._attn_implementation
    if attention not in _ATTENTION:
        yield f"the attention is {attention!r}, and a static cache wants {' or '.join(_ATTENTION)}"
    layers = repeated_layers(model)
    if not layers:
        yield f"{type(model).__name__} holds no list of decoder layers"
    if any(map(_compiled_by_others, [model, *layers])):
        yield "the model is compiled already, by torch.compile"
    kinds = unsupported_layers(StaticCache(model.config, max_cache_len=1))
    if kinds:
        yield f"its cache holds layers of the kind {', '.join(sorted(kinds))}"


def _compiled_by_others(module: nn.Module) -> bool:
    present = module._compiled_call_impl
    return present is not None and not isinstance(present, CompiledLayer)


def _of_the_step(model: Any, compiled: bool) -> Iterator[str]:
    if model.device.type != "cuda":
        yield f"the model is on the device {str(model.device)!r}, which has no CUDA graphs"
    config = model.config.get_text_config(decoder=True)
    if config is not model.config:
        yield f"{type(model).__name__} takes more than text, and counts its positions in Python"
    kinds = sorted(set(_rope_kinds(getattr(config, "rope_parameters", None))) & {*_UNFIXED_ROPE})
    if kinds:
        yield f"its rotary embedding ({kinds[0]}) changes with the length of the text"
    if not compiled and any(entry.is_sliding for entry in StaticCache(config, 1).layers):
        yield "a full sliding window is moved by uncompiled code that a graph cannot hold"


def _rope_kinds(parameters: Any) -> Iterator[str]:
    """Kinds of rotary embeddings in a configuration: of all layers, or by the layers' type."""
    if isinstance(parameters, Mapping):
        yield str(parameters.get("rope_type"))
        for nested in parameters.values():
            yield from _rope_kinds(nested)
