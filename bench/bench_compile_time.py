"""How long compiling by layers takes: a quantized model beside the same model in bf16.

    pytest bench/bench_compile_time.py -n0 --benchmark-enable -s

32 layers of width 256; the first call minus the second, nothing cached on disk. Both models are
compiled by ``mokernels.compile.compile_layers``, in turn, so that both meet the same machine. With
a GPU the time is Dynamo's, Inductor's and Triton's. Without one most of it is the C++ compiler's,
which runs in other processes: hence the second ratio, of this process' own time on a core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo import utils as dynamo_utils
from torch._inductor.utils import fresh_cache

import mokernels
from mokernels.compile import compile_layers, decompile_layers
from tests.support.models import export, tiny_model

FORMATS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP8")
LAYERS = 32
ROUNDS = 3
WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What PyTorch calls the parts that are shown.
PARTS = {
    "tracing": "bytecode_tracing",
    "passes": "_recursive_post_grad_passes",
    "our pass": "pass.post_grad_passes.post_grad_custom_pre_pass",
    "code generation": "GraphLowering.codegen",
    "compiling the code": "async_compile.wait",
}

Times = dict[str, float]


@pytest.fixture(scope="module")
def plain() -> Iterator[nn.Module]:
    torch.set_num_threads(1)  # the calls themselves are subtracted; threads that wait would count
    model = tiny_model("Llama", num_hidden_layers=LAYERS, **WIDTHS).to(DEVICE)
    compile_times(model)  # what is imported and probed once
    yield model
    mokernels.compile.disable()


def compile_times(model: nn.Module) -> Times:
    """Seconds that the first call takes longer than the second, and what they went into."""
    torch._dynamo.reset()
    dynamo_utils.compilation_time_metrics.clear()
    compile_layers(model)
    with fresh_cache(), torch.no_grad():
        (wall, core), (second_wall, second_core) = _call(model), _call(model)
    decompile_layers(model)
    spent = dynamo_utils.compilation_time_metrics
    return {
        "total": wall - second_wall,
        "on a core": core - second_core,
        **{part: sum(spent.get(name, ())) for part, name in PARTS.items()},
    }


def _call(model: nn.Module) -> tuple[float, float]:
    ids = torch.full((1, 32), 5, device=DEVICE)
    start, start_on_core = time.perf_counter(), time.process_time()
    model(input_ids=ids, use_cache=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_on_core


@pytest.mark.parametrize("format", FORMATS)
def test_compile_time_beside_bf16(format: str, plain: nn.Module, tmp_path: Path, benchmark) -> None:
    unquantized = tiny_model("Llama", num_hidden_layers=LAYERS, **WIDTHS)
    folder = export(unquantized, tmp_path / "model", format, same_codes=True)
    quantized = mokernels.from_pretrained(folder, device_map=DEVICE)
    rounds = [(compile_times(plain), compile_times(quantized)) for _ in range(ROUNDS)]
    benchmark.pedantic(compile_times, args=(quantized,), rounds=1)
    sides = zip(*rounds, strict=True)
    bf16, ours = ({part: min(t[part] for t in side) for part in side[0]} for side in sides)
    ratios = {f"ratio, {part}": ours[part] / bf16[part] for part in ("total", "on a core")}
    benchmark.extra_info.update(ratios, bf16=bf16, quantized=ours)
    lines = [f"{DEVICE} {format}"]
    lines += [f"  {name}: {ratio:.2f}" for name, ratio in ratios.items()]
    lines += [f"  {part}: {ours[part]:.2f} s, bf16 {bf16[part]:.2f} s" for part in bf16]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
