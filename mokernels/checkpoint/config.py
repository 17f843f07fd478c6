"""What the JSON files of a checkpoint say about its quantization.

ModelOpt writes the same facts twice: in ``hf_quant_config.json`` (nested under "quantization"; flat
in newer versions) and in ``config.json`` under "quantization_config" (flat, and fewer of them).
``hf_quant_config.json`` wins; where the two contradict each other a warning names both values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mokernels.checkpoint.files import brief, checked_folder, has_file, read_json
from mokernels.checkpoint.listed import check_listed, check_unlisted, differences
from mokernels.checkpoint.schema import RESTORE, QuantizationConfig, Section
from mokernels.errors import CheckpointError, Finding, UnsupportedFormatError
from mokernels.formats import LATER_FORMATS, find_format, supported_names

QUANT_CONFIG_FILE = "hf_quant_config.json"
CONFIG_FILE = "config.json"

_UNSUPPORTED = ("method-unsupported", "format-unsupported")


def read_quantization(folder: str | os.PathLike[str]) -> QuantizationConfig:
    """Read ``hf_quant_config.json`` and ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: with everything that is wrong with the two files.
        UnsupportedFormatError: they name an algorithm that this version does not run.
    """
    path = checked_folder(folder)
    findings: list[Finding] = []
    parsed: dict[str, dict[str, Any] | None] = {}
    for name in (QUANT_CONFIG_FILE, CONFIG_FILE):
        try:
            parsed[name] = read_json(path, name) if has_file(path, name) else None
        except CheckpointError as error:
            findings += error.findings
    if findings:
        raise CheckpointError(path, findings)
    return parse_quantization(parsed[QUANT_CONFIG_FILE], parsed[CONFIG_FILE], path=path)


def parse_quantization(
    hf_quant_config: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    *,
    path: str | os.PathLike[str] = "",
) -> QuantizationConfig:
    """The same from what the files hold.

    Args:
        hf_quant_config: content of ``hf_quant_config.json``, None if there is none.
        config: content of ``config.json`` with its ``quantization_config``, None if there is none.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: fields are missing or of the wrong type.
        UnsupportedFormatError: the algorithm is none that this version runs.
    """
    errors: list[Finding] = []
    sections = [(QUANT_CONFIG_FILE, hf_quant_config), (CONFIG_FILE, find_section(config, errors))]
    parsed = [Section(file, data, errors).parse() for file, data in sections if data is not None]
    if errors:
        raise _error(path, errors)
    merged = parsed[0] if parsed else QuantizationConfig()
    for other in parsed[1:]:
        merged = _merge(merged, other)
    return _with_format(merged, path)


def parse_layout(
    data: Mapping[str, Any],
    *,
    path: str | os.PathLike[str] = "",
    file: str = QUANT_CONFIG_FILE,
) -> QuantizationConfig:
    """One file's content in either layout, with ``format`` left None whatever the algorithm.

    Raises:
        CheckpointError: fields are missing or of the wrong type.
    """
    errors: list[Finding] = []
    config = Section(file, data, errors).parse()
    if errors:
        raise _error(path, errors)
    return config


def find_section(
    config: Mapping[str, Any] | None, errors: list[Finding]
) -> Mapping[str, Any] | None:
    """``quantization_config`` of a ``config.json``, also where a part such as text_config holds it.

    Args:
        config: content of ``config.json``.
        errors: gets a finding when it is no object, or when several parts have different ones.
    """
    key = "quantization_config"
    config = config or {}
    parts = {"": config} if config.get(key) is not None else config
    sections = {
        name: part[key]
        for name, part in parts.items()
        if isinstance(part, Mapping) and part.get(key) is not None
    }
    found = list(sections.values())
    if not all(isinstance(section, Mapping) for section in found):
        errors.append(
            Finding(
                "config-type",
                f"the field {key!r} has the wrong type",
                found=brief(found[0]),
                wanted="an object",
                remedy=RESTORE,
                file=CONFIG_FILE,
            )
        )
        return None
    if any(section != found[0] for section in found[1:]):
        errors.append(
            Finding(
                "config-ambiguous",
                "several parts of the model have their own quantization_config",
                found=", ".join(sections),
                wanted="one for the whole checkpoint",
                remedy="Checkpoints whose parts are quantized differently are not supported yet.",
                file=CONFIG_FILE,
            )
        )
    return found[0] if found else None


def _merge(first: QuantizationConfig, second: QuantizationConfig) -> QuantizationConfig:
    """``first``, completed by ``second``, with a warning for each contradiction."""
    same = _canonical(first.algorithm) == _canonical(second.algorithm)
    pairs: list[tuple[str, object, object]] = [
        ("algorithm", _canonical(first.algorithm), _canonical(second.algorithm)),
        ("list of excluded modules", sorted(set(first.exclude)), sorted(set(second.exclude))),
        ("KV-cache algorithm", first.kv_cache, second.kv_cache),
    ]
    if first.group_size is not None and second.group_size is not None:
        pairs.append(("group size", first.group_size, second.group_size))
    if first.quantized_layers and second.quantized_layers:
        pairs.append(("list of quantized layers", *differences(first, second)))
    warnings = tuple(
        Finding(
            "config-contradiction",
            f"{first.files[0]} and {second.files[0]} contradict each other about the {subject}",
            found=f"{_shown(one)} and {_shown(other)}",
            wanted="the same in both",
            remedy=f"{first.files[0]} is followed.",
            file=second.files[0],
            severity="warning",
        )
        for subject, one, other in pairs
        if one != other
    )
    return replace(
        first,
        group_size=second.group_size if first.group_size is None else first.group_size,
        producer=first.producer or second.producer,
        files=first.files + second.files,
        # A file that says another algorithm is not followed in anything that belongs to it.
        quantized_layers=first.quantized_layers or (second.quantized_layers if same else {}),
        findings=first.findings + second.findings + warnings,
    )


def _canonical(algorithm: str | None) -> str | None:
    """The name of the format behind an alias; any other name in upper case."""
    if algorithm is None:
        return None
    row = find_format(algorithm)
    return row.name if row else algorithm.strip().upper()


def _shown(value: object) -> str:
    return "nothing" if value in (None, []) else brief(value)


def _with_format(config: QuantizationConfig, path: str | os.PathLike[str]) -> QuantizationConfig:
    row = find_format(config.algorithm) if config.algorithm else None
    if config.algorithm and not row and not config.mixed:
        raise UnsupportedFormatError(path, [_unsupported(config)])
    errors = [*(check_listed(config) if config.mixed else check_unlisted(config, row))]
    if errors:
        raise _error(path, errors)
    if config.algorithm is None:
        return replace(config, findings=(*config.findings, *_unquantized(config)))
    return replace(config, format=row)


def _unquantized(config: QuantizationConfig) -> Iterator[Finding]:
    if config.files:
        cache = f", only the KV cache ({config.kv_cache})" if config.kv_cache else ""
        yield Finding(
            "weights-unquantized",
            f"the configuration says that the weights are not quantized{cache}",
            found="quant_algo null",
            remedy="The weights are loaded as they are.",
            file=config.files[0],
            severity="warning",
        )


def _unsupported(config: QuantizationConfig) -> Finding:
    name = str(config.algorithm).strip().upper()
    remedy = "Quantize the model with one of these, or update mokernels."
    if name in LATER_FORMATS:
        remedy = (
            f"{name} is an algorithm of ModelOpt that mokernels does not run yet; "
            "take a checkpoint of a supported format, or a later version of mokernels."
        )
    return Finding(
        "format-unsupported",
        "this version does not run the algorithm of the checkpoint",
        found=brief(config.algorithm),
        wanted=f"one of {supported_names()}",
        remedy=remedy,
        file=config.files[0],
    )


def _error(path: str | os.PathLike[str], errors: list[Finding]) -> CheckpointError:
    """The error for ``errors``; another quantization method is an unsupported format."""
    foreign = all(finding.rule in _UNSUPPORTED for finding in errors)
    return (UnsupportedFormatError if foreign else CheckpointError)(Path(path), errors)
