"""What ``import mokernels`` costs and pulls in, and how it reaches transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "checkpoints" / "fp8"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_quick_and_lean():
    code = (
        "import torch, time, sys; start = time.perf_counter(); import mokernels; "
        "print(time.perf_counter() - start); "
        "heavy = {'transformers', 'triton', 'accelerate', 'typer', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    seconds, heavy = min((run(code).split("\n")[:2] for _ in range(2)), key=lambda r: float(r[0]))
    assert float(seconds) < 2
    assert heavy == "[]"


def test_importing_asks_no_device():
    run(
        "import torch\n"
        "def no(*a, **k): raise AssertionError('a device was queried')\n"
        "torch.cuda.is_available = torch.cuda.get_device_properties = torch.cuda.init = no\n"
        "import mokernels\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import mokernels; import transformers",
        "import transformers; import mokernels",
        "import transformers.quantizers.auto; import mokernels; import mokernels",
        "from transformers import AutoConfig; import mokernels",
        "import mokernels; from transformers import AutoModelForCausalLM, AutoConfig",
    ],
)
def test_the_order_of_imports_does_not_matter(imports):
    out = run(
        f"{imports}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(GOLDEN)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    assert out.strip().endswith("FP8Linear")


def test_the_hook_leaves_the_module_as_it_found_it():
    out = run(
        "import mokernels, transformers.quantizers.auto as auto\n"
        "print(type(auto.__loader__).__name__, type(auto.__spec__.loader).__name__)"
    )
    assert out.split() == ["SourceFileLoader", "SourceFileLoader"]


def test_triton_is_not_needed_on_the_cpu():
    run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mokernels\n"
        "x = torch.randn(2, 32); q, s = torch.ops.mokernels.quantize_fp8_per_token(x)\n"
        "torch.ops.mokernels.fp8_gemm(q, q, s, s)\n"
    )


def test_the_public_names():
    out = run(
        "import mokernels\nfor name in mokernels.__all__: getattr(mokernels, name); print(name)"
    )
    assert {"from_pretrained", "load_into", "check", "explain"} <= set(out.split())
