"""The bench that a GPU is, as far as a machine without one can follow it: nothing is launched."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from mokernels.errors import BackendError
from mokernels.formats import FORMATS, Activation
from mokernels.ops import tuned
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import SM_90
from mokernels.tuning import Job, Product, jobs_for
from mokernels.tuning import device as devices
from mokernels.tuning.device import MOST_COPIES, DeviceBench, require_gpu

CPU = torch.device("cpu")
PRODUCT = Product(FORMATS["FP8"], Activation.FP8_STATIC, 256, 1024)
FEW, MANY = (next(j for j in jobs_for([PRODUCT], SM_90) if j.key.rows == r) for r in (16, 128))

DEEPEST = max(config.num_stages for config in FEW.candidates)


@pytest.fixture
def compiled(monkeypatch) -> list[Launch]:
    """What was compiled; nothing is."""
    found: list[Launch] = []
    lock = threading.Lock()

    def compile(launch: Launch, dependent: bool) -> None:
        quantizes = launch.kernel.__name__.startswith("quantize")
        assert not (quantizes and dependent)  # an operator's first launch is not
        with lock:
            found.append(launch)
        few = launch.constants.get("BLOCK_M") == FEW.candidates[0].block_m
        if few and launch.num_stages == DEEPEST:
            raise RuntimeError("out of resource:\nshared memory")

    monkeypatch.setattr(Launch, "compile", compile)
    return found


def bench(job: Job, cache_bytes: int = 0, seconds=lambda call: 1.0) -> DeviceBench:
    made = DeviceBench(CPU, target=SM_90, seconds=seconds, cache_bytes=cache_bytes)
    made.prepare(job)
    return made


def test_each_kernel_is_compiled_once(compiled):
    assert bench(MANY).compile(MANY.candidates) == {}
    keys = [launch.variant for launch in compiled]
    assert len(set(keys)) == len(keys)
    tiles = {
        (c.block_m, c.block_n, c.num_warps, c.num_stages, c.group_m, c.tma) for c in MANY.candidates
    }
    products = [launch for launch in compiled if launch.kernel.__name__.startswith("gemm")]
    assert len(products) == len(tiles)
    # The quantizer before them is the same for all.
    assert sum(launch.kernel.__name__.startswith("quantize") for launch in compiled) == 1


def test_what_does_not_compile_is_named_with_the_reason(compiled):
    broken = bench(FEW).compile(FEW.candidates)
    assert broken
    assert set(broken) == {config for config in FEW.candidates if config.num_stages == DEEPEST}
    assert set(broken.values()) == {"RuntimeError: out of resource:"}


def test_nothing_stays_forced(compiled):
    bench(FEW).compile(FEW.candidates)
    config = tuned.choose(FEW.key.kind, 1, FEW.key.n, FEW.key.k, SM_90)
    assert config == FEW.candidates[0]


@pytest.mark.parametrize(
    ("cache", "copies"), [(0, 1), (2**18, 4), (2**20, 16), (2**30, MOST_COPIES)]
)
def test_copies_of_a_weight_outgrow_the_cache(cache, copies):
    found = bench(FEW, cache)._weights
    size = sum(tensor.nbytes for tensor in found[0].values())
    assert len(found) == copies
    assert len(found) * size > 4 * cache or copies == MOST_COPIES
    assert all(torch.equal(w["weight"].view(torch.uint8), found[0]["weight"].view(torch.uint8))
               for w in found)  # fmt: skip
    assert len({w["weight"].data_ptr() for w in found}) == copies


def test_a_call_is_one_copy_of_one_number_of_rows(monkeypatch):
    ran = []
    monkeypatch.setattr(DeviceBench, "_run", lambda self, x, weight: ran.append(x.shape[0]))

    def seconds(call) -> float:
        call()
        return 8.0

    made = bench(FEW, 2**18, seconds)
    assert made.seconds(FEW.candidates[0]) == 2.0
    assert ran == [1] * 4 + [16] * 4


def test_the_device_is_the_one_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert require_gpu("auto") == require_gpu("cuda") == torch.device("cuda", 2)
    assert require_gpu("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BackendError, match="--device is 'xpu'"):
        require_gpu("xpu")


def test_graphs_are_captured_on_the_device(monkeypatch):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Current)
    made = bench(FEW, seconds=lambda call: entered.append("timed") or 1.0)
    made.device = torch.device("cuda", 1)
    made.seconds(FEW.candidates[0])
    assert entered == [torch.device("cuda", 1), "timed", "timed", None]


def test_one_configuration_is_measured_at_a_time(compiled):
    made = bench(FEW)
    other = replace(FEW.candidates[0], num_stages=5)
    with tuned.forced(FEW.key, other), pytest.raises(ValueError, match="measure one by one"):
        made.compile(FEW.candidates)
    assert devices.error_line(ValueError("")) == "ValueError: no message"
