"""Exported programs keep our operators as nodes, and run without Python's code of the model."""

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

import mokernels.compile
from tests.compile.blocks import CASES, quantized
from tests.support.compare import assert_same_bits

K, N = 64, 24
OPERATORS = {
    "FP8": "fp8_linear",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_per_token_linear",
    "FP8_PB_WO": "fp8_weight_only_gemm",
    "NVFP4": "nvfp4_linear",
    "MXFP8": "mxfp8_linear",
    "FP8_PB_WO-fp8_block": "fp8_block_linear",
    "FP8-16bit": "fp8_weight_only_gemm",
    "NVFP4-16bit": "nvfp4_weight_only_gemm",
    "MXFP8-16bit": "mxfp8_weight_only_gemm",
}


class Side(nn.Module):
    """Layers of some cases beside each other, on the input and on what the model computes of it."""

    def __init__(self, cases: list[str]) -> None:
        super().__init__()
        biases = (torch.bfloat16, None)
        self.layers = nn.ModuleList(
            quantized(case, N, K, seed=index, bias=biases[index % 2])
            for index, case in enumerate(cases)
        )
        for layer in self.layers:
            layer.refresh()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(h) for layer in self.layers for h in (x, torch.relu(x))]


def export(model: nn.Module) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=2, max=512)
    return torch.export.export(model, (activations(3),), dynamic_shapes=({0: tokens},))


def activations(tokens: int) -> Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def operators(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes]
    return [name for name in targets if name.startswith("mokernels.")]


def assert_equals(found: list[Tensor], model: nn.Module, x: Tensor) -> None:
    for result, expected in zip(found, model(x), strict=True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("case", CASES)
def test_operators_stay_single_nodes_and_keep_the_checkpoints_tensors(case):
    model = Side([case])
    program = export(model)
    for exported in (program, program.run_decompositions()):
        assert operators(exported) == [f"mokernels.{OPERATORS[case]}.default"] * 2
        for tokens in (3, 2, 40):
            assert_equals(exported.module()(activations(tokens)), model, activations(tokens))
    assert program.state_dict.keys() == model.state_dict().keys()


@pytest.mark.parametrize("fuses", [False, True], ids=["plain", "fused"])
def test_compiled_ahead_of_time_all_formats_have_the_bits_of_eager(fuses, tmp_path):
    model = Side(list(CASES))
    program = export(model)
    if fuses:
        mokernels.compile.enable()
    already = len(mokernels.compile.report().graphs)
    # What is compiled here is called only a few times.
    cheap = {"aot_inductor.compile_wrapper_opt_level": "O0", "force_disable_caches": True}
    with torch.no_grad(), inductor_config.patch(emulate_precision_casts=True, **cheap):
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        loaded = torch._inductor.aoti_load_package(path)
    for tokens in (4, 7):
        assert_equals(loaded(activations(tokens)), model, activations(tokens))
    graphs = mokernels.compile.report().graphs[already:]
    assert [{name for name, _ in graph.calls} for graph in graphs] == [CALLED] * fuses


# What the pass leaves of the layers: the first of each pair quantizes an input of the graph, in
# its GEMM; the second what Inductor computes, which it quantizes itself for FP8 alone, and not in
# blocks of 128, of which these rows of 64 do not fill one.
CALLED = {
    *("fp8_linear", "fp8_per_token_linear", "fp8_block_linear", "nvfp4_linear", "mxfp8_linear"),
    *("fp8_weight_only_gemm", "nvfp4_weight_only_gemm", "mxfp8_weight_only_gemm"),
    *("fp8_gemm", "quantize_fp8_per_block", "quantize_nvfp4", "nvfp4_gemm"),
    *("quantize_mxfp8", "mxfp8_gemm"),
}
