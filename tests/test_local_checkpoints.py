"""Real checkpoints on this machine's disk: set the variables below to run these.

For example ``MOKERNELS_TEST_FP8_MODEL_PATH=/models/Llama-3.1-8B-Instruct-FP8``; then
``pytest tests/test_local_checkpoints.py``.
"""

import os

import pytest
import torch
from transformers import AutoTokenizer

import mokernels

VARIABLES = {
    "FP8": "MOKERNELS_TEST_FP8_MODEL_PATH",
    "FP8_PER_CHANNEL_PER_TOKEN": "MOKERNELS_TEST_FP8_PC_PT_MODEL_PATH",
    "FP8_PB_WO": "MOKERNELS_TEST_FP8_PB_WO_MODEL_PATH",
    "NVFP4": "MOKERNELS_TEST_NVFP4_MODEL_PATH",
    "MXFP8": "MOKERNELS_TEST_MXFP8_MODEL_PATH",
}


@pytest.fixture(params=sorted(VARIABLES))
def checkpoint(request):
    path = os.environ.get(VARIABLES[request.param])
    if not path:
        pytest.skip(f"set {VARIABLES[request.param]} to the folder of a {request.param} checkpoint")
    return request.param, path


def test_it_passes_the_audit(checkpoint):
    report = mokernels.check(checkpoint[1])
    assert report.ok, str(report)


def test_it_loads_and_continues_a_text(checkpoint):
    name, path = checkpoint
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = mokernels.from_pretrained(path, device_map=device)
    explanation = mokernels.explain(model)
    assert {row.format for row in explanation.layers} == {name}
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("The capital of France is", return_tensors="pt").to(device)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
