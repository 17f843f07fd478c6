"""What the two JSON files say, in both layouts."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mokernels.checkpoint import (
    QuantizationConfig,
    check,
    matches,
    parse_quantization,
    parse_quantization_file,
    read_quantization,
)
from mokernels.formats import FORMATS
from tests.support.checkpoints import FORMAT_NAMES, edit_json, make_checkpoint, only_finding

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def nested(**fields: Any) -> dict[str, Any]:
    body = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    return {"producer": PRODUCER, "quantization": {**body, **fields}}


def flat(**fields: Any) -> dict[str, Any]:
    body = {"ignore": ["lm_head"], "quant_algo": "FP8", "producer": PRODUCER}
    return {**body, "quant_method": "modelopt", **fields}


def in_config(section: dict[str, Any] | None) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": section}


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("layout", ["both", "hf_quant_config", "config"])
def test_every_layout_says_the_same(tmp_path: Path, format: str, layout: Any) -> None:
    folder = make_checkpoint(tmp_path / "c", format, layout=layout)
    config = read_quantization(folder)
    files = {"both": ("hf_quant_config.json", "config.json")}
    assert config.files == files.get(layout, (f"{layout}.json",))
    assert config.format is FORMATS[format]
    assert config.exclude == ("lm_head", "model.embed_tokens")
    assert (config.kv_cache, config.producer, config.findings) == (None, "0.47.0", ())
    # config.json describes the groups of NVFP4 alone.
    lost = layout == "config" and format == "MXFP8"
    assert config.group_size == (None if lost else FORMATS[format].group_size or None)
    assert check(folder).findings == ()


@pytest.mark.parametrize("data", [nested(), flat(), flat(quant_method="modelopt_fp4")])
def test_first_file_in_either_layout(data: dict[str, Any]) -> None:
    config = parse_quantization(data, None)
    assert (config.algorithm, config.format) == ("FP8", FORMATS["FP8"])
    assert config.exclude == ("lm_head",)
    assert config.files == ("hf_quant_config.json",)


def test_flat_layout_is_recognised_by_its_producer() -> None:
    data = flat()
    del data["quant_method"]
    assert parse_quantization(data, None).format is FORMATS["FP8"]


def test_part_of_a_model() -> None:
    config = {"model_type": "vlm", "text_config": in_config(flat()), "vision_config": {"a": 1}}
    assert parse_quantization(None, config).format is FORMATS["FP8"]
    config["vision_config"] = in_config(flat())
    assert parse_quantization(None, config).files == ("config.json",)


@pytest.mark.parametrize("config", [None, {}, in_config(None), {"text_config": None}])
def test_nothing_is_said(config: dict[str, Any] | None) -> None:
    assert parse_quantization(None, config) == QuantizationConfig()


def test_folder_without_json_files(tmp_path: Path) -> None:
    assert read_quantization(tmp_path) == QuantizationConfig()


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("fp8_pb_wo", "FP8_PB_WO"),
        ("FP8_BLOCK_SCALES", "FP8_PB_WO"),
        (" nvfp4 ", "NVFP4"),
        ("fp8_per_channel_per_token", "FP8_PER_CHANNEL_PER_TOKEN"),
    ],
)
def test_spelling(written: str, name: str) -> None:
    config = parse_quantization(nested(quant_algo=written), None)
    assert config.algorithm == written
    assert config.format is FORMATS[name]


@pytest.mark.parametrize(
    ("field", "value", "kv_cache"),
    [
        ("kv_cache_quant_algo", "FP8", "FP8"),
        ("kv_cache_quant_algo", "nvfp4_affine", "NVFP4_AFFINE"),
        ("kv_cache_quant_algo", "", None),
        ("kv_cache_scheme", {"dynamic": False, "num_bits": 8, "type": "float"}, "FP8"),
        ("kv_cache_scheme", {"num_bits": 8, "type": "int"}, "INT8"),
        ("kv_cache_scheme", {"num_bits": 4, "type": "float"}, "NVFP4"),
        ("kv_cache_scheme", "NVFP4", "NVFP4"),
        ("kv_cache_scheme", {"num_bits": [8], "type": "float"}, "{'num_bits': [8], 'type':"),
    ],
)
def test_kv_cache(field: str, value: object, kv_cache: str | None) -> None:
    found = parse_quantization(flat(**{field: value}), None).kv_cache
    assert found == kv_cache or str(found).startswith(str(kv_cache))


@pytest.mark.parametrize("producer", [None, "modelopt", {"name": "modelopt"}, {"version": 1}])
def test_producer_is_not_needed(producer: object) -> None:
    assert parse_quantization({**nested(), "producer": producer}, None).producer is None


def test_group_size_from_the_described_groups() -> None:
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}}
    assert parse_quantization(flat(config_groups=groups), None).group_size == 16
    groups["group_1"] = {"weights": {"num_bits": 4, "group_size": 32}}
    assert parse_quantization(flat(config_groups=groups), None).group_size is None


CONTRADICTIONS = [
    ({"quant_algo": "NVFP4"}, "algorithm: found 'FP8' and 'NVFP4'"),
    ({"ignore": ["lm_head", "x"]}, "excluded modules: found ['lm_head'] and ['lm_head', 'x']"),
    ({"ignore": []}, "list of excluded modules: found ['lm_head'] and nothing"),
    ({"kv_cache_scheme": "NVFP4"}, "KV-cache algorithm: found nothing and 'NVFP4'"),
]


@pytest.mark.parametrize(("fields", "text"), CONTRADICTIONS)
def test_contradiction_is_a_warning(fields: dict[str, Any], text: str) -> None:
    config = parse_quantization(nested(), in_config(flat(**fields)))
    (warning,) = config.findings
    assert (warning.rule, warning.severity) == ("config-contradiction", "warning")
    assert "hf_quant_config.json and config.json contradict each other about the " in str(warning)
    assert text.replace(": found", " (file 'config.json'): found") in str(warning)
    assert "hf_quant_config.json is followed." in str(warning)
    assert config.format is FORMATS["FP8"]
    assert config.exclude == ("lm_head",)
    assert config.kv_cache is None


def test_contradiction_about_the_group_size() -> None:
    groups = {"group_0": {"weights": {"group_size": 32}}}
    section = flat(quant_algo="NVFP4", config_groups=groups)
    config = parse_quantization(nested(quant_algo="NVFP4", group_size=16), in_config(section))
    assert "about the group size (file 'config.json'): found 16 and 32" in str(config.findings[0])


def test_agreement_in_other_words() -> None:
    first = nested(quant_algo="fp8_pb_wo", exclude_modules=["b", "a", "a"])
    second = flat(quant_algo="FP8_BLOCK_SCALES", ignore=["a", "b"])
    assert parse_quantization(first, in_config(second)).findings == ()


def test_contradiction_reaches_the_report(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    edit_json(folder / "config.json", lambda data: data["quantization_config"].update(ignore=[]))
    report = check(folder)
    assert only_finding(report, "config-contradiction").severity == "warning"
    assert report.ok


@pytest.mark.parametrize(
    "data", [nested(quant_algo=None, kv_cache_quant_algo="FP8", quantized_layers={})]
)
def test_only_the_cache_is_quantized(data: dict[str, Any]) -> None:
    section = flat(kv_cache_scheme={"num_bits": 8, "type": "float"})
    del section["quant_algo"]
    for config in (parse_quantization(data, None), parse_quantization(None, in_config(section))):
        assert config.format is None
        assert config.kv_cache == "FP8"
        (warning,) = config.findings
        assert warning.severity == "warning"
        assert "the weights are not quantized, only the KV cache (FP8)" in str(warning)
    assert len(parse_quantization(data, in_config(section)).findings) == 1


@pytest.mark.parametrize(
    ("pattern", "name", "result"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("head", "lm_head", False),
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.1*", "model.layers.10.mlp", True),
        ("model.layers.1.*", "model.layers.10.mlp", False),
        ("*.mlp.gate", "model.layers.0.mlp.gate", True),
        ("*.mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("LM_HEAD", "lm_head", False),
        ("layers.[01].x", "layers.1.x", True),
        ("layers.?.x", "layers.12.x", False),
    ],
)
def test_patterns(pattern: str, name: str, result: bool) -> None:
    assert matches(name, [pattern]) is result
    assert QuantizationConfig(exclude=("other", pattern)).excludes(name) is result


NAMES = st.text("ab.*?[]!-\n", max_size=6)


@given(name=NAMES, patterns=st.lists(NAMES, max_size=4))
def test_excludes_is_fnmatch(name: str, patterns: list[str]) -> None:
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    assert matches(name, patterns) is wanted
    assert QuantizationConfig(exclude=tuple(patterns)).excludes(name) is wanted


def test_hostile_pattern_takes_no_exponential_time() -> None:
    config = QuantizationConfig(exclude=("*a" * 40 + "b",))
    assert not config.excludes("a" * 400)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_file_for_transformers(tmp_path: Path, format: str) -> None:
    folder = make_checkpoint(tmp_path / "c", format, kv_cache="FP8")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert parse_quantization_file(folder / "hf_quant_config.json") == section


@pytest.mark.parametrize(
    "layer", [{"quant_algo": "NVFP4", "group_size": 16}, {"quant_algo": "W4A16_AWQ"}]
)
def test_file_for_transformers_of_mixed_formats(tmp_path: Path, layer: dict[str, Any]) -> None:
    layers = {"a": layer}
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps(nested(quant_algo="MIXED_PRECISION", quantized_layers=layers)))
    section = parse_quantization_file(path)
    assert section["quant_method"] == "modelopt"
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert section["quantized_layers"] == layers
