"""The two doors to the pass: backend="mokernels", and the hook of the default backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor import custom_graph_pass
from torch.fx import Graph

import mokernels.compile
import mokernels.compile.fusion as fusion
from mokernels.compile import FusionOptions
from mokernels.compile.fusion import FusionPass, pass_for
from mokernels.compile.hook import HOOK, enabled_pass
from tests.compile.blocks import quantized
from tests.support.compare import assert_same_bits

DEFAULT = FusionOptions()
CASE = "FP8_PER_CHANNEL_PER_TOKEN"


class Twice(nn.Module):
    """Two projections of one activation: the pass lets them share its quantization.

    Inductor has nothing to write for it, as :func:`_settings` leaves it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (quantized(CASE, 32, 64, seed=seed) for seed in (0, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    """Inductor's hook empty, no pass made yet, nothing from a cache, the bits of eager."""
    torch._dynamo.reset()
    pass_for.cache_clear()
    monkeypatch.setattr(fusion, "PASSES", [])
    with inductor_config.patch(
        {HOOK: None, "force_disable_caches": True, "emulate_precision_casts": True}
    ):
        yield
    pass_for.cache_clear()


@pytest.fixture
def x():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def rewrites(options: FusionOptions = DEFAULT) -> list[str]:
    """What the pass with these options has done."""
    return [r.what for graph in pass_for(options).reports for r in graph.rewrites]


DONE = ["one quantization for 2", "quantize by itself"]


def assert_equals_eager(compiled: Callable[..., Any], model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for result, expected in zip(compiled(x), model(x), strict=True):
            assert_same_bits(result, expected)


def test_torch_knows_the_backend():
    assert "mokernels" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max-autotune": False, "epilogue_fusion": False}},
        {"options": {**torch._inductor.list_mode_options("max-autotune")}},
    ],
    ids=str,
)
def test_the_backend_takes_inductors_choices_and_leaves_its_settings_alone(choice, x):
    model = Twice()
    before = inductor_config.get_config_copy()
    compiled = torch.compile(model, backend="mokernels", fullgraph=True, **choice)
    assert_equals_eager(compiled, model, x)
    assert rewrites() == DONE
    assert inductor_config.get_config_copy() == before


def test_inductors_choices_arrive(x):
    seen = {}

    class Look(custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            for name in ("max_autotune", "triton.cudagraphs", "epilogue_fusion"):
                seen[name] = getattr(inductor_config, name)

        def uuid(self):
            return None

    setattr(inductor_config, HOOK, Look())
    for choice, wanted in (
        ({"mode": "max-autotune"}, (True, True, True)),
        ({"options": {"epilogue-fusion": False}}, (False, False, False)),
    ):
        torch._dynamo.reset()
        torch.compile(Twice(), backend="mokernels", **choice)(x)
        assert tuple(seen.values()) == wanted
    assert rewrites() == DONE * 2


def test_our_options_arrive(x):
    model, options = Twice(), {"mokernels.share_quantization": False, "max_autotune": False}
    compiled = torch.compile(model, backend="mokernels", fullgraph=True, options=options)
    assert_equals_eager(compiled, model, x)
    assert rewrites() == []
    assert rewrites(FusionOptions(share_quantization=False)) == ["quantize in the GEMM"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mokernels.fuse_all": True}, r"'mokernels\.fuse_all', wanted one of mokernels\.share"),
        ({"mokernels.expand": 1}, r"mokernels\.expand = 1, wanted True or False"),
        ({"max_autotun": True}, r"'max_autotun', which Inductor does not know"),
    ],
)
def test_wrong_options_are_told_and_leave_nothing_behind(options, message, x):
    before = inductor_config.get_config_copy()
    with pytest.raises(Exception, match=message):
        torch.compile(Twice(), backend="mokernels", options=options)(x)
    assert inductor_config.get_config_copy() == before


def test_a_failed_compilation_leaves_the_settings_alone(x, monkeypatch):
    def fail(self, graph):
        raise RuntimeError("deliberate")

    monkeypatch.setattr(FusionPass, "_rewrite", fail)
    before = inductor_config.get_config_copy()
    with pytest.raises(Exception, match="deliberate"):
        torch.compile(Twice(), backend="mokernels", mode="max-autotune")(x)
    assert inductor_config.get_config_copy() == before


def test_the_backend_and_the_hook_together_rewrite_once(x):
    other = FusionOptions(expand=False)
    mokernels.compile.enable(other)
    torch.compile(Twice(), backend="mokernels")(x)
    assert rewrites() == DONE
    assert rewrites(other) == []
    assert enabled_pass() is pass_for(other)


def test_disabled_fusion_rewrites_no_more(x):
    model = Twice()
    mokernels.compile.enable()
    torch.compile(model)(x)
    assert rewrites() == DONE
    mokernels.compile.disable()
    torch._dynamo.reset()
    assert_equals_eager(torch.compile(model), model, x)
    assert rewrites() == DONE


def test_gradients_go_through_the_backend(x):
    model = Twice()
    compiled = torch.compile(model, backend="mokernels", fullgraph=True)
    for index in range(2):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        for run, start in ((model, leaf), (compiled, other)):
            run(start)[index].float().square().sum().backward()
        assert_same_bits(other.grad, leaf.grad)
    assert rewrites() == DONE


def test_passes_of_others_run_before_ours_with_what_they_want_to_know(x):
    if not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"):
        pytest.skip("this version of torch tells no pass whether a graph is for inference")
    seen = []

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph: Graph, is_inference: bool) -> None:
            seen.append(
                (is_inference, [str(n.target) for n in graph.nodes if "mokernels" in str(n.target)])
            )

        def uuid(self) -> str:
            return "aware"

    for present in (Aware(), [Aware(), seen.append]):
        torch._dynamo.reset()
        seen.clear()
        setattr(inductor_config, HOOK, present)
        mokernels.compile.enable()
        with torch.no_grad():
            torch.compile(Twice())(x)
        assert seen[0] == (True, ["mokernels.fp8_per_token_linear.default"] * 2)
        assert len(seen) == (2 if isinstance(present, list) else 1)
    assert rewrites() == DONE * 2


def test_resetting_dynamo_lets_cuda_graphs_go(x, monkeypatch):
    import torch._inductor.cudagraph_trees as trees

    calls = []
    monkeypatch.setattr(trees, "reset_cudagraph_trees", lambda: calls.append(1))
    torch.compile(Twice(), backend="mokernels")(x)
    torch._dynamo.reset()
    assert calls
