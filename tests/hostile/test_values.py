"""Scales and codes whose values cannot be right."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mokernels.checkpoint import Report, check, reader
from mokernels.formats import MXFP8_MAX_EXPONENT
from mokernels.numerics import dequantize_mxfp8
from tests.support.checkpoints import edit_tensors, make_checkpoint, only_finding

UP = "model.layers.0.mlp.up_proj"
K = "model.layers.0.self_attn.k_proj"
INF, NAN = math.inf, math.nan


@pytest.fixture
def report_with(tmp_path: Path) -> Callable[..., Report]:
    """Puts bytes or a value into one tensor of a valid checkpoint and audits it."""

    def make(
        format: str,
        name: str,
        value: float | int,
        index: tuple[int, ...] = (),
        *,
        values: str = "scales",
        kv_cache: str | None = None,
    ) -> Report:
        folder = make_checkpoint(tmp_path / "c", format, kv_cache=kv_cache)
        assert check(folder).findings == ()

        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensor = tensors[name]
            raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            raw[index] = value

        edit_tensors(folder, edit)
        assert check(folder, values="none").findings == ()
        return check(folder, values=values)  # type: ignore[arg-type]

    return make


FP32_SCALES = [
    ("FP8", "weight_scale", ()),
    ("FP8", "input_scale", ()),
    ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", (3,)),
    ("FP8_PB_WO", "weight_scale", (1, 0, 0, 0)),
    ("NVFP4", "weight_scale_2", ()),
    ("NVFP4", "input_scale", ()),
]


@pytest.mark.parametrize(("format", "leaf", "index"), FP32_SCALES)
@pytest.mark.parametrize(
    ("value", "rule", "what"),
    [
        (NAN, "scale-not-finite", "is not finite"),
        (INF, "scale-not-finite", "is not finite"),
        (-0.5, "scale-negative", "is negative"),
        (0.0, "scale-zero", "is zero"),
        (-0.0, "scale-zero", "is zero"),
    ],
)
def test_fp32_scale(
    report_with: Callable[..., Report],
    format: str,
    leaf: str,
    index: tuple[int, ...],
    value: float,
    rule: str,
    what: str,
) -> None:
    if rule == "scale-zero" and format == "FP8_PER_CHANNEL_PER_TOKEN":
        rule, what = "zero-row", "of an output channel is zero"
    text = str(only_finding(report_with(format, f"{UP}.{leaf}", value, index), rule))
    assert what in text
    assert f"tensor '{UP}.{leaf}', layer {UP!r})" in text
    assert f"found {value:g}" in text
    assert "wanted finite numbers above 0." in text
    if index:
        total = {"FP8_PER_CHANNEL_PER_TOKEN": 160, "FP8_PB_WO": 2}[format]
        assert f" at {list(index)}, 1 of {total} elements" in text


def test_minus_infinity_breaks_two_rules(report_with: Callable[..., Report]) -> None:
    report = report_with("FP8", f"{UP}.weight_scale", -INF)
    assert {error.rule for error in report.errors} == {"scale-not-finite", "scale-negative"}


def test_zero_row_is_explained(report_with: Callable[..., Report]) -> None:
    report = report_with("FP8_PER_CHANNEL_PER_TOKEN", f"{UP}.weight_scale", 0.0, (7,))
    text = str(only_finding(report, "zero-row"))
    assert "ModelOpt's exporter writes scale 0 and NaN codes for a channel whose weights" in text
    assert "or quantize with mokernels." in text


def test_first_and_number_of_bad_elements(report_with: Callable[..., Report]) -> None:
    name = f"{UP}.weight_scale"
    report = report_with("FP8_PER_CHANNEL_PER_TOKEN", name, NAN, (slice(40, 50),))
    assert "found nan at [40], 10 of 160 elements" in str(report.errors[0])


@pytest.mark.parametrize(
    ("byte", "rule", "found"),
    [
        (0x7F, "scale-not-finite", "nan"),
        (0xFF, "scale-not-finite", "nan"),
        (0x80, "scale-negative", "-0"),
        (0x81, "scale-negative", "-0.00195312"),
        (0xFE, "scale-negative", "-448"),
    ],
)
def test_nvfp4_block_scale(
    report_with: Callable[..., Report], byte: int, rule: str, found: str
) -> None:
    report = report_with("NVFP4", f"{UP}.weight_scale", byte, (9, 3))
    text = str(only_finding(report, rule))
    assert f"found {found} at [9, 3], 1 of 640 elements, wanted E4M3 numbers of at least 0" in text


def test_every_other_block_scale_is_legal(report_with: Callable[..., Report]) -> None:
    # Zero among them: older exports write it for a block of zeros.
    every = torch.arange(0x7F, dtype=torch.uint8)
    report = report_with("NVFP4", f"{UP}.weight_scale", every, (slice(0, 127), 0), values="all")
    assert report.findings == ()


@pytest.mark.parametrize("scale", [42.5, 1e30])
def test_large_nvfp4_input_scale(report_with: Callable[..., Report], scale: float) -> None:
    text = str(only_finding(report_with("NVFP4", f"{UP}.input_scale", scale), "input-scale-large"))
    assert "ModelOpt's rule for tiny blocks no longer gives zeros" in text
    assert f"found {scale:g}, wanted at most 42" in text


def test_largest_nvfp4_input_scale(report_with: Callable[..., Report]) -> None:
    assert report_with("NVFP4", f"{UP}.input_scale", 42.0).findings == ()


def test_large_fp8_input_scale_is_legal(report_with: Callable[..., Report]) -> None:
    assert report_with("FP8", f"{UP}.input_scale", 1e6).findings == ()


def test_mxfp8_nan_exponent(report_with: Callable[..., Report]) -> None:
    text = str(
        only_finding(report_with("MXFP8", f"{UP}.weight_scale", 255, (0, 1)), "exponent-nan")
    )
    assert "found 255 at [0, 1], 1 of 320 elements, wanted bytes from 0 to 254" in text


@pytest.mark.parametrize("byte", [MXFP8_MAX_EXPONENT + 1, 254])
def test_mxfp8_exponent_out_of_range(report_with: Callable[..., Report], byte: int) -> None:
    report = report_with("MXFP8", f"{UP}.weight_scale", byte, (2, 0))
    text = str(only_finding(report, "exponent-range"))
    assert "so large that its weights leave bf16's range" in text
    assert f"found {byte} at [2, 0], 1 of 320 elements, wanted bytes from 0 to 246" in text


@pytest.mark.parametrize("byte", [0, MXFP8_MAX_EXPONENT])
def test_mxfp8_exponents_at_the_ends(report_with: Callable[..., Report], byte: int) -> None:
    assert report_with("MXFP8", f"{UP}.weight_scale", byte, (2, 0)).findings == ()


@pytest.mark.parametrize(("exponent", "finite"), [(MXFP8_MAX_EXPONENT, True), (247, False)])
def test_limit_of_mxfp8_exponents_is_bf16s(exponent: int, finite: bool) -> None:
    codes = torch.full((1, 32), 448.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[exponent]], dtype=torch.uint8)
    assert bool(dequantize_mxfp8(codes, scale).bfloat16().isfinite().all()) is finite


@pytest.mark.parametrize("format", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_codes(report_with: Callable[..., Report], format: str, byte: int) -> None:
    report = report_with(format, f"{UP}.weight", byte, (150, 63), values="all")
    text = str(only_finding(report, "code-nan"))
    assert "the weight holds NaN codes" in text
    assert "found nan at [150, 63], 1 of 10240 elements" in text


def test_nan_codes_are_looked_for_only_on_demand(report_with: Callable[..., Report]) -> None:
    assert report_with("FP8", f"{UP}.weight", 0x7F, (0, 0)).findings == ()


def test_every_byte_is_a_legal_nvfp4_weight(report_with: Callable[..., Report]) -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    report = report_with("NVFP4", f"{UP}.weight", every, (slice(0, 8),), values="all")
    assert report.findings == ()


def test_position_in_a_tensor_of_several_pieces(
    report_with: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)  # 15 rows of 64 codes
    report = report_with("FP8", f"{UP}.weight", 0x7F, (slice(20, 152, 131), 5), values="all")
    assert "found nan at [20, 5], 2 of 10240 elements" in str(only_finding(report, "code-nan"))


@pytest.mark.parametrize("value", [NAN, -INF])
def test_bias(report_with: Callable[..., Report], value: float) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    text = str(only_finding(report_with("FP8", name, value, (5,), values="all"), "bias-not-finite"))
    assert f"found {value:g} at [5], 1 of 64 elements" in text


def test_plain_tensor_is_a_warning(report_with: Callable[..., Report]) -> None:
    report = report_with("FP8", "model.norm.weight", NAN, (5,), values="all")
    finding = only_finding(report, "plain-not-finite")
    assert finding.severity == "warning"
    assert report.ok
    assert "expect NaN where the tensor is used" in str(finding)


@pytest.mark.parametrize(
    ("value", "rule"),
    [(NAN, "scale-not-finite"), (0.0, "scale-zero"), (-1.0, "scale-negative")],
)
def test_kv_scale(report_with: Callable[..., Report], value: float, rule: str) -> None:
    report = report_with("FP8", f"{K}.k_scale", value, kv_cache="FP8")
    text = str(only_finding(report, rule))
    assert "the k_scale is" in text
    assert f"tensor '{K}.k_scale'" in text
