"""One JSON object that describes a quantization, in ModelOpt's nested or flat layout."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from mokernels.checkpoint.files import brief
from mokernels.errors import Finding
from mokernels.formats import MIXED_PRECISION, Format, find_format, supported_names

_WILDCARDS = frozenset("*?[")
RESTORE = "Restore the file as nvidia-modelopt wrote it, or export the model again."


@dataclass(frozen=True)
class ListedLayer:
    """One entry of ``quantized_layers``.

    Attributes:
        algorithm: its name as it is written.
        group_size: elements to a scale, where it is written.
    """

    algorithm: str
    group_size: int | None = None

    @property
    def format(self) -> Format | None:
        """The format that it means, or None if this version has none of that name."""
        return find_format(self.algorithm)


@dataclass(frozen=True)
class QuantizationConfig:
    """What a checkpoint says about its quantization.

    Attributes:
        algorithm: name of the algorithm as it is written; None if the weights are not quantized.
        format: the row of :data:`mokernels.formats.FORMATS` that it means; None in mixed precision.
        exclude: patterns of module names that are not quantized, in ``fnmatch`` notation.
        kv_cache: algorithm of the KV cache in upper case, or None.
        group_size: elements to a scale, where it is written.
        producer: version of ModelOpt that wrote the checkpoint, where it is written.
        files: the JSON files that this was read from, the winning one first; none for a checkpoint
            that says nothing about quantization.
        quantized_layers: what is said of each quantized layer, for mixed precision; a name stands
            for the module that has it and for all that is inside of it.
        findings: warnings, for example a contradiction between the files.
    """

    algorithm: str | None = None
    format: Format | None = None
    exclude: tuple[str, ...] = ()
    kv_cache: str | None = None
    group_size: int | None = None
    producer: str | None = None
    files: tuple[str, ...] = ()
    quantized_layers: Mapping[str, ListedLayer] = field(
        default_factory=lambda: MappingProxyType({})
    )
    findings: tuple[Finding, ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether every quantized layer is listed with an algorithm of its own."""
        return is_mixed(self.algorithm)

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that it names, each once; none if the weights are not quantized."""
        listed = [layer.format for layer in self.quantized_layers.values()] if self.mixed else []
        return tuple(dict.fromkeys(row for row in (self.format, *listed) if row))

    def format_of(self, name: str) -> Format | None:
        """The format that the module ``name`` should have, or None for one that stays plain.

        A checkpoint of one format says nothing of single modules: it is that of all of them.
        """
        if not self.mixed:
            return self.format
        listing = self.listing(name)
        return None if listing is None else self.quantized_layers[listing].format

    def listing(self, name: str) -> str | None:
        """The name under which ``quantized_layers`` lists a module, or None.

        It is the module's own, or the nearest container's: ModelOpt lists experts by theirs.
        """
        while name and name not in self.quantized_layers:
            name = name.rpartition(".")[0]
        return name or None

    def excludes(self, name: str) -> bool:
        """Whether the module ``name`` (as the checkpoint calls it) is excluded."""
        exact, pattern = self._compiled
        return name in exact or pattern.match(name) is not None

    @cached_property
    def _compiled(self) -> tuple[frozenset[str], re.Pattern[str]]:
        # A mixture of experts has thousands of modules and of patterns; most are plain names.
        wild = [pattern for pattern in self.exclude if _WILDCARDS & set(pattern)]
        nothing = r"(?!)"
        joined = re.compile("|".join(fnmatch.translate(pattern) for pattern in wild) or nothing)
        return frozenset(self.exclude).difference(wild), joined


def is_mixed(algorithm: str | None) -> bool:
    """Whether ``quant_algo`` says that the layers differ."""
    return algorithm is not None and algorithm.strip().upper() == MIXED_PRECISION


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name matches one of ModelOpt's patterns (shell notation, whole name)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Section:
    """A JSON object that is being read.

    Args:
        file: name of the file that it is from.
        data: the object.
        errors: gets a finding for each field that is missing or of the wrong type.
    """

    def __init__(self, file: str, data: Mapping[str, Any], errors: list[Finding]) -> None:
        self.file = file
        self.errors = errors
        self.data = data
        self.nested = "quantization" in self.data
        self.body = self.data
        if self.nested:
            self.body = self._take(self.data, "quantization", Mapping, "an object")

    def parse(self) -> QuantizationConfig:
        """What it says; wrong types and missing fields go to ``errors``."""
        if self.body is None or not self._by_modelopt():
            return QuantizationConfig(files=(self.file,))
        kv_cache = self._kv_cache()
        return QuantizationConfig(
            algorithm=self._algorithm(kv_cache),
            exclude=self._exclude(),
            kv_cache=kv_cache,
            group_size=self._group_size(),
            producer=self._producer(),
            files=(self.file,),
            quantized_layers=MappingProxyType(dict(self._layers())),
        )

    def _by_modelopt(self) -> bool:
        """Whether ModelOpt's conventions hold; others store reciprocal scales, for example."""
        method = self.data.get("quant_method")
        if isinstance(method, str) and method.lower().startswith("modelopt"):
            return True
        producer = self.data.get("producer")
        named = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
        if method is None and (self.nested or named or "quant_algo" in self.data):
            return True
        self.errors.append(
            Finding(
                "method-unsupported",
                "the checkpoint was not quantized by ModelOpt",
                found=f"quant_method {brief(method)}",
                wanted="quant_method 'modelopt'",
                remedy="Load it with the library that it is meant for.",
                file=self.file,
            )
        )
        return False

    def _algorithm(self, kv_cache: str | None) -> str | None:
        name: str | None = self._take(self.body, "quant_algo", str, "the name of an algorithm")
        # The flat layout of a checkpoint of which only the cache is quantized has no such key.
        written = "quant_algo" in self.body or (not self.nested and kv_cache is not None)
        if not written or (name is not None and not name.strip()):
            self.errors.append(
                Finding(
                    "algorithm-missing",
                    "the configuration does not say which algorithm quantized the weights",
                    found="no quant_algo" if name is None else "an empty quant_algo",
                    wanted=f"one of {supported_names()}",
                    remedy=RESTORE,
                    file=self.file,
                )
            )
        return name

    def _exclude(self) -> tuple[str, ...]:
        key = "exclude_modules" if "exclude_modules" in self.body else "ignore"
        patterns = self._take(self.body, key, list, "a list of module names")
        if patterns and not all(isinstance(pattern, str) for pattern in patterns):
            self._wrong(key, patterns, "a list of module names")
            return ()
        return tuple(patterns or ())

    def _kv_cache(self) -> str | None:
        key = "kv_cache_quant_algo" if "kv_cache_quant_algo" in self.body else "kv_cache_scheme"
        value = self.body.get(key)
        if value is None or isinstance(value, str):
            return value.strip().upper() or None if value else None
        if not isinstance(value, Mapping):
            self._wrong(key, value, "a name, an object or null")
            return None
        scheme = (value.get("type"), value.get("num_bits"))
        names: dict[Any, str] = {("float", 8): "FP8", ("int", 8): "INT8", ("float", 4): "NVFP4"}
        # Lists cannot be looked up, and no scheme of ours has one.
        return names.get(scheme, brief(dict(value))) if _hashable(scheme) else brief(dict(value))

    def _group_size(self) -> int | None:
        size: int | None = self._take(self.body, "group_size", int, "a number of elements")
        if size is not None:
            return size
        groups = self._take(self.body, "config_groups", Mapping, "an object") or {}
        sizes = {
            group["weights"].get("group_size")
            for group in groups.values()
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
            if type(group["weights"].get("group_size")) is int
        }
        # Where formats are mixed, a size belongs to its group, and the layers list their own.
        mixed = is_mixed(str(self.body.get("quant_algo")))
        return sizes.pop() if len(sizes) == 1 and not mixed else None

    def _producer(self) -> str | None:
        producer = self.data.get("producer", self.body.get("producer"))
        version = producer.get("version") if isinstance(producer, Mapping) else None
        return version if isinstance(version, str) else None

    def _layers(self) -> Iterator[tuple[str, ListedLayer]]:
        layers = self._take(self.body, "quantized_layers", Mapping, "an object") or {}
        for name, layer in layers.items():
            entry = layer if isinstance(layer, Mapping) else {}
            algorithm, size = entry.get("quant_algo"), entry.get("group_size")
            if isinstance(algorithm, str) and (size is None or type(size) is int):
                yield name, ListedLayer(algorithm, size)
            else:
                wanted = "an object with a quant_algo and, if any, a number as group_size"
                self._wrong("quantized_layers", {name: layer}, wanted)

    def _take(self, data: Mapping[str, Any], key: str, kind: Any, wanted: str) -> Any:
        """``data[key]`` if it is a ``kind``; None if it is null or absent."""
        value = data.get(key)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        return self._wrong(key, value, wanted)

    def _wrong(self, key: str, value: object, wanted: str) -> None:
        self.errors.append(
            Finding(
                "config-type",
                f"the field {key!r} has the wrong type",
                found=brief(value),
                wanted=wanted,
                remedy=RESTORE,
                file=self.file,
            )
        )


def _hashable(scheme: tuple[Any, ...]) -> bool:
    return all(value is None or isinstance(value, (str, int)) for value in scheme)
