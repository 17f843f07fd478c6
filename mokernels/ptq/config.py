"""What is to be quantized, and how: our own short form, and ModelOpt's configuration as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS, Format, find_format
from mokernels.ptq.modelopt import DEFAULT_DISABLED, ModelOptRules, is_modelopt_config

KV_CACHE_CHOICES = ("FP8", "NVFP4")
"""KV caches whose scales can be calibrated."""


@dataclass(frozen=True)
class QuantizeConfig:
    """A choice of format for every linear layer of a model.

    Attributes:
        choose: from a module's name to the format it gets, or None for a layer that stays plain.
        kv_cache: algorithm of the KV cache whose scales are calibrated, or None.
        text: the configuration in a few words, for messages and reports.
    """

    choose: Callable[[str], Format | None]
    kv_cache: str | None
    text: str


def parse_config(
    config: str | Mapping[str, Any],
    *,
    exclude: Iterable[str] = (),
    kv_cache: str | None = None,
) -> QuantizeConfig:
    """Read what :func:`mokernels.quantize` was given.

    Args:
        config: the name of a format (in any letter case); a mapping from patterns of module names
            to names of formats or None, of which the last that matches counts, with the default
            exclusions of ModelOpt unless a pattern names a layer exactly; or one of ModelOpt's own
            configurations (``mtq.FP8_DEFAULT_CFG``, ... or one like it).
        exclude: patterns of module names (``fnmatch`` notation) that stay plain, whatever the
            configuration says.
        kv_cache: "FP8", "NVFP4" or None; a ModelOpt configuration may choose one too.

    Raises:
        ArgumentError: a format or algorithm is unknown or not run by this version.
    """
    exclude = _patterns(exclude)
    if isinstance(config, str):
        choose, text = _by_name(config)
    elif not isinstance(config, Mapping):
        raise ArgumentError(
            f"quantize was given a configuration of type {type(config).__name__}, wanted the name "
            "of a format, a mapping of patterns to formats, or a configuration of ModelOpt's."
        )
    elif is_modelopt_config(config):
        rules = ModelOptRules(config)
        choose, text = rules.choose, "a configuration of ModelOpt's"
        kv_cache = kv_cache or rules.kv_cache
    else:
        choose, text = _by_pattern(config)
    return QuantizeConfig(_excluding(choose, exclude), _checked_kv_cache(kv_cache), text)


def named_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        ArgumentError: this version has none of that name.
    """
    row = find_format(name)
    if row is None:
        raise ArgumentError(
            f"quantize was given the format {name!r}, wanted one of {', '.join(FORMATS)}."
        )
    return row


def excluded_by_default(name: str) -> bool:
    """Whether ModelOpt's presets leave a module of this name alone: output layers, routers, ..."""
    return any(fnmatch.fnmatchcase(f"{name}.weight_quantizer", p) for p in DEFAULT_DISABLED)


def _by_name(name: str) -> tuple[Callable[[str], Format | None], str]:
    row = named_format(name)
    return lambda module: None if excluded_by_default(module) else row, row.name


def _by_pattern(
    patterns: Mapping[Any, Any],
) -> tuple[Callable[[str], Format | None], str]:
    rows: dict[str, Format | None] = {}
    for pattern, name in patterns.items():
        if not isinstance(pattern, str) or not (name is None or isinstance(name, str)):
            raise ArgumentError(
                f"quantize was given the entry {pattern!r}: {name!r}, wanted a pattern of module "
                "names and the name of a format, or None for layers that stay plain."
            )
        rows[pattern] = None if name is None else named_format(name)
    if not rows:
        raise ArgumentError(
            "quantize was given an empty mapping: nothing would be quantized. Give at least "
            '{"*": "NVFP4"}, or the name of a format.'
        )

    def choose(module: str) -> Format | None:
        if excluded_by_default(module) and module not in rows:
            return None
        chosen = None
        for pattern, row in rows.items():
            if fnmatch.fnmatchcase(module, pattern):
                chosen = row
        return chosen

    text = ", ".join(f"{pattern}: {row.name if row else None}" for pattern, row in rows.items())
    return choose, text


def _excluding(
    choose: Callable[[str], Format | None], patterns: tuple[str, ...]
) -> Callable[[str], Format | None]:
    def chosen(module: str) -> Format | None:
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns):
            return None
        return choose(module)

    return chosen


def _patterns(exclude: Iterable[str]) -> tuple[str, ...]:
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(
                f"exclude holds {pattern!r}, wanted patterns of module names such as "
                "'model.layers.0.*'."
            )
    return patterns


def _checked_kv_cache(kv_cache: str | None) -> str | None:
    chosen = None if kv_cache is None else str(kv_cache).upper()
    if chosen not in (None, *KV_CACHE_CHOICES):
        raise ArgumentError(
            f"kv_cache={kv_cache!r} is not known, wanted "
            f"{' or '.join(map(repr, KV_CACHE_CHOICES))}, or None."
        )
    return chosen
