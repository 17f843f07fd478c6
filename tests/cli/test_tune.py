"""``mokernels tune``: its plan, its errors, its file; the device is replaced."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mokernels.cli import tune as tuning
from mokernels.formats import FORMATS
from mokernels.ops import configs, tuned
from mokernels.ops.table_files import TableError, read_table
from mokernels.ops.target import SM_90
from mokernels.tuning import jobs_for
from tests.cli.test_commands import run
from tests.support.checkpoints import Linear, make_checkpoint
from tests.tuning.test_search import FakeBench

H100 = replace(SM_90, device="NVIDIA H100 80GB HBM3")
# Larger than others of the tests: a plan has something to try.
LAYERS = [
    *(Linear(f"model.layers.{i}.self_attn.{p}_proj", 128, 256) for i in (0, 1) for p in "qkv"),
    Linear("model.layers.0.mlp.down_proj", 256, 512),
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED_FOLDER", tmp_path / "shipped")
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint", "FP8", LAYERS)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def found(folder):
    return tuning.products(folder, "checkpoint")


def tune(folder, bench, output=None, again=False):
    console = Console(file=io.StringIO())
    products = found(folder)
    return tuning.tune(products, "auto", output, again, console, bench=bench, target=H100)


def half_as_long(config):
    """Another configuration than the closed form's is the faster one."""
    return 1.0 if config.num_stages % 2 else 2.0


@pytest.mark.parametrize(
    ("name", "target"), [*((name, "sm_90") for name in sorted(FORMATS)), ("NVFP4", "gfx942")]
)
def test_a_dry_run_lists_the_plan_without_a_gpu(tmp_path, no_gpu, name, target):
    folder = make_checkpoint(tmp_path / "c", name, LAYERS)
    output = run("tune", folder, "--dry-run", "--target", target).stdout
    planned = tuning.TARGETS[target]
    jobs = jobs_for(found(folder), planned)
    total = sum(len(job.candidates) for job in jobs)
    assert f"products on {target}" in output
    assert "384 x 256" in output  # q, k and v are one
    assert "256 x 512" in output
    assert f"{len(jobs)} choices, {total} candidates to compile and measure." in output
    assert not tuned.user_file(H100.device).exists()


def test_a_dry_run_without_a_gpu_plans_for_hopper(folder, no_gpu):
    assert "products on sm_90" in run("tune", folder, "--dry-run").stdout


def test_without_a_gpu_the_error_says_what_to_do(folder, no_gpu):
    output = run("tune", folder, code=1).output
    assert "`mokernels tune` measures kernels on a GPU, and torch" in output
    assert "Run it on the machine that will run the model, or add --dry-run" in output
    assert "Traceback" not in output
    output = run("tune", folder, "--device", "cpu", code=1).output
    assert "--device is 'cpu'. Leave it out" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "sm_90"), "Add --dry-run, or leave it out."),
        (("--dry-run", "--target", "sm_1"), "--target is 'sm_1', wanted one of sm_80, sm_89"),
        (("--dry-run", "--activations", "fp8_block"), "does not fit a checkpoint in FP8"),
    ],
)
def test_wrong_use(folder, words, message, no_gpu):
    assert message in run("tune", folder, *words, code=2).output


def test_later_runs_pick_the_winners_up(folder):
    path, outcome, kept = tune(folder, FakeBench(times=half_as_long))
    assert path == tuned.user_file(H100.device)
    assert read_table(path) == kept
    assert list(kept.winners) == [job.key for job in jobs_for(found(folder), H100)]
    assert (kept.device, kept.capability) == (H100.device, "sm_90")
    assert kept.torch == torch.__version__
    changed = 0
    for key, winner in outcome.winners.items():
        base = configs.choose(*key, H100)
        assert tuned.choice_of(key, H100) == tuned.Choice(winner.config, str(path))
        assert winner.config.order == base.order
        changed += winner.config != base
    assert changed


def test_what_was_measured_is_not_measured_again(folder):
    tune(folder, FakeBench())
    bench = FakeBench()
    assert tune(folder, bench)[1].winners == {}
    assert bench.timed == []
    assert len(tune(folder, bench, again=True)[1].winners) == len(bench.prepared) > 0


def test_an_interrupted_run_goes_on_where_it_was(folder, tmp_path):
    jobs = jobs_for(found(folder), H100)

    def on_time(config):
        if len(bench.prepared) == 3:
            raise KeyboardInterrupt

    bench = FakeBench(on_time=on_time)
    path, outcome, _ = tune(folder, bench)
    assert outcome.interrupted
    assert list(read_table(path).winners) == [job.key for job in jobs[:2]]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    second = FakeBench()
    _, outcome, kept = tune(folder, second)
    assert [job.key for job in second.prepared] == [job.key for job in jobs[2:]]
    assert len(kept.winners) == len(jobs)


def test_measurements_of_other_versions_are_not_mixed(folder):
    path, _, kept = tune(folder, FakeBench())
    text = path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"')
    path.write_text(text)
    assert read_table(path).torch == "1.0"
    assert len(tune(folder, FakeBench())[1].winners) == len(kept.winners)
    assert read_table(path).torch == torch.__version__


def test_a_file_that_is_no_table_is_not_written_over(folder, tmp_path):
    other = tmp_path / "notes.json"
    other.write_text(json.dumps({"mine": 1}))
    with pytest.raises(TableError, match="found schema None, wanted 1"):
        tune(folder, FakeBench(), output=other)
    assert json.loads(other.read_text()) == {"mine": 1}


def printed(outcome, kept, tmp_path):
    console = Console(width=300, record=True, file=io.StringIO())
    tuning.print_outcome(console, tmp_path / "file.json", outcome, kept)
    return console.export_text()


def test_what_a_run_prints(folder, tmp_path):
    _, outcome, kept = tune(folder, FakeBench(times=half_as_long))
    text = printed(outcome, kept, tmp_path)
    faster = sum(w.us < w.closed_form_us for w in outcome.winners.values())
    count = len(outcome.winners)
    assert f"{count} choices measured, {faster} faster than the closed form's." in text
    assert "100.0%" in text
    assert f"at least 90% of the best found in {count - faster} of {count} choices" in text
    assert "at worst 50%, for fp8" in text
    assert f"{len(kept.winners)} are in {tmp_path / 'file.json'}" in text
    outcome.interrupted = True
    outcome.refused = [f"fp8: config {n}: RuntimeError: no" for n in range(9)]
    text = printed(outcome, kept, tmp_path)
    assert "interrupted, run it again to go on" in text
    assert "left out: fp8: config 0: RuntimeError: no" in text
    assert "left out: 4 more (no)" in text


class GpuBench(FakeBench):
    """Stands in for the GPU's own bench."""

    def __init__(self, device: torch.device):
        super().__init__(times=half_as_long)
        assert device == torch.device("cuda", 0)
        self.target = H100


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(tuning, "require_gpu", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tuning, "target_of", lambda device: H100)
    monkeypatch.setattr(tuning, "DeviceBench", GpuBench)


def test_the_command_on_a_gpu(folder, gpu):
    result = run("tune", folder)
    path = tuned.user_file(H100.device)
    assert f"{len(read_table(path).winners)} are in {path}" in result.stdout
    assert "winners" in result.stdout
    assert "0 choices measured" in run("tune", folder).stdout


def test_the_command_writes_where_it_is_told(folder, gpu, tmp_path):
    run("tune", folder, "--output", tmp_path / "shipped.json")
    assert read_table(tmp_path / "shipped.json").device == H100.device
    assert not tuned.user_file(H100.device).exists()


def test_an_interrupted_command_says_so(folder, gpu, monkeypatch):
    def stopped(self, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(GpuBench, "seconds", stopped)
    assert "interrupted, run it again to go on" in run("tune", folder, code=1).stdout


def test_a_device_that_runs_nothing_is_an_error(folder, tmp_path):
    class Broken(FakeBench):
        def compile(self, candidates):
            return dict.fromkeys(candidates, "RuntimeError: no kernel image")

    _, outcome, kept = tune(folder, Broken())
    with pytest.raises(tuning.TuneError, match="No configuration could be measured on NVIDIA H100"):
        printed(outcome, kept, tmp_path)
