"""Loading holds the weights once: anonymous host memory, measured in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import export, tiny_model

ROOT = Path(__file__).parents[2]
MEASURE = """
import sys, threading, time
import torch, transformers, mokernels
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama, transformers.quantizers.auto
import accelerate

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

base = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = {load}(sys.argv[1])
running = False; thread.join()
peak = max(peak, anonymous())
print((peak - base) / int(sys.argv[2]))
"""


LOADERS = ("AutoModelForCausalLM.from_pretrained", "mokernels.from_pretrained")
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
}


@pytest.mark.newest
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
def test_peak_while_loading(tmp_path, format, load):
    model = tiny_model(**SIZES)
    folder = export(model, tmp_path, format, same_codes=True)
    del model
    size = (folder / "model.safetensors").stat().st_size
    assert size >= 100e6
    code = MEASURE.replace("{load}", load)
    run = [sys.executable, "-c", code, str(folder), str(size)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.15
