"""The text of a report: a line for what was done alike in several layers."""

from __future__ import annotations

from mokernels.compile.reports import CompileReport, GraphReport, Rewrite


def test_layers_that_are_alike_share_a_line():
    rewrites, calls = [], []
    for layer in (0, 1, 2, 5):
        projections = tuple(f"model.layers.{layer}.mlp.{name}_proj" for name in ("gate", "up"))
        rewrites.append(Rewrite("one GEMM for 2", "fp8_gemm", projections))
        calls += [("fp8_gemm", path) for path in projections]
    rewrites.append(Rewrite("quantize by itself", "quantize_fp8", ("lm_head",), "it is alone"))
    calls += [("fp8_gemm", "model.layers.7.mlp.up_proj"), ("fp8_gemm", "lm_head")]
    text = str(CompileReport((GraphReport(tuple(rewrites), tuple(calls), 3),)))
    assert text.splitlines() == [
        "graph 0: 10 calls of mokernels' operators, 3 kernels by Inductor",
        "  model.layers.* (* = 0-2, 5): 2 calls each",
        "  model.layers.7: 1 call",
        "  outside of numbered layers: 1 call",
        "  one GEMM for 2 -> fp8_gemm: model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj"
        " (* = 0-2, 5)",
        "  quantize by itself -> quantize_fp8: lm_head (it is alone)",
    ]


def test_one_layer_keeps_its_number():
    rewrite = Rewrite("one GEMM for 2", "fp8_gemm", ("layers.3.q", "layers.3.k"))
    report = CompileReport((GraphReport((rewrite,), (("fp8_gemm", "layers.3.q"),)),))
    assert str(report).splitlines()[1:] == [
        "  layers.3: 1 call",
        "  one GEMM for 2 -> fp8_gemm: layers.3.q, layers.3.k",
    ]
