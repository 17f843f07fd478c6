"""Layers with missing, foreign, misshapen or converted tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mokernels.checkpoint import audit, check, open_checkpoint
from tests.support.checkpoints import (
    FORMAT_NAMES,
    Linear,
    edit_json,
    edit_tensors,
    make_checkpoint,
    only_finding,
)

UP = "model.layers.0.mlp.up_proj"
K = "model.layers.0.self_attn.k_proj"
Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint and damages it."""

    def make(format: str, edit: Callable[[Tensors], object], **options: object) -> Path:
        folder = make_checkpoint(tmp_path / "c", format, **options)  # type: ignore[arg-type]
        assert check(folder).errors == ()
        edit_tensors(folder, edit)
        return folder

    return make


def error(folder: Path, rule: str) -> str:
    """Text of the only finding, which header-only audits have to find too."""
    finding = only_finding(check(folder), rule)
    assert only_finding(check(folder, values="none"), rule) == finding
    assert finding.severity == "error"
    return str(finding)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_no_weight_scale(damaged: Callable[..., Path], format: str) -> None:
    folder = damaged(format, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    text = error(folder, "tensor-missing")
    assert f"a layer of {format} lacks its weight_scale (file 'model.safetensors', layer" in text
    assert f"wanted '{UP}.weight_scale'. A guessed scale gives wrong numbers." in text


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_2", "input_scale"])
def test_nvfp4_needs_all_three_scales(damaged: Callable[..., Path], leaf: str) -> None:
    folder = damaged("NVFP4", lambda tensors: tensors.pop(f"{UP}.{leaf}"))
    assert f"a layer of NVFP4 lacks its {leaf}" in error(folder, "tensor-missing")


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_no_weight(damaged: Callable[..., Path], format: str) -> None:
    folder = damaged(format, lambda tensors: tensors.pop(f"{UP}.weight"))
    text = error(folder, "weight-missing")
    assert "the layer has scales and no weight" in text
    assert f"wanted '{UP}.weight'. Download all the shards again" in text


def test_some_fp8_layers_without_input_scale(damaged: Callable[..., Path]) -> None:
    folder = damaged("FP8", lambda tensors: tensors.pop(f"{UP}.input_scale"))
    text = error(folder, "input-scale-partial")
    assert "has no input_scale, and other FP8 layers of the checkpoint have one" in text
    assert "found 1 of 5 FP8 layers without" in text


@pytest.mark.parametrize(
    ("leaf", "owner"),
    [
        ("pre_quant_scale", "the AWQ, SVD and SmoothQuant algorithms of ModelOpt"),
        ("weight_scale_inv", "DeepSeek's FP8 layout"),
        ("weight_quantizer._svdquant_lora_a", "ModelOpt's NVFP4_SVD"),
        ("weight_packed", "compressed-tensors"),
        ("qweight", "GPTQ or AutoAWQ"),
    ],
)
@pytest.mark.parametrize("module", [UP, "model.layers.0.other"])
def test_tensor_of_another_algorithm(
    damaged: Callable[..., Path], leaf: str, owner: str, module: str
) -> None:
    folder = damaged("FP8", lambda tensors: tensors.update({f"{module}.{leaf}": torch.ones(4)}))
    text = error(folder, "tensor-foreign")
    assert f"the tensor belongs to {owner}, which this version does not run" in text
    assert f"tensor '{module}.{leaf}', layer {module!r})" in text


@pytest.mark.parametrize("leaf", ["weight_scale_2", "zero_point", "k_scale_extra"])
def test_unknown_tensor_on_a_layer(damaged: Callable[..., Path], leaf: str) -> None:
    folder = damaged("FP8", lambda tensors: tensors.update({f"{UP}.{leaf}": torch.ones(())}))
    text = error(folder, "tensor-unknown")
    assert f"none that a layer of FP8 has (file 'model.safetensors', tensor '{UP}.{leaf}'" in text
    assert "found float32 [], wanted only weight, weight_scale, input_scale and bias" in text


@pytest.mark.parametrize(
    ("format", "leaf", "dtype", "wanted"),
    [
        ("FP8", "weight", torch.uint8, "float8_e4m3fn"),
        ("FP8", "weight", torch.float8_e5m2, "float8_e4m3fn"),
        ("FP8", "weight", torch.bfloat16, "float8_e4m3fn"),
        ("FP8", "weight_scale", torch.bfloat16, "float32"),
        ("FP8", "input_scale", torch.float16, "float32"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", torch.bfloat16, "float32"),
        ("FP8_PB_WO", "weight_scale", torch.float64, "float32"),
        ("NVFP4", "weight", torch.int8, "uint8"),
        ("NVFP4", "weight_scale", torch.float32, "float8_e4m3fn"),
        ("NVFP4", "weight_scale", torch.uint8, "float8_e4m3fn"),
        ("NVFP4", "weight_scale_2", torch.bfloat16, "float32"),
        ("NVFP4", "input_scale", torch.float64, "float32"),
        ("MXFP8", "weight_scale", torch.float8_e8m0fnu, "uint8"),
        ("MXFP8", "weight_scale", torch.float32, "uint8"),
    ],
)
def test_converted_tensor(
    damaged: Callable[..., Path], format: str, leaf: str, dtype: torch.dtype, wanted: str
) -> None:
    name = f"{UP}.{leaf}"

    def edit(tensors: Tensors) -> None:
        tensor = tensors[name]
        same_size = tensor.dtype.itemsize == dtype.itemsize
        tensors[name] = tensor.view(dtype) if same_size else tensor.to(torch.float32).to(dtype)

    text = error(damaged(format, edit), "tensor-dtype")
    assert f"the {leaf} has not the dtype of {format} (file 'model.safetensors', tensor" in text
    assert f"found {str(dtype).removeprefix('torch.')}, wanted {wanted}." in text
    assert "Something has converted the tensor. Export the model again" in text


@pytest.mark.parametrize(
    ("format", "leaf", "shape", "wanted"),
    [
        ("FP8", "weight_scale", (2,), "[] or [1]"),
        ("FP8", "input_scale", (1, 1), "[] or [1]"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", (64,), "[160]"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", (160, 1), "[160]"),
        ("FP8_PB_WO", "weight_scale", (1, 2), "[2, 1, 1, 1] or [2, 1]"),
        ("NVFP4", "weight_scale", (160, 2), "[160, 4]"),
        ("NVFP4", "weight_scale", (4, 160), "[160, 4]"),
        ("NVFP4", "weight_scale_2", (160,), "[] or [1]"),
        ("MXFP8", "weight_scale", (160, 4), "[160, 2]"),
    ],
)
def test_misshapen_scale(
    damaged: Callable[..., Path], format: str, leaf: str, shape: tuple[int, ...], wanted: str
) -> None:
    def edit(tensors: Tensors) -> None:
        dtype = tensors[f"{UP}.{leaf}"].dtype
        tensors[f"{UP}.{leaf}"] = torch.full(shape, 2.0).to(dtype)

    text = error(damaged(format, edit), "tensor-shape")
    assert f"the {leaf} has not the shape of {format}" in text
    assert f"found {list(shape)}, wanted {wanted}." in text


@pytest.mark.parametrize(("format", "wanted"), [("FP8", "[N, K]"), ("NVFP4", "[N, K / 2]")])
def test_weight_that_is_no_matrix(damaged: Callable[..., Path], format: str, wanted: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].reshape(2, 80, -1)

    text = error(damaged(format, edit), "tensor-shape")
    assert f"wanted {wanted}" in text


@pytest.mark.parametrize(("format", "k", "multiple"), [("NVFP4", 56, 16), ("MXFP8", 56, 32)])
@pytest.mark.parametrize("scales", ["of every group", "of whole groups"])
def test_input_features_that_the_groups_do_not_divide(
    damaged: Callable[..., Path], format: str, k: int, multiple: int, scales: str
) -> None:
    def edit(tensors: Tensors) -> None:
        columns = k // 2 if format == "NVFP4" else k
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:, :columns].contiguous()
        groups = -(-k // multiple) if scales == "of every group" else k // multiple
        scale = tensors[f"{UP}.weight_scale"]
        tensors[f"{UP}.weight_scale"] = scale[:, :groups].contiguous()

    text = error(damaged(format, edit), "k-multiple")
    assert f"found K = {k}, wanted a multiple of {multiple}." in text


@pytest.mark.parametrize(
    ("bias", "rule", "found", "wanted"),
    [
        (torch.zeros(63), "tensor-shape", "[63]", "[64]"),
        (torch.zeros(64, dtype=torch.int32), "tensor-dtype", "int32", "bfloat16, float16 or"),
        (
            torch.zeros(64, dtype=torch.float8_e4m3fn),
            "codes-without-layer",
            "float8_e4m3fn [64]",
            "a 16-bit or 32-bit tensor",
        ),
    ],
)
def test_bias(
    damaged: Callable[..., Path], bias: Tensor, rule: str, found: str, wanted: str
) -> None:
    folder = damaged("FP8", lambda tensors: tensors.update({f"{Q}.bias": bias}))
    report = check(folder, values="none")
    finding = next(finding for finding in report.errors if finding.rule == rule)
    assert f"found {found}, wanted {wanted}" in str(finding)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [("FP8", "FP8_PB_WO"), ("NVFP4", "FP8"), ("MXFP8", "NVFP4"), ("FP8_PB_WO", "MXFP8")],
)
def test_layers_of_another_format(tmp_path: Path, config: str, tensors: str) -> None:
    layer = Linear("model.layers.0.mlp.up_proj", 160, 64)
    folder = make_checkpoint(tmp_path / "c", tensors, [layer])
    other = make_checkpoint(tmp_path / "other", config, [layer])
    for file in ("config.json", "hf_quant_config.json"):
        (folder / file).write_bytes((other / file).read_bytes())
    text = error(folder, "format-contradiction")
    assert "not of the format that the configuration names" in text
    assert f"found tensors of {tensors}, wanted tensors of {config}." in text
    assert "mokernels would have to guess, so it does not load the checkpoint." in text


def test_quantized_layer_that_is_excluded(folder: Path) -> None:
    for file, path in (("hf_quant_config.json", "quantization"), ("config.json", None)):
        edit_json(
            folder / file,
            lambda data, path=path: data.get(path, data.get("quantization_config")).update(
                {"exclude_modules" if path else "ignore": ["lm_head", "model.embed*", "*.mlp.u*"]}
            ),
        )
    text = error(folder, "excluded-but-quantized")
    assert "is quantized, and the configuration excludes it from quantization" in text
    assert f"(file 'hf_quant_config.json', layer {UP!r})" in text


@pytest.mark.parametrize("leaf", ["gate_up_proj_weight_scale", "down_proj_input_scale"])
def test_fused_experts(damaged: Callable[..., Path], leaf: str) -> None:
    name = f"model.layers.0.mlp.experts.{leaf}"
    folder = damaged("FP8", lambda tensors: tensors.update({name: torch.ones(8)}))
    text = error(folder, "experts-fused")
    assert "belongs to experts that are stored as one 3-D tensor" in text
    assert f"tensor {name!r}" in text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj", "model.codes"])
def test_codes_that_belong_to_no_layer(
    damaged: Callable[..., Path], name: str, dtype: torch.dtype
) -> None:
    codes = torch.zeros(2, 8, 8).to(dtype)
    folder = damaged("FP8", lambda tensors: tensors.update({name: codes}))
    text = error(folder, "codes-without-layer")
    assert "the tensor holds FP8 codes and is not the weight of a linear layer" in text
    assert "As plain numbers the codes would give garbage." in text


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_codes_without_scales(damaged: Callable[..., Path], dtype: torch.dtype) -> None:
    codes = torch.zeros(8, 8).to(dtype)
    folder = damaged("NVFP4", lambda tensors: tensors.update({"model.x.weight": codes}))
    findings = check(folder, values="none").errors
    assert {finding.layer for finding in findings} == {"model.x"}
    assert {"weight_scale", "weight_scale_2", "input_scale"} <= {
        str(finding).split(" lacks its ")[1].split(" ")[0]
        for finding in findings
        if finding.rule == "tensor-missing"
    }


@pytest.mark.parametrize(
    ("values", "rule", "text"),
    [
        (torch.ones(2), "tensor-shape", "found [2], wanted [] or [1]"),
        (torch.ones((), dtype=torch.bfloat16), "tensor-dtype", "found bfloat16, wanted float32"),
    ],
)
def test_kv_scale_of_another_kind(
    damaged: Callable[..., Path], values: Tensor, rule: str, text: str
) -> None:
    edit = {f"{K}.k_scale": values}
    folder = damaged("FP8", lambda tensors: tensors.update(edit), kv_cache="FP8")
    assert text in error(folder, rule)


@pytest.mark.parametrize(
    ("module", "leaf"),
    [(Q, "k_scale"), ("model.layers.0.self_attn.v_proj", "k_scale"), ("model.attn", "v_scale")],
)
def test_kv_scale_in_the_wrong_place(damaged: Callable[..., Path], module: str, leaf: str) -> None:
    folder = damaged("FP8", lambda tensors: tensors.update({f"{module}.{leaf}": torch.ones(())}))
    (finding, *_) = check(folder).errors
    assert finding.rule == "kv-scale-misplaced"
    assert f"found module {module!r}, wanted a module called {leaf[0]}_proj" in str(finding)


def to_plain(module: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            shape = tensors.pop(name).shape
            if name.endswith(".weight"):
                tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)

    return edit


TWO_LAYERS = [Linear(f"model.layers.{index}.mlp.up_proj") for index in range(2)]


def test_layer_that_was_left_out(damaged: Callable[..., Path]) -> None:
    folder = damaged("FP8", to_plain("model.layers.1.mlp.up_proj"), layers=TWO_LAYERS)
    text = error(folder, "listed-but-plain")
    assert "neither quantized nor excluded, and layers of the same name are quantized" in text
    assert "found a plain weight of bfloat16 and no weight_scale, wanted a layer of FP8" in text


def test_linear_layer_of_the_model_that_was_left_out(damaged: Callable[..., Path]) -> None:
    name = "model.extra"
    plain = {f"{name}.weight": torch.zeros(8, 8)}
    folder = make = damaged("FP8", lambda tensors: tensors.update(plain))
    assert only_finding(check(make), "listed-but-plain").severity == "warning"
    with open_checkpoint(folder) as checkpoint:
        assert audit(checkpoint, linear_names=[UP, "lm_head"]).findings == ()
        report = audit(checkpoint, linear_names=[UP, "lm_head", name])
    finding = only_finding(report, "listed-but-plain")
    assert finding.severity == "error"
    assert "neither quantized nor excluded, and it is a linear layer of the model" in str(finding)
