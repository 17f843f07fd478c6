"""vLLM's own configuration parser and loaders, given our exports; without a GPU.

It runs where vLLM's Python sources can be imported; CONTRIBUTING.md says how.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import mokernels
from tests.support.models import export, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
ROOT = Path(__file__).parents[2]
# vLLM's Qwen2 takes the size of a head from these two, and has no other.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SIZES = {"hidden_size": 256, "intermediate_size": 512, **HEADS}
FORMATS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP8")
METHODS = {"NVFP4": "modelopt_fp4", "MXFP8": "modelopt_mxfp8"}


def vllm_of(folder):
    command = [sys.executable, "-m", "tests.support.vllm_load", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_tensor_arrives(format, architecture, tmp_path):
    found = vllm_of(export(tiny_model(architecture, **SIZES), tmp_path / "m", format))
    assert found["algorithm"] == format
    assert found["method"] == METHODS.get(format, "modelopt")
    assert "lm_head" in found["excluded"]
    assert found["compared"] >= 2 * 10


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
def test_scales_of_the_cache_arrive(format, tmp_path):
    model = tiny_model("Llama", **SIZES)
    batches = [torch.randint(0, 64, (2, 16))]
    mokernels.quantize(model, format, batches, kv_cache="FP8", progress=False)
    found = vllm_of(mokernels.export(model, tmp_path / "m"))
    assert found["kv_cache"] == "FP8"
    assert found["compared"] >= 2 * 12
