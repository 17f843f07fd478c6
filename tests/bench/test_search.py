"""The search on the command line: what it asks a bench, and what it writes of the answers."""

from __future__ import annotations

import pytest

from bench import search
from mokernels.ops.gemm_config import GemmConfig
from tests.tuning.test_search import FakeBench

ONE = ["--way", "fp8", "--shape", "qkv", "--rows", "128"]


def times(config: GemmConfig) -> float:
    return 10e-6 if config.tma else 20e-6


@pytest.fixture
def wrote(tmp_path):
    def run(*options: str, **bench: object) -> tuple[int, FakeBench, str]:
        made = FakeBench(**{"times": times, **bench})
        code = search.main([*options, "--out", str(tmp_path), "--part=-x"], made)
        files = list(tmp_path.glob("search-*-x.md"))
        return code, made, files[0].read_text() if files else ""

    return run


def test_the_fastest_is_told_beside_the_closed_form(wrote, capsys):
    code, bench, text = wrote(*ONE)
    assert code == 0
    (job,) = bench.prepared
    assert len(bench.timed) == len(job.candidates)
    (row,) = (line for line in text.splitlines() if "6144x4096" in line)
    product, m, _, tried, fastest, us, moved, rate, base, base_us, share = (
        cell.strip() for cell in row.strip("|").split("|")
    )
    assert (product, m, tried) == ("fp8, fp8_static", "128", str(len(job.candidates)))
    assert fastest.endswith("by TMA")
    assert base == search.text_of(job.candidates[0])
    assert (us, base_us, share) == ("10", "20", "50%")
    # E4M3 weights, bf16 activations and results; twice the products.
    assert moved == f"{(6144 * 4096 + 2 * 128 * (4096 + 6144)) / 10e-6 / 1e9:,.0f}"
    assert rate == f"{2 * 128 * 6144 * 4096 / 10e-6 / 1e12:,.0f}"
    assert "10 us" in capsys.readouterr().out


def test_other_bits_are_named_and_fail(wrote, capsys):
    (job,) = search.chosen(search.parser().parse_args(ONE), search.SM_90)
    code, _, text = wrote(*ONE, wrong={c for c in job.candidates if c.tma})
    assert code == 1
    assert "by TMA" not in text
    assert "not the bits of the closed form" in capsys.readouterr().out


def test_it_stops_in_time_and_says_what_is_left(wrote, capsys):
    code, bench, text = wrote("--way", "fp8", "--minutes", "0")
    assert (code, bench.timed, text) == (0, [], "")
    assert "0 products were searched, 28 were not" in capsys.readouterr().out


def test_what_there_is_to_search_can_be_listed(capsys):
    assert search.main(["--list", "--rows", "2048"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(search.WAYS) * len(search.SHAPES)
    assert all("candidates" in line for line in listed)


def test_without_a_gpu_there_is_nothing_to_search_on(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert search.main([]) == 0
    assert "There is no GPU here" in capsys.readouterr().out
