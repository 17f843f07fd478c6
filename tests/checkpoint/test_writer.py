"""What is written is read back bit for bit, and nothing is half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mokernels.checkpoint import check, open_checkpoint, quantize_weight, write_checkpoint
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.formats import FORMATS
from mokernels.numerics import (
    dequantize_fp8,
    dequantize_mxfp8,
    dequantize_nvfp4,
    quantize_nvfp4_weight,
)
from tests.support.checkpoints import (
    FORMAT_NAMES,
    INDEX,
    MODEL_CONFIG,
    SINGLE,
    TINY,
    layer_tensors,
    make_checkpoint,
    only_finding,
    plain_tensors,
)

FP8 = FORMATS["FP8"]


def all_tensors(format: str) -> dict[str, Tensor]:
    tensors = plain_tensors()
    for seed, layer in enumerate(TINY):
        tensors |= layer_tensors(layer, FORMATS[format], seed=seed)
    return tensors


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("size", [1 << 30, 9_000, 1])
def test_round_trip(tmp_path: Path, format: str, size: int) -> None:
    tensors = all_tensors(format)
    folder = write_checkpoint(
        tmp_path / "c",
        iter(tensors.items()),
        MODEL_CONFIG,
        FORMATS[format],
        exclude=["lm_head", "model.embed_tokens"],
        max_shard_size=size,
    )
    assert check(folder).findings == ()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = checkpoint.tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    assert os.listdir(tmp_path) == ["c"]


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.zeros(10) for index in range(5)}
    folder = write_checkpoint(tmp_path / "c", tensors, {}, FP8, max_shard_size=80, verify=False)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    places = dict(zip(tensors, [names[0]] * 2 + [names[1]] * 2 + [names[2]], strict=True))
    assert index["weight_map"] == places


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    written: list[int] = []

    def produce() -> Iterator[tuple[str, Tensor]]:
        for index in range(6):
            (partial,) = tmp_path.iterdir()
            written.append(len(list(partial.glob("*.safetensors"))))
            yield f"t{index}", torch.zeros(10)

    write_checkpoint(tmp_path / "c", produce(), {}, FP8, max_shard_size=80, verify=False)
    # A shard is written as soon as the next tensor does not fit into it.
    assert written == [0, 0, 0, 1, 1, 2]


def test_views_and_shared_tensors_can_be_written(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "c": base.T, "d": base[:, 1]}
    folder = write_checkpoint(tmp_path / "c", tensors, {}, FP8, verify=False)
    with open_checkpoint(folder) as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.tensor(name).equal(tensor)


def test_old_quantization_config_is_replaced(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "other"}, "model_type": "llama"}
    folder = write_checkpoint(tmp_path / "c", {}, config, FP8, verify=False)
    written = json.loads((folder / "config.json").read_text())
    assert list(written) == ["model_type", "quantization_config"]
    assert written["quantization_config"]["quant_algo"] == "FP8"
    assert config["quantization_config"] == {"quant_method": "other"}


def test_kv_cache_in_both_files(tmp_path: Path) -> None:
    for name, scheme in (
        ("FP8", {"dynamic": False, "num_bits": 8, "type": "float"}),
        ("NVFP4", "NVFP4"),
    ):
        folder = make_checkpoint(tmp_path / name, "NVFP4", kv_cache=name)
        section = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert section["kv_cache_scheme"] == scheme
        keys = ["config_groups", "ignore", "quant_algo", "kv_cache_scheme", "producer"]
        assert list(section) == [*keys, "quant_method"]
        nested = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
        assert nested["kv_cache_quant_algo"] == name
        assert check(folder).findings == ()


@pytest.mark.parametrize("static", [True, False])
def test_fp8_says_whether_its_activation_scales_are_stored(tmp_path: Path, static: bool) -> None:
    folder = make_checkpoint(tmp_path / "c", input_scales=static)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    inputs = section["config_groups"]["group_0"]["input_activations"]
    assert inputs["dynamic"] is not static


def test_extra_files(tmp_path: Path) -> None:
    extra = {"tokenizer.json": b"{}"}
    folder = write_checkpoint(
        tmp_path / "c", all_tensors("FP8"), {}, FP8, exclude=["lm_head"], extra_files=extra
    )
    assert (folder / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["../x", "/x", "", "config.json", SINGLE])
def test_extra_file_of_a_bad_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="wanted the plain name of a file that is not part of"):
        write_checkpoint(tmp_path / "c", {}, {}, FP8, extra_files={name: b""}, verify=False)
    assert os.listdir(tmp_path) == []


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    make_checkpoint(tmp_path / "c")
    assert check(tmp_path / "c").ok


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "c"
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("x")
    elif kind == "file":
        target.write_text("x")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(CheckpointError) as caught:
        make_checkpoint(target)
    text = str(only_finding(caught.value, "folder-occupied"))
    assert "the folder to write exists already" in text
    assert "nothing is overwritten" in text
    assert os.listdir(tmp_path) == ["c"]


def test_nothing_is_left_when_the_tensors_fail(tmp_path: Path) -> None:
    def produce() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(4)
        raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        write_checkpoint(tmp_path / "c", produce(), {}, FP8, max_shard_size=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1, 1 << 30])
def test_tensor_that_comes_twice(tmp_path: Path, size: int) -> None:
    pairs = [("a", torch.zeros(4)), ("b", torch.zeros(4)), ("a", torch.ones(4))]
    with pytest.raises(ArgumentError, match="The tensor 'a' comes twice"):
        write_checkpoint(tmp_path / "c", pairs, {}, FP8, max_shard_size=size, verify=False)
    assert os.listdir(tmp_path) == []


def test_what_would_not_load_is_not_written(tmp_path: Path) -> None:
    tensors = all_tensors("NVFP4")
    tensors["model.layers.0.mlp.up_proj.weight_scale_2"] = torch.tensor(float("nan"))
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "c", tensors, {}, FORMATS["NVFP4"], exclude=["lm_head"])
    assert caught.value.path == str(tmp_path / "c")
    assert only_finding(caught.value, "scale-not-finite").layer == "model.layers.0.mlp.up_proj"
    assert os.listdir(tmp_path) == []


def dequantized(format: str, stored: dict[str, Tensor]) -> Tensor:
    if format == "NVFP4":
        return dequantize_nvfp4(stored["weight"], stored["weight_scale"], stored["weight_scale_2"])
    decode = dequantize_mxfp8 if format == "MXFP8" else dequantize_fp8
    return decode(stored["weight"], stored["weight_scale"])


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantized_weight(format: str, dtype: torch.dtype) -> None:
    weight = torch.randn(130, 288, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = 0.125 if FORMATS[format].input_scale else None
    stored = quantize_weight(FORMATS[format], weight, input_scale=scale)
    specs = {spec.leaf: spec for spec in FORMATS[format].tensors(130, 288)}
    assert stored.keys() == specs.keys()
    for leaf, tensor in stored.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (specs[leaf].dtype, specs[leaf].shapes[0])
    if scale:
        assert stored["input_scale"].item() == scale
    # Half a step of an element next to the largest of its scale: 2**-4 for E4M3's 3 bits; E2M1's
    # largest gap, between 4 and 6, is a third of 6, and its block scale is rounded by up to 2**-4.
    bound = (1 / 6 + 2**-4) if format == "NVFP4" else 2**-4
    error = (dequantized(format, stored) - weight.float()).abs().max()
    assert error <= bound * weight.abs().max()


def test_nvfp4_with_the_scale_of_a_fused_group() -> None:
    weight = torch.randn(16, 32)
    shared = torch.tensor(0.01)
    stored = quantize_weight(FORMATS["NVFP4"], weight, input_scale=1e-3, weight_scale_2=shared)
    codes, block, second = quantize_nvfp4_weight(weight, shared)
    assert stored["weight"].equal(codes)
    assert stored["weight_scale"].view(torch.uint8).equal(block.view(torch.uint8))
    assert stored["weight_scale_2"].equal(second)


@pytest.mark.parametrize(
    ("format", "weight", "options", "text"),
    [
        ("FP8", torch.zeros(4), {}, r"needs a float matrix \[N, K\], got torch.float32 \(4,\)"),
        ("FP8", torch.zeros(4, 4, dtype=torch.uint8), {}, "needs a float matrix"),
        ("FP8", torch.zeros(4, 4).to(torch.float8_e4m3fn), {}, "Dequantize the weight first"),
        ("FP8", torch.zeros(0, 4), {}, "is empty or holds NaN"),
        ("FP8", torch.full((4, 4), float("nan")), {}, "is empty or holds NaN or infinities"),
        ("NVFP4", torch.ones(4, 16), {}, "NVFP4 needs a calibrated input_scale"),
        ("MXFP8", torch.ones(4, 32), {"input_scale": 1.0}, "MXFP8 has no input_scale"),
        ("FP8", torch.ones(4, 4), {"input_scale": 0.0}, r"input_scale is \[0.0\], wanted one"),
        ("FP8", torch.ones(4, 4), {"input_scale": float("inf")}, "wanted one finite number"),
        ("FP8", torch.ones(4, 4), {"input_scale": torch.ones(2)}, "wanted one finite number"),
        ("FP8", torch.ones(4, 4), {"weight_scale_2": torch.ones(())}, "has no weight_scale_2"),
        ("MXFP8", torch.ones(4, 48), {}, "a multiple of 32"),
        ("NVFP4", torch.ones(4, 24), {"input_scale": 1.0}, "a multiple of 16"),
    ],
)
def test_weight_that_cannot_be_quantized(
    format: str, weight: Tensor, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArgumentError, match=text):
        quantize_weight(FORMATS[format], weight, **options)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_all_zero_weight_can_be_written(tmp_path: Path, format: str) -> None:
    """ModelOpt writes scale 0 or NaN for some of these; ours is 1, and loads."""
    scale = 0.5 if FORMATS[format].input_scale else None
    stored = quantize_weight(FORMATS[format], torch.zeros(32, 64), input_scale=scale)
    assert dequantized(format, stored).eq(0).all()
    tensors = {f"model.x.{leaf}": tensor for leaf, tensor in stored.items()}
    folder = write_checkpoint(tmp_path / "c", tensors, {}, FORMATS[format])
    assert check(folder).findings == ()
