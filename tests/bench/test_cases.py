"""Every benchmark runs on the CPU at tiny sizes, through the code that a GPU runs."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from bench.support import gemms, llama, models, peers
from bench.support.catalog import GROUPS, cases, note_on_launches, one_of_each, small_setting
from bench.support.contest import Case, Setting, UnavailableError, measure
from mokernels.ops import tuned
from mokernels.ops.table_files import Table, write_table
from mokernels.ops.target import SM_90

CPU = torch.device("cpu")
# Reasons for which a peer may be missing from a tiny run on the CPU; any other is an error of ours.
EXPECTED_REASONS = (
    "cannot be imported",
    "is that of CUDA devices",
    "Invalid scaling configuration",
)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return small_setting(CPU)


@pytest.mark.parametrize("group", GROUPS)
def test_every_kind_of_case_runs(group: str, setting: Setting) -> None:
    for case in one_of_each(group):
        row = measure(case, setting)
        assert row.error <= 1
        assert row.ratio is not None
        wrong = {n: w for n, w in row.skipped.items() if not any(r in w for r in EXPECTED_REASONS)}
        assert not wrong, f"{case.name}: {wrong}"
    setting.release()


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


def test_the_most_valuable_cases_come_first() -> None:
    found = cases()
    assert [case.tier for case in found] == sorted(case.tier for case in found)
    assert "decode" in found[0].name


def test_rows_of_a_device() -> None:
    on_cpu = [case for case in cases() if case.runs_on(CPU)]
    assert {case.device for case in on_cpu} == {"cpu", "any"}
    on_gpu = [case for case in cases() if case.runs_on(torch.device("cuda"))]
    assert {case.device for case in on_gpu} == {"cuda", "any"}


def test_work_of_a_product(setting: Setting) -> None:
    contest = _linear("fp8_per_token_linear", 16).build(setting)
    # Weight codes and scales of its 256 rows, x in bf16, the result in bf16.
    assert contest.ours.work.flops == 2 * 16 * 256 * 256
    assert contest.ours.work.moved == 256 * 256 + 4 * 256 + 2 * 16 * 256 + 2 * 16 * 256
    assert contest.ours.work.unit == "fp8"


def test_nvfp4_moves_four_bits_and_a_scale(setting: Setting) -> None:
    work = _linear("nvfp4_linear", 1).build(setting).ours.work
    assert work.moved == 256 * 256 * 9 / 16 + 4 + 2 * 256 + 2 * 256


def test_weights_of_a_layer() -> None:
    layer = llama.build_layer(llama.TINY.config(), llama.keep, CPU, seed=0)
    linear = [m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert llama.TINY.linear_weights == sum(linear)
    assert models.layer_work(llama.LLAMA_8B, "FP8", 1).moved == 218_103_808


def test_competitors_have_the_same_weights() -> None:
    first, second = (
        llama.build_layer(llama.TINY.config(), convert, CPU, seed=3)
        for convert in (llama.keep, llama.quantized("FP8_PER_CHANNEL_PER_TOKEN"))
    )
    weight = second.mlp.up_proj.dequantized_weight()
    assert float((weight - first.mlp.up_proj.weight).norm() / weight.norm()) < 0.04


def test_a_replayed_step_goes_on() -> None:
    model = llama.Decoder(llama.TINY, llama.keep, CPU, batch=2, length=8)
    places = []
    for _ in range(5):
        model()
        places.append(int(model.position))
    assert places == [5, 6, 7, 0, 1]
    assert model.token.shape == (2, 1)


def test_one_graph_serves_all_layers() -> None:
    # Else Dynamo would compile 32 layers, and beyond its limit run them eagerly.
    torch._dynamo.reset()
    counter = CompileCounter()
    for convert in (llama.keep, llama.quantized("FP8")):
        model = llama.Decoder(replace(llama.TINY, layers=3), convert, CPU, batch=1, length=8)
        model.compile_layers(counter)
        with torch.no_grad():
            model()
            model()
    assert counter.frame_count == 2


def test_copies_outgrow_the_cache(setting: Setting) -> None:
    larger = Setting(CPU, setting.clock, setting.host_clock, lambda: None, cache_bytes=50)
    assert larger.copies(40) * 40 > 4 * 50
    assert larger.copies(300) == 1
    assert setting.copies(10) == 1


def test_int4_weights_are_near_the_weight() -> None:
    from bench.support.peers import int4_weight

    weight = torch.randn(32, 256).to(torch.bfloat16)
    packed, both = int4_weight(weight)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2).float()
    scale, zero = both.float().transpose(0, 1).unbind(-1)
    values = (codes.unflatten(-1, (-1, 128)) - 8) * scale[..., None] + zero[..., None]
    assert float((values.flatten(-2) - weight.float()).norm() / weight.float().norm()) < 0.15


def test_layers_of_gemlite_are_made_without_taking_the_weight(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Helper:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            assert (device, dtype) == ("cpu", torch.bfloat16)

        def from_linear(self, linear: torch.nn.Linear, del_orig: bool = True) -> torch.nn.Module:
            made = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
            made.weight = torch.nn.Parameter(linear.weight.detach().clone())
            if del_orig:
                linear.weight = None
            return made

    module = types.ModuleType("gemlite.helper")
    module.A8W8_fp8_dynamic = Helper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemlite", types.ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.helper", module)
    larger = Setting(CPU, setting.clock, setting.host_clock, lambda: None, cache_bytes=512)
    product = peers.Product(larger, torch.randn(2, 32).bfloat16(), torch.randn(16, 32).bfloat16())
    contender = peers.gemlite_fp8(product).make()
    assert len(contender.calls) == larger.copies(16 * 32) == 5
    assert all(torch.equal(call(), product.x @ product.weight.t()) for call in contender.calls)
    with pytest.raises(UnavailableError, match="this gemlite has no gemlite"):
        peers.gemlite_mxfp4(product).make()


def test_results_say_who_chooses_the_launches(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOKERNELS_CACHE", str(tmp_path))
    tuned.forget()
    target = replace(SM_90, device="Some GPU")
    assert note_on_launches(target) == "Every launch is the closed form's choice."
    write_table(tuned.user_file("Some GPU"), Table("Some GPU", "sm_90", "2", "3", "2026-01-31"))
    tuned.forget()
    assert "`mokernels tune` found fastest on 2026-01-31" in note_on_launches(target)
    tuned.forget()


def _linear(name: str, m: int) -> Case:
    return next(c for c in gemms.linear_cases() if c.name.startswith(name) and c.facts["m"] == m)
