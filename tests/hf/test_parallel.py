"""Tensor parallelism over two processes on the CPU (gloo)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mokernels
from tests.support.models import export, tiny_model

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import torch, torch.distributed
import mokernels
from transformers import AutoModelForCausalLM
torch.distributed.init_process_group("gloo")
options = {"dtype": torch.float32}
try:
    from transformers.distributed import DistributedConfig
    parallel = {"distributed_config": DistributedConfig(tp_size=2)}
except TypeError:  # transformers before 5.20
    parallel = {"tp_plan": "auto"}
ids = torch.tensor([[1, 5, 9, 33, 70, 2]])
with torch.no_grad():
    split = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options, **parallel)
    logits = split(ids).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    expected = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)(ids).logits
weight = split.model.layers[0].mlp.down_proj.weight
error = ((logits - expected).norm() / expected.norm()).item()
with open(f"{sys.argv[2]}.{torch.distributed.get_rank()}", "w") as file:  # stdout would interleave
    json.dump({"shard": list(weight.to_local().shape), "error": error}, file)
"""


def run(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(program), str(folder), str(tmp_path / "rank")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )


@pytest.mark.parametrize("format", ["NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_two_ranks_give_the_model_of_one(tmp_path, format):
    model = tiny_model(hidden_size=256, intermediate_size=512, head_dim=64)
    done = run(export(model, tmp_path / "model", format), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    packed = 128 if format == "NVFP4" else 256
    ranks = [json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in range(2)]
    assert {tuple(rank["shard"]) for rank in ranks} == {(256, packed)}
    # NVFP4's blocks and static scale are the same on every rank. Per token, each rank of a row-wise
    # layer takes the amax of its own part of the row, which is other rounding, not an error.
    assert max(rank["error"] for rank in ranks) <= (1e-5 if format == "NVFP4" else 0.15)


def test_layers_that_cannot_be_split_are_named(tmp_path):
    model = tiny_model(hidden_size=256, intermediate_size=512, head_dim=64)
    done = run(export(model, tmp_path / "model", "FP8_PB_WO"), tmp_path)
    assert done.returncode != 0
    assert "These layers cannot be split for tensor parallelism" in done.stderr
    assert "model.layers.0.self_attn.q_proj (weight [128, 256]" in done.stderr


def test_experts_are_not_spread_over_processes(tmp_path):
    model = tiny_model("Qwen3Moe", hidden_size=256, intermediate_size=512, head_dim=64)
    mokernels.quantize(model, "MXFP8", progress=False)
    done = run(mokernels.export(model, tmp_path / "model"), tmp_path)
    assert done.returncode != 0
    assert "Quantized experts cannot be spread over processes" in done.stderr
