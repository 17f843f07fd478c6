"""The compile pass: what it rewrites, and that not a bit changes on the CPU."""

from contextlib import nullcontext

import pytest
import torch
import torch._inductor.config as inductor_config

import mokernels.compile
from mokernels.compile.fusion import FusionPass
from mokernels.compile.graph import clean_path
from mokernels.compile.hook import HOOK, Chain, enabled_pass
from mokernels.compile.options import FusionOptions, split_options
from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS
from mokernels.layers import finish_loading, make_layer
from tests.support.models import quantized_tensors

K = 128


class Block(torch.nn.Module):
    """RMSNorm, three projections of its output, and SiLU of one times another."""

    def __init__(self, format):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(K).bfloat16() + 0.5)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            torch.manual_seed(index)
            linear = torch.nn.Linear(K, K, bias=False, dtype=torch.bfloat16)
            stored = quantized_tensors(format, linear.weight.detach())
            layer = make_layer(linear, FORMATS[format])
            for leaf, tensor in stored.items():
                getattr(layer, leaf).data = tensor
            setattr(self, name, layer)
        finish_loading(self)

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.norm * wide.to(x.dtype)
        gate, up = self.q_proj(h), self.k_proj(h)
        return self.o_proj(torch.nn.functional.silu(gate) * up) + self.v_proj(h)


@pytest.fixture
def hook():
    before = getattr(inductor_config, HOOK)
    setattr(inductor_config, HOOK, None)
    yield
    setattr(inductor_config, HOOK, before)


@pytest.mark.parametrize("format", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MXFP8"])
def test_one_quantization_serves_all_projections_and_no_bit_changes(format, hook):
    torch._dynamo.reset()
    block = Block(format)
    ours = FusionPass()
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    patches = {"emulate_precision_casts": True, "force_disable_caches": True, HOOK: ours}
    with torch.no_grad(), inductor_config.patch(**patches):
        assert torch.equal(torch.compile(block, fullgraph=True)(x), block(x))
    (report,) = ours.reports
    shared = [r for r in report.rewrites if r.what == "one quantization for 3"]
    assert [r.modules for r in shared] == [("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_products_are_those_of_the_mode(inside, hook):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stored = quantized_tensors("FP8", torch.randn(K, K).bfloat16())
    layer = make_layer(torch.nn.Linear(K, K, bias=False, dtype=torch.bfloat16), FORMATS["FP8"])
    for leaf, tensor in stored.items():
        getattr(layer, leaf).data = tensor
    finish_loading(layer)
    x, ours = torch.randn(17, K), FusionPass()
    mode = mokernels.batch_invariant() if inside else nullcontext()
    with torch.no_grad(), mode, inductor_config.patch({"force_disable_caches": True, HOOK: ours}):
        y = torch.compile(layer, fullgraph=True)(x)
        assert torch.equal(y, layer(x))
        if inside:
            assert all(torch.equal(y[row : row + 1], layer(x[row : row + 1])) for row in range(17))


def test_batch_invariance_entered_inside_breaks_the_graph_and_holds():
    weight, scale = torch.randn(48, K).to(torch.float8_e4m3fn), torch.ones(())

    def entering(x):
        with mokernels.batch_invariant():
            return torch.ops.mokernels.fp8_weight_only_gemm(x, weight, scale)

    torch._dynamo.reset()
    x = torch.randn(130, K)
    assert torch.equal(torch.compile(entering, backend="eager")(x), entering(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(entering, backend="eager", fullgraph=True)(x)


def test_disable_takes_back_only_ours(hook):
    def foreign(graph):
        return None

    setattr(inductor_config, HOOK, Chain(foreign))
    mokernels.compile.enable()
    assert mokernels.compile.is_enabled()
    assert enabled_pass() is not None
    mokernels.compile.disable()
    assert not mokernels.compile.is_enabled()
    assert getattr(inductor_config, HOOK) is foreign


def test_the_uuid_follows_the_options_and_the_mode():
    plain, other = FusionPass(), FusionPass(FusionOptions(fuse_norm=False))
    assert plain.uuid() == FusionPass().uuid() != other.uuid()
    outside = plain.uuid()
    with mokernels.batch_invariant():
        assert plain.uuid() == FusionPass().uuid() != outside
    assert plain.uuid() == outside


def test_options_are_split_and_checked():
    ours, inductors = split_options({"mokernels.expand": False, "max_autotune": True})
    assert ours == FusionOptions(expand=False)
    assert inductors == {"max_autotune": True}
    with pytest.raises(ArgumentError, match=r"'mokernels.fuse_all', wanted one of"):
        split_options({"mokernels.fuse_all": True})
    with pytest.raises(ArgumentError, match="wanted True or False"):
        split_options({"mokernels.expand": 1})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']._modules['model'].layers[0].mlp", "model.layers.0.mlp"),
        ("L['fn'].layer.self_attn.q_proj", "layer.self_attn.q_proj"),
        ("L['args'][0].model.layers['3']", "model.layers.3"),
        ("L['self'].__dict__['_modules']['base'].__dict__['_modules']['model']", "base.model"),
        ("L['m']._orig_mod.lm_head", "lm_head"),
        ("L['self']", ""),
    ],
)
def test_paths_of_modules_are_the_models_own(path, expected):
    assert clean_path(path) == expected


def test_loading_keeps_the_options_that_were_enabled(hook):
    options = FusionOptions(fuse_norm=False)
    mokernels.compile.enable(options)
    finish_loading(torch.nn.Linear(2, 2))
    assert enabled_pass().options == options
    mokernels.compile.disable()
    finish_loading(torch.nn.Linear(2, 2))
    assert enabled_pass().options == FusionOptions()
