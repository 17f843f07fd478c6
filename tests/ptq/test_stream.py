"""Folders quantized without a model: equal to those of the model, and nothing half written."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mokernels
from mokernels.checkpoint import stream as shards
from mokernels.errors import ArgumentError, CalibrationError
from mokernels.evaluate.weights import compare_weights
from mokernels.ptq.report import REPORT_FILE
from tests.support.compare import assert_same_bits
from tests.support.models import tiny_model

FORMATS = ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8")
LAYER = "model.layers.0.mlp.down_proj"


def tensors_of(folder):
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def saved(tmp_path, architecture="Llama", shard="10GB", **options):
    folder = tmp_path / "plain"
    tiny_model(architecture, **options).save_pretrained(folder, max_shard_size=shard)
    return folder


def stream(source, out, config="MXFP8", **options):
    return mokernels.quantize_checkpoint(source, out, config, progress=False, **options)


def edited(source, edit):
    tensors = {name: t.clone() for name, t in load_file(source / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_result_is_that_of_the_model(tmp_path, format, architecture, tied):
    source = saved(tmp_path, architecture, "200KB" if tied else "10GB", tied=tied)
    found = stream(source, tmp_path / "streamed", format)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    mokernels.quantize(model, format, progress=False)
    expected = mokernels.export(model, tmp_path / "exported", reload=False)
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(ours[name], tensor)
    for name in ("config.json", "hf_quant_config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_shards_of_a_size(tmp_path):
    source = saved(tmp_path)
    one, many = stream(source, tmp_path / "one"), stream(source, tmp_path / "m", max_shard_size=1)
    assert len(list(many.glob("*.safetensors"))) > 20
    assert mokernels.check(many).ok
    ours, theirs = tensors_of(many), tensors_of(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(ours[name], tensor)


@pytest.mark.parametrize("format", [*FORMATS, "FP8"])
def test_a_weight_in_pieces(tmp_path, format, monkeypatch):
    source = saved(tmp_path)
    whole = tensors_of(stream(source, tmp_path / "whole", format))
    monkeypatch.setattr("mokernels.checkpoint.reader.CHUNK_BYTES", 1000)
    for name, tensor in tensors_of(stream(source, tmp_path / "pieces", format)).items():
        assert_same_bits(tensor, whole[name])


def test_fp8_says_that_its_activations_are_dynamic(tmp_path, caplog):
    folder = stream(saved(tmp_path), tmp_path / "out", "FP8")
    assert "FP8 is written without input scales" in caplog.text
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert mokernels.check(folder).ok


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        ("NVFP4", {}, "NVFP4 needs calibrated activation scales, and nothing calibrates a folder"),
        ("INT3", {}, "the format 'INT3', wanted one of"),
        ({"*q_proj": "MXFP8", "*k_proj": "FP8"}, {}, "formats MXFP8, FP8|formats FP8, MXFP8"),
        ("MXFP8", {"exclude": ["*"]}, "would be quantized: none of its 16 weight matrices"),
        ("MXFP8", {"max_shard_size": "much"}, "max_shard_size is 'much', wanted bytes above 0"),
    ],
)
def test_what_is_refused(tmp_path, config, options, text):
    source = saved(tmp_path)
    with pytest.raises(ArgumentError, match=text):
        stream(source, tmp_path / "out", config, **options)
    assert os.listdir(tmp_path) == ["plain"]


def test_features_that_do_not_fit_are_named(tmp_path):
    source = saved(tmp_path, intermediate_size=200)
    with pytest.raises(ArgumentError, match=f"{LAYER}' has 200 input features, .* exclude="):
        stream(source, tmp_path / "out")
    assert mokernels.check(stream(source, tmp_path / "out", exclude=["*down_proj"])).ok


def test_experts_in_one_tensor_are_refused_by_name(tmp_path):
    source, full = saved(tmp_path), "model.layers.0.mlp.experts.gate_up_proj"
    edited(source, lambda tensors: tensors.update({full: torch.ones(2, 32, 32)}))
    with pytest.raises(ArgumentError, match=r"experts\.\w+.* exclude=\['\*experts\.\*'\]"):
        stream(source, tmp_path / "out")
    folder = stream(source, tmp_path / "out", exclude=["*experts.*"])
    assert_same_bits(tensors_of(folder)[full], torch.ones(2, 32, 32))


def test_transposed_weights_are_refused(tmp_path):
    source = saved(tmp_path)
    edited(source, lambda tensors: tensors.update({f"{LAYER}.bias": torch.ones(192)}))
    with pytest.raises(ArgumentError, match="wanted a bias of 128 elements"):
        stream(source, tmp_path / "out")


def test_a_quantized_folder_is_refused(tmp_path):
    folder = stream(saved(tmp_path), tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"holds quantized weights already: config\.json has"):
        stream(folder, tmp_path / "again")


def test_an_occupied_folder_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    source = saved(tmp_path)
    with pytest.raises(ArgumentError, match="exists and is not empty; nothing is overwritten"):
        stream(source, source)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("mokernels.ptq.rehearse.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ArgumentError, match="GB left, wanted about"):
        stream(source, tmp_path / "out")


@pytest.mark.parametrize("format", FORMATS)
def test_nan_is_named_and_nothing_is_left(tmp_path, format):
    source = saved(tmp_path)
    edited(source, lambda tensors: tensors[f"{LAYER}.weight"][0].fill_(float("nan")))
    with pytest.raises(CalibrationError, match=f"layer '{LAYER}' is empty or holds NaN"):
        stream(source, tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["plain"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_nothing_is_left_of_an_interrupted_run(tmp_path, monkeypatch, error):
    source, original, calls = saved(tmp_path), shards._write_tensor, []

    def write(*args):
        calls.append(args)
        if len(calls) == 9:
            raise error
        return original(*args)

    monkeypatch.setattr(shards, "_write_tensor", write)
    with pytest.raises(type(error)):
        stream(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["plain"]


MEASURE = """
import sys, resource, mokernels, mokernels.ptq.stream
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mokernels.quantize_checkpoint(sys.argv[1], sys.argv[2] + "0", "MXFP8", progress=False)
before = peak()
mokernels.quantize_checkpoint(sys.argv[3], sys.argv[2] + "1", "MXFP8", progress=False)
assert "transformers" not in sys.modules
print(peak() - before)
"""


def test_memory_is_that_of_a_few_pieces(tmp_path):
    for name, count in (("small", 1), ("large", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        weights = {f"l.{i}.up_proj.weight": torch.ones(8192, 4608).bfloat16() for i in range(count)}
        if name == "small":
            weights = {"l.0.up_proj.weight": torch.ones(4096, 2304).bfloat16()}
        save_file(weights, tmp_path / name / "model.safetensors")
    arguments = [str(tmp_path / name) for name in ("small", "out", "large")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    # Beyond what a weight of one piece takes: the mapped weight of 75 MB, and little else; the
    # whole is 300 MB, and its codes 150 MB.
    assert int(done.stdout) * 1024 < 130e6


@pytest.mark.parametrize("format", ["FP8", *FORMATS])
def test_the_report_is_that_of_the_model(tmp_path, format):
    source = saved(tmp_path, tied=True)
    (source / "mokernels_report.json").write_text("what another quantization left here")
    found = json.loads((stream(source, tmp_path / "out", format) / REPORT_FILE).read_text())
    assert found["calibration_calls"] == 0
    assert found["reload"] is None
    if format == "FP8":  # the model is calibrated in this format
        assert all(20 < layer["weight_sqnr_db"] < 50 for layer in found["layers"].values())
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    mokernels.quantize(model, format, progress=False)
    exported = mokernels.export(model, tmp_path / "exported", reload=False)
    expected = json.loads((exported / REPORT_FILE).read_text())
    assert found["layers"].keys() == expected["layers"].keys()
    for name, layer in expected["layers"].items():
        assert found["layers"][name] == pytest.approx(layer, abs=0.0015), name
    assert found["excluded"] == expected["excluded"]


def test_noise_of_a_weight_of_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("mokernels.checkpoint.reader.CHUNK_BYTES", 1 << 14)
    source = saved(tmp_path)
    report = json.loads((stream(source, tmp_path / "out") / REPORT_FILE).read_text())
    errors = compare_weights(source, tmp_path / "out").layers
    assert len(errors) == len(report["layers"])
    for layer in errors:
        stated = report["layers"][layer.name]["weight_sqnr_db"]
        assert stated == pytest.approx(layer.sqnr, abs=0.0015), layer.name
