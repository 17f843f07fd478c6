"""Inductor's caches on disk: what they may give back to another process, and what they must not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mokernels
from mokernels.compile import fusion

PACKAGE = Path(mokernels.__file__).parent
ROOT = PACKAGE.parent

# One activation for two projections, compiled in several ways; prints what the caches said. Rows of
# 64 fill no block: nothing is left to Inductor, which takes the time of a C++ compiler.
PROGRAM = """
import json, sys
import torch
import torch._inductor.config as config
from torch._dynamo.utils import counters
import mokernels.compile
from mokernels.compile import FusionOptions, fusion

linear = torch.ops.mokernels.fp8_block_linear.default
generator = torch.Generator().manual_seed(0)
weights = [torch.randn(32, 64, generator=generator).to(torch.float8_e4m3fn) for _ in "qk"]
scale = torch.tensor(0.01)

def model(x):
    return [linear(x, weight, scale) for weight in weights]

def foreign(graph):
    pass

def compiled(name):
    config.post_grad_custom_pre_pass = foreign if name == "foreign" else None
    mokernels.compile.enable(FusionOptions(expand=name != "options"))
    if name == "off":
        mokernels.compile.disable()
    if name != "backend":
        return torch.compile(model)
    return torch.compile(model, backend="mokernels", options={"mokernels.fuse_norm": False})

def run(name):
    torch._dynamo.reset()
    counters.clear()
    before = sum(len(made.reports) for made in fusion.PASSES)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x.requires_grad_(name == "training")
    results = compiled(name)(x)
    if name == "training":
        results[0].float().square().sum().backward()
        results = [x.grad]
    said = counters["inductor"] | counters["aot_autograd"]
    names = ("hit", "miss", "bypass")
    return {
        **{name: said[f"fxgraph_cache_{name}"] for name in names},
        "autograd_cache_hit": said["autograd_cache_hit"],
        "passes": sum(len(made.reports) for made in fusion.PASSES) - before,
        "sums": [float(r.detach().double().abs().sum()) for r in results],
    }

print(json.dumps({name: run(name) for name in sys.argv[1:]}))
"""


def run(package: Path, cache: Path, *names: str) -> dict[str, dict]:
    """Compile in a process of its own that imports mokernels from a folder."""
    program = cache.parent / "program.py"
    program.write_text(PROGRAM)
    unset = ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TORCHINDUCTOR_FX_GRAPH_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(package), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, program, *names], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_other_processes_get_what_was_compiled_alike_and_nothing_else(tmp_path):
    folder, cache = tmp_path / "package", tmp_path / "cache"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "mokernels", ignore=ignore)
    names = ("default", "options", "backend", "off", "training", "foreign")

    first = run(folder, cache, *names)
    for name in ("default", "options", "backend", "training"):
        assert (first[name]["hit"], first[name]["passes"]) == (0, 1), name
        assert first[name]["miss"] >= 1, name
    assert (first["off"]["hit"], first["off"]["passes"]) == (0, 0)

    second = run(folder, cache, *names)
    for name in ("default", "options", "backend", "off", "training"):
        assert (second[name]["miss"], second[name]["passes"]) == (0, 0), name
        assert second[name]["hit"] == first[name]["miss"], name
        assert second[name]["autograd_cache_hit"] == 1, name
        assert second[name]["sums"] == first[name]["sums"], name

    # Inductor cannot know what a plain function does to the graph.
    for process in (first, second):
        found = process["foreign"]
        assert (found["hit"], found["miss"], found["passes"]) == (0, 0, 1)
        assert found["bypass"] >= 1

    with (folder / "mokernels" / "formats.py").open("a") as file:
        file.write("# Something else.\n")
    third = run(folder, cache, "default", "backend", "training")
    for name, found in third.items():
        assert (found["hit"], found["autograd_cache_hit"], found["passes"]) == (0, 0, 1), name


@pytest.mark.parametrize("place", ["formats.py", "invariance.py", "compile", "ops", "numerics"])
def test_the_uuid_covers_every_source_that_decides_what_is_compiled(place):
    files = [PACKAGE / place] if place.endswith(".py") else list((PACKAGE / place).rglob("*.py"))
    assert files
    assert set(map(str, files)) <= set(fusion._sources())
