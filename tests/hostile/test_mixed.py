"""Checkpoints whose layers have different formats, and lists of them that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mokernels.checkpoint import check, parse_quantization
from mokernels.errors import CheckpointError, UnsupportedFormatError
from mokernels.formats import FORMATS
from tests.support.checkpoints import edit_json, edit_tensors, make_checkpoint, only_finding

ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "FP8")
MIXED = {**ATTENTION, "up_proj": "NVFP4", "down_proj": "FP8_PB_WO"}
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
FILES = ("hf_quant_config.json", "config.json")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "c", MIXED)


def relist(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change quantized_layers in both files."""
    for file in FILES:
        edit_json(
            folder / file,
            lambda data: edit(
                data.get("quantization", data.get("quantization_config"))["quantized_layers"]
            ),
        )


def error(folder: Path, rule: str) -> str:
    finding = only_finding(check(folder), rule)
    assert finding.severity == "error"
    return str(finding)


def refusal(**fields: Any) -> CheckpointError:
    data = {"quantization": {"quant_algo": "MIXED_PRECISION", **fields}}
    with pytest.raises(CheckpointError) as caught:
        parse_quantization(data, None, path="x")
    return caught.value


def test_every_layer_has_its_own_format(mixed: Path) -> None:
    report = check(mixed)
    assert report.findings == ()
    assert report.counts == {"FP8": 3, "NVFP4": 1, "FP8_PB_WO": 1}
    formats = {layer.name.rpartition(".")[2]: layer.format.name for layer in report.plan.layers}
    assert formats == MIXED
    assert report.plan.config.format_of("lm_head") is None


@pytest.mark.parametrize("layout", ["config", "hf_quant_config"])
def test_one_of_the_files_is_enough(tmp_path: Path, layout: Any) -> None:
    report = check(make_checkpoint(tmp_path / "c", MIXED, layout=layout))
    assert report.findings == ()
    assert len(report.plan.layers) == 5


def test_quantized_layer_that_is_not_listed(mixed: Path) -> None:
    relist(mixed, lambda layers: layers.pop(UP))
    text = error(mixed, "quantized-but-unlisted")
    assert "the layer is quantized, and the configuration lists it with no algorithm" in text
    assert "(tensors of NVFP4), wanted the layer among quantized_layers" in text


def test_listed_layer_that_is_plain(mixed: Path) -> None:
    relist(mixed, lambda layers: layers.update(lm_head={"quant_algo": "FP8"}))
    text = error(mixed, "listed-but-plain")
    assert "the configuration lists the layer as quantized, and it is not" in text
    assert "take it out of quantized_layers" in text


def test_listed_layer_that_is_not_there(mixed: Path) -> None:
    edit_tensors(mixed, lambda tensors: [tensors.pop(n) for n in [*tensors] if UP in n])
    text = error(mixed, "listed-but-missing")
    assert f"(file 'hf_quant_config.json', layer '{UP}'): found no tensor of that name" in text
    assert "wanted the tensors of a layer of NVFP4" in text


def test_layer_of_another_format_than_listed(mixed: Path) -> None:
    relist(mixed, lambda layers: layers.update({UP: {"quant_algo": "FP8"}}))
    text = error(mixed, "format-contradiction")
    assert "found tensors of NVFP4, wanted tensors of FP8" in text


def test_group_size_of_a_listed_layer(mixed: Path) -> None:
    relist(mixed, lambda layers: layers[UP].update(group_size=32))
    text = error(mixed, "group-size")
    assert f"the group size does not fit NVFP4 (file 'hf_quant_config.json', layer '{UP}')" in text
    assert "found 32, wanted 16" in text


def test_container_stands_for_what_is_inside(mixed: Path) -> None:
    def by_container(layers: dict[str, Any]) -> None:
        for name in [name for name in layers if "self_attn" in name]:
            del layers[name]
        layers["model.layers.0.self_attn"] = {"quant_algo": "FP8"}

    relist(mixed, by_container)
    report = check(mixed)
    assert report.findings == ()
    assert report.counts["FP8"] == 3
    config = report.plan.config
    assert config.format_of("model.layers.0.self_attn.q_proj") is FORMATS["FP8"]
    assert config.format_of("model.layers.0.self_attn_2.q_proj") is None


def test_files_that_list_a_layer_differently(mixed: Path) -> None:
    edit_json(
        mixed / "config.json",
        lambda data: data["quantization_config"]["quantized_layers"].update(
            {UP: {"quant_algo": "MXFP8"}}
        ),
    )
    (warning,) = check(mixed).warnings
    assert warning.rule == "config-contradiction"
    assert "contradict each other about the list of quantized layers" in str(warning)
    assert f"found {{'{UP}': 'NVFP4 in groups of 16'}} and {{" in str(warning)


def test_algorithm_that_is_not_run_is_named_with_its_layer() -> None:
    layers = {
        "a": {"quant_algo": "FP8"},
        "b": {"quant_algo": "W4A16_AWQ", "group_size": 128},
        "c": {"quant_algo": "w4a16_awq", "group_size": 128},
    }
    refused = refusal(quantized_layers=layers)
    assert isinstance(refused, UnsupportedFormatError)
    text = str(only_finding(refused, "format-unsupported"))
    assert "does not run an algorithm of the checkpoint's layers (" in text
    assert "layer 'b'): found 'W4A16_AWQ' of 2 of 3 layers, wanted one of FP8, " in text
    assert "W4A16_AWQ is an algorithm of ModelOpt that mokernels does not run yet." in text


@pytest.mark.parametrize("fields", [{}, {"quantized_layers": {}}, {"quantized_layers": None}])
def test_no_list(fields: dict[str, Any]) -> None:
    text = str(only_finding(refusal(**fields), "layers-missing"))
    assert "mixes formats and does not say which layer has which" in text
    assert "found MIXED_PRECISION and no quantized_layers" in text


@pytest.mark.parametrize(
    "entry",
    [None, "FP8", [], {}, {"quant_algo": None}, {"quant_algo": 8}]
    + [{"quant_algo": "NVFP4", "group_size": size} for size in ("16", True, 16.0, [16])],
)
def test_entry_of_the_wrong_type(entry: object) -> None:
    text = str(only_finding(refusal(quantized_layers={"a": entry}), "config-type"))
    assert "the field 'quantized_layers' has the wrong type" in text
    assert "wanted an object with a quant_algo and, if any, a number as group_size" in text


@pytest.mark.parametrize("algorithm", ["FP8", None])
def test_list_beside_one_algorithm(algorithm: str | None) -> None:
    layers = {"a": {"quant_algo": "NVFP4"}}
    refused = refusal(quant_algo=algorithm, quantized_layers=layers)
    text = str(only_finding(refused, "layers-contradiction"))
    assert f"found quant_algo {algorithm!r} and NVFP4 for the layer, wanted" in text
