"""JSON files that are broken, contradictory or of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mokernels.checkpoint import check, parse_quantization, read_quantization
from mokernels.checkpoint.files import MAX_JSON_BYTES
from mokernels.errors import CheckpointError, UnsupportedFormatError
from mokernels.formats import LATER_FORMATS
from tests.support.checkpoints import edit_json, make_checkpoint, only_finding

FILES = ("hf_quant_config.json", "config.json")


def refused(folder: Path, rule: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_quantization(folder)
    finding = only_finding(caught.value, rule)
    assert only_finding(check(folder), rule) == finding
    return str(finding)


def nested(**fields: Any) -> dict[str, Any]:
    body = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": [], **fields}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": body}


def refusal(data: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse_quantization(data, None, path="x")
    return caught.value


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "a list at the top"),
        (b"null", "a NoneType at the top"),
        (b"\xff\xfe{\x00}\x00", "invalid start byte"),
        (b'{"quantization": {"quant_algo": "FP8", "quant_algo": "NVFP4"}}', "'quant_algo' twice"),
        (b'{"a": Infinity}', "the number Infinity"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_no_json(folder: Path, file: str, content: bytes, found: str) -> None:
    (folder / file).write_bytes(content)
    text = refused(folder, "json-invalid")
    assert f"the text is not valid JSON (file {file!r})" in text
    assert found in text
    assert text.endswith("wanted one JSON object in UTF-8. Download or copy the file again.")


@pytest.mark.parametrize("file", FILES)
def test_huge_file(folder: Path, file: str) -> None:
    with (folder / file).open("wb") as opened:
        opened.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no room on the disk
    text = refused(folder, "json-size")
    assert "too large to be one of a checkpoint" in text
    assert "found 100000001 bytes, wanted at most 100000000" in text


def test_both_files_broken_are_both_named(folder: Path) -> None:
    for file in FILES:
        (folder / file).write_text("{")
    with pytest.raises(CheckpointError) as caught:
        read_quantization(folder)
    assert [finding.file for finding in caught.value.findings] == list(FILES)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("quant_algo", 8, "the name of an algorithm"),
        ("quant_algo", ["FP8"], "the name of an algorithm"),
        ("exclude_modules", "lm_head", "a list of module names"),
        ("exclude_modules", [1], "a list of module names"),
        ("group_size", "16", "a number of elements"),
        ("group_size", True, "a number of elements"),
        ("kv_cache_quant_algo", 8, "a name, an object or null"),
        ("config_groups", [], "an object"),
        ("quantized_layers", [], "an object"),
        (
            "quantized_layers",
            {"a": "FP8"},
            "an object with a quant_algo and, if any, a number as group_size",
        ),
    ],
)
def test_wrong_type(field: str, value: object, wanted: str) -> None:
    text = str(only_finding(refusal(nested(**{field: value})), "config-type"))
    assert f"the field {field!r} has the wrong type (file 'hf_quant_config.json')" in text
    assert f"wanted {wanted}." in text
    assert "Restore the file as nvidia-modelopt wrote it, or export the model again." in text


def test_sections_of_the_wrong_type() -> None:
    text = str(only_finding(refusal({"quantization": "FP8"}), "config-type"))
    assert "'quantization' has the wrong type" in text
    with pytest.raises(CheckpointError, match="'quantization_config' has the wrong type"):
        parse_quantization(None, {"quantization_config": "modelopt"})


@pytest.mark.parametrize(("algorithm", "found"), [("", "an empty"), ("  ", "an empty")])
def test_empty_algorithm(algorithm: str, found: str) -> None:
    text = str(only_finding(refusal(nested(quant_algo=algorithm)), "algorithm-missing"))
    assert f"found {found} quant_algo" in text


def test_no_algorithm() -> None:
    data = nested()
    del data["quantization"]["quant_algo"]
    text = str(only_finding(refusal(data), "algorithm-missing"))
    assert text == (
        "the configuration does not say which algorithm quantized the weights (file "
        "'hf_quant_config.json'): found no quant_algo, wanted one of FP8, "
        "FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, MXFP8. Restore the file as nvidia-modelopt "
        "wrote it, or export the model again."
    )


@pytest.mark.parametrize("name", ["INT3", "fp8_pb_real", "FP8 E5M2", "\N{SNOWMAN}"])
def test_unknown_algorithm(folder: Path, name: str) -> None:
    edit_json(
        folder / "hf_quant_config.json", lambda data: data["quantization"].update(quant_algo=name)
    )
    with pytest.raises(UnsupportedFormatError) as caught:
        read_quantization(folder)
    text = str(only_finding(caught.value, "format-unsupported"))
    assert f"found {name!r}, wanted one of FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, " in text
    assert "Quantize the model with one of these, or update mokernels." in text
    with pytest.raises(UnsupportedFormatError):
        check(folder).require()


@pytest.mark.parametrize("name", LATER_FORMATS)
def test_algorithm_of_a_later_version(name: str) -> None:
    error = refusal(nested(quant_algo=name.lower()))
    assert isinstance(error, UnsupportedFormatError)
    text = str(only_finding(error, "format-unsupported"))
    assert f"{name} is an algorithm of ModelOpt that mokernels does not run yet; take a" in text


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "", 1])
def test_other_quantization_method(folder: Path, method: object) -> None:
    edit_json(
        folder / "config.json",
        lambda data: data["quantization_config"].update(quant_method=method),
    )
    (folder / "hf_quant_config.json").unlink()
    text = refused(folder, "method-unsupported")
    assert f"not quantized by ModelOpt (file 'config.json'): found quant_method {method!r}" in text
    assert "Load it with the library that it is meant for." in text


def test_other_method_beside_our_file_is_not_ignored(folder: Path) -> None:
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(folder / "config.json", lambda data: data.update(quantization_config=section))
    with pytest.raises(UnsupportedFormatError):
        read_quantization(folder)


def test_parts_with_different_quantizations() -> None:
    part = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    other = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    with pytest.raises(CheckpointError) as caught:
        parse_quantization(None, {"text_config": part, "vision_config": other})
    text = str(only_finding(caught.value, "config-ambiguous"))
    assert "several parts of the model have their own quantization_config" in text
    assert "found text_config, vision_config" in text


@pytest.mark.parametrize(
    ("format", "size", "wanted"),
    [("NVFP4", 32, "16"), ("MXFP8", 16, "32"), ("FP8", 128, "none"), ("FP8_PB_WO", 64, "none")],
)
def test_group_size_of_another_format(tmp_path: Path, format: str, size: int, wanted: str) -> None:
    folder = make_checkpoint(tmp_path / "c", format, layout="hf_quant_config")
    path = folder / "hf_quant_config.json"
    edit_json(path, lambda data: data["quantization"].update(group_size=size))
    text = str(only_finding(check(folder), "group-size"))
    assert f"the group size does not fit {format} (file 'hf_quant_config.json')" in text
    assert f"found {size}, wanted {wanted}" in text


def test_unquantized_weights_that_are_quantized(folder: Path) -> None:
    for file in FILES:
        (folder / file).unlink()
    (folder / "hf_quant_config.json").write_text(json.dumps(nested(quant_algo=None)))
    report = check(folder)
    (error,) = report.errors
    assert error.rule == "config-contradicts-tensors"
    assert "nothing says which algorithm made them (file 'hf_quant_config.json'" in str(error)


def test_codes_without_any_configuration(folder: Path) -> None:
    (folder / "hf_quant_config.json").unlink()
    edit_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    text = str(only_finding(check(folder), "config-missing"))
    assert "the checkpoint holds quantized weights, and nothing says which algorithm" in text
    assert "(layer 'model.layers.0.mlp.down_proj'): found 5 quantized modules" in text
    assert "Loaded as plain weights they would give garbage. They look like FP8." in text


def test_algorithm_without_quantized_layers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", "NVFP4", layers=())
    text = str(only_finding(check(folder), "nothing-quantized"))
    assert "names an algorithm and no module is quantized" in text
    assert "found NVFP4 and no weight_scale" in text


def test_all_of_report_can_be_raised(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    report = check(folder)
    assert not report.ok
    with pytest.raises(CheckpointError) as caught:
        report.require()
    assert caught.value.findings == report.errors
    assert not isinstance(caught.value, UnsupportedFormatError)
