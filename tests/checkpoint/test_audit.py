"""Checkpoints that look odd and are legal, and what a report says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mokernels.checkpoint import audit, check, open_checkpoint
from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS, Activation
from tests.support.checkpoints import (
    EXCLUDE,
    FORMAT_NAMES,
    INDEX,
    TINY,
    Linear,
    edit_json,
    edit_tensors,
    layer_tensors,
    make_checkpoint,
    only_finding,
    plain_tensors,
)

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("values", ["all", "scales", "none"])
def test_valid_checkpoint(tmp_path: Path, format: str, values: Any) -> None:
    report = check(make_checkpoint(tmp_path / "c", format), values=values)
    assert report.findings == ()
    assert report.counts == {format: len(TINY)}
    assert {layer.name: (layer.n, layer.k) for layer in report.plan.layers} == {
        layer.name: (layer.n, layer.k) for layer in TINY
    }
    assert report.require() is report.plan
    assert [bool(layer.bias) for layer in report.plan.layers] == [
        layer.bias for layer in sorted(TINY, key=lambda layer: layer.name)
    ]
    names = {f"{layer.name}.{leaf}" for layer in report.plan.layers for leaf in layer.tensors}
    biases = {f"{layer.name}.bias" for layer in report.plan.layers if layer.bias}
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert names | biases | set(report.plan.plain) == checkpoint.tensors.keys()
        assert not names & set(report.plan.plain)


def test_unknown_choice_of_values(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="values is 'some', wanted one of all, scales, none"):
        check(tmp_path, values="some")  # type: ignore[arg-type]


def test_fp8_without_any_input_scale_is_per_token(tmp_path: Path) -> None:
    report = check(make_checkpoint(tmp_path / "c", input_scales=False))
    text = str(only_finding(report, "input-scale-absent"))
    assert report.ok
    assert "no FP8 layer has an input_scale: found 5 without, wanted calibrated" in text
    assert "Activations are quantized with one dynamic scale per token instead." in text
    assert {layer.activation for layer in report.plan.layers} == {Activation.FP8_PER_TOKEN}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_weight_of_one_block(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = make_checkpoint(tmp_path / "c", "FP8_PB_WO", [Linear("model.x", 128, 100)])

    def edit(tensors: dict[str, Tensor]) -> None:
        assert tensors["model.x.weight_scale"].shape == ()
        tensors["model.x.weight_scale"] = tensors["model.x.weight_scale"].reshape(shape)

    edit_tensors(folder, edit)
    assert check(folder).findings == ()


def test_block_scales_in_two_dimensions(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", "FP8_PB_WO", [Linear("model.x", 130, 300)])

    def edit(tensors: dict[str, Tensor]) -> None:
        assert tensors["model.x.weight_scale"].shape == (2, 1, 3, 1)
        tensors["model.x.weight_scale"] = tensors["model.x.weight_scale"].reshape(2, 3)

    edit_tensors(folder, edit)
    assert check(folder).findings == ()


@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
def test_scalars_of_one_dimension(tmp_path: Path, leaf: str) -> None:
    folder = make_checkpoint(tmp_path / "c", "NVFP4")
    name = f"{UP}.{leaf}"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].reshape(1)}))
    assert check(folder).findings == ()


def test_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    plain = {"model.embed_tokens.weight": torch.zeros(48, 64, dtype=torch.bfloat16)}
    layers = [*TINY, Linear("lm_head", 48, 64)]
    config = {"tie_word_embeddings": True}
    folder = make_checkpoint(
        tmp_path / "c", "NVFP4", layers, plain=plain, exclude=("model.embed_tokens",), config=config
    )
    report = check(folder)
    assert report.findings == ()
    assert "lm_head" in {layer.name for layer in report.plan.layers}


def test_no_head(tmp_path: Path) -> None:
    plain = {"model.embed_tokens.weight": torch.zeros(48, 64, dtype=torch.bfloat16)}
    assert check(make_checkpoint(tmp_path / "c", plain=plain)).findings == ()


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_kv_cache_scales(tmp_path: Path, format: str) -> None:
    report = check(make_checkpoint(tmp_path / "c", format, kv_cache="FP8"))
    assert report.findings == ()
    assert {module: list(leaves) for module, leaves in report.plan.kv_scales.items()} == {
        "model.layers.0.self_attn.k_proj": ["k_scale"],
        "model.layers.0.self_attn.v_proj": ["v_scale"],
    }
    assert not any("k_scale" in name for name in report.plan.plain)


def test_affine_kv_cache_of_a_plain_projection(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj"
    plain = {
        **plain_tensors(),
        f"{name}.weight": torch.zeros(32, 64, dtype=torch.bfloat16),
        f"{name}.k_scale": torch.tensor(0.25),
        f"{name}.k_bias": torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16),
    }
    exclude = (*EXCLUDE, "model.layers.1*")
    folder = make_checkpoint(tmp_path / "c", plain=plain, exclude=exclude, kv_cache="NVFP4_AFFINE")
    report = check(folder)
    assert report.findings == ()
    assert list(report.plan.kv_scales[name]) == ["k_bias", "k_scale"]
    assert f"{name}.weight" in report.plan.plain


def test_unknown_kv_cache_is_a_warning(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", kv_cache="FP3", layout="hf_quant_config")
    text = str(only_finding(check(folder), "kv-cache-unknown"))
    assert "found FP3, wanted one of FP8, NVFP4, NVFP4_AFFINE, INT8" in text
    assert "The cache stays in the model's dtype." in text
    assert check(folder).ok


@pytest.mark.parametrize("size", [None, 0, 128])
def test_group_size_that_fp8_pb_wo_may_have(tmp_path: Path, size: int | None) -> None:
    folder = make_checkpoint(tmp_path / "c", "FP8_PB_WO")
    path = folder / "hf_quant_config.json"
    edit_json(path, lambda data: data["quantization"].update(group_size=size))
    assert check(folder).findings == ()


def test_plain_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", layers=())
    (folder / "hf_quant_config.json").unlink()
    edit_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    report = check(folder)
    assert report.ok
    text = str(only_finding(report, "not-quantized"))
    assert "this is not a quantized checkpoint" in text


def test_other_tensors_are_left_alone(tmp_path: Path) -> None:
    plain = plain_tensors() | {
        "model.mask": torch.ones(4, 4, dtype=torch.bool),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.ids": torch.arange(4),
        "model.logit_scale": torch.tensor(0.0),
        "model.conv.weight": torch.zeros(4, 4, 3),
        "model.layers.0.norm.weight": torch.zeros(4),
        "x": torch.zeros(2),
    }
    report = check(make_checkpoint(tmp_path / "c", plain=plain))
    assert report.findings == ()
    assert set(report.plan.plain) == plain.keys()


@pytest.mark.parametrize("name", ["model.embed_tokens", "transformer.wte", "a.word_embeddings"])
def test_embeddings_need_no_exclusion(tmp_path: Path, name: str) -> None:
    plain = {f"{name}.weight": torch.zeros(8, 8)}
    assert check(make_checkpoint(tmp_path / "c", plain=plain, exclude=())).findings == ()


def test_matrix_that_is_not_excluded_is_a_warning(tmp_path: Path) -> None:
    plain = {"model.layers.0.mlp.gate.weight": torch.zeros(8, 8)}
    report = check(make_checkpoint(tmp_path / "c", plain=plain, exclude=()))
    assert report.ok
    finding = only_finding(report, "listed-but-plain")
    assert finding.severity == "warning"
    assert "it may be a linear layer" in str(finding)
    assert "or a pattern in exclude_modules that matches it" in str(finding)


@pytest.mark.parametrize(
    ("version", "errors"),
    [("0.33.1", 0), ("0.38.0", 0), ("0.39.0", 1), ("1.0.0", 1), (None, 1), ("dev", 1)],
)
def test_vision_towers_of_old_exports(tmp_path: Path, version: str | None, errors: int) -> None:
    """ModelOpt did not list them among the exclusions before 0.39."""
    plain = {"vision_tower.layers.0.mlp.up_proj.weight": torch.zeros(8, 8)}
    folder = make_checkpoint(tmp_path / "c", plain=plain, layout="hf_quant_config")
    path = folder / "hf_quant_config.json"
    edit_json(path, lambda data: data["producer"].update(version=version))
    assert len(check(folder).errors) == errors


def test_numbered_modules_are_told_apart_by_their_list(tmp_path: Path) -> None:
    plain = {"model.router.0.weight": torch.zeros(8, 8)}
    layers = [Linear("model.mlp.0"), Linear("model.mlp.2")]
    report = check(make_checkpoint(tmp_path / "c", layers=layers, plain=plain, exclude=()))
    assert only_finding(report, "listed-but-plain").severity == "warning"


def test_only_the_linear_layers_of_the_model_have_to_be_quantized(tmp_path: Path) -> None:
    plain = {"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8)}
    folder = make_checkpoint(tmp_path / "c", plain=plain)
    assert not check(folder).ok
    with open_checkpoint(folder) as checkpoint:
        assert audit(checkpoint, linear_names=[UP, "model.absent"]).findings == ()


def test_layers_are_in_natural_order(tmp_path: Path) -> None:
    names = [f"model.layers.{index}.x" for index in (0, 1, 2, 9, 10, 11, 100)]
    layers = [Linear(name) for name in reversed(names)]
    report = check(make_checkpoint(tmp_path / "c", layers=layers))
    assert [layer.name for layer in report.plan.layers] == names


def test_layer_with_a_name_of_many_digits(tmp_path: Path) -> None:
    layers = [Linear("model." + "9" * 5000), Linear("model.1"), Linear("top")]
    assert check(make_checkpoint(tmp_path / "c", layers=layers)).findings == ()


def test_report_as_text(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", "NVFP4", max_shard_size=20_000)
    report = check(folder)
    count = len(list(folder.glob("*.safetensors")))
    head, layers, sizes, read = str(report).splitlines()
    assert head == f"{folder}: ok"
    assert layers == "  5 layers of NVFP4 (activations: nvfp4)"
    assert sizes == (
        f"  24 tensors in {count} files, {report.nbytes:,} bytes, "
        f"{report.quantized_nbytes:,} of them quantized"
    )
    assert read == "  read: all values"
    stored = [layer_tensors(layer, FORMATS["NVFP4"]) for layer in TINY]
    wanted = sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
    assert report.quantized_nbytes == wanted


def test_report_with_findings_as_text(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", exclude=())
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    lines = str(check(folder, values="scales")).splitlines()
    assert lines[0] == f"{folder}: not ok, 1 error, 1 warning"
    assert lines[3] == "  read: the scales"
    assert lines[4].startswith("  error [tensor-missing] a layer of FP8 lacks its weight_scale")
    assert lines[5].startswith("  warning [listed-but-plain] the layer is neither quantized nor")


def test_report_without_readable_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", max_shard_size=20_000)
    (folder / INDEX).write_text("{")
    lines = str(check(folder)).splitlines()
    assert lines[0] == f"{folder}: not ok, 1 error, 0 warnings"
    assert lines[1].startswith("  error [json-invalid]")
