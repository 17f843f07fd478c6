"""Compiling by layers: which they are, how often they compile, and taking it back."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from mokernels.compile import compile_layers, decompile_layers
from mokernels.compile.layer_inputs import LayerCache, layer_index, own_entry
from mokernels.compile.regional import CompiledLayer, repeated_layers
from mokernels.errors import ArgumentError
from mokernels.hf.static_cache import CACHE_NAME
from tests.support.models import tiny_model

QUICK = "aot_eager"  # a backend that traces and decomposes, and writes no code


@pytest.fixture(autouse=True)
def _counted():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x)) + x


class Stack(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def compiled(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if m._compiled_call_impl is not None]


def test_the_layers_are_those_of_the_largest_list():
    model = nn.Module()
    model.small = nn.ModuleList([Block(2), Block(2)])
    model.stack = Stack(width=16, depth=2)
    model.heads = nn.ModuleList([nn.Linear(64, 64)])  # a list of linears is no list of layers
    assert repeated_layers(model) == [*model.small, *model.stack.blocks]  # of one class
    model.small = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    assert repeated_layers(model) == list(model.stack.blocks)


def test_lists_inside_a_layer_belong_to_it():
    layers = nn.ModuleList(Stack(depth=9) for _ in range(2))
    assert repeated_layers(nn.Sequential(layers)) == list(layers)


def test_one_graph_for_all_layers_and_all_lengths():
    model, x = Stack(depth=4), [torch.randn(2, tokens, 8) for tokens in (5, 9, 4, 2)]
    expected = [model(each) for each in x]
    assert compile_layers(model, backend=QUICK) is model
    assert compiled(model) == list(model.blocks)
    with torch.no_grad():
        for each, wanted in zip(x, expected, strict=True):
            torch.testing.assert_close(model(each), wanted)
    assert graphs() == 1


def test_one_token_and_one_row_have_their_own_graphs():
    model = compile_layers(Stack(), backend=QUICK)
    with torch.no_grad():
        for rows, tokens in [(1, 3), (1, 1), (2, 3), (2, 1), (3, 1), (1, 7), (4, 9)]:
            model(torch.randn(rows, tokens, 8))
    assert graphs() == 4


def test_without_dynamic_sizes_each_length_is_compiled():
    model = compile_layers(Stack(), backend=QUICK, dynamic=False)
    with torch.no_grad():
        for tokens in (3, 4, 5):
            model(torch.randn(1, tokens, 8))
    assert graphs() == 3


def test_models_do_not_share_dynamos_limits():
    # All of these run the code of nn.Module._call_impl; its limit is 8.
    for width in range(2, 14):
        model = compile_layers(Stack(width), backend=QUICK)
        with torch.no_grad():
            model(torch.randn(1, 3, width))
    assert graphs() == 12


def test_a_model_without_lists_is_compiled_whole():
    model = compile_layers(Block(4), backend=QUICK)
    assert compiled(model) == [model]
    with torch.no_grad():
        model(torch.randn(2, 3, 4))
    assert graphs() == 1


def test_twice_is_once_and_other_arguments_replace_the_first():
    model = compile_layers(Stack(), backend=QUICK)
    first = model.blocks[0]._compiled_call_impl
    compile_layers(model, backend=QUICK)
    assert model.blocks[0]._compiled_call_impl is first
    compile_layers(model, backend="eager")
    assert model.blocks[0]._compiled_call_impl.regions.how.backend == "eager"


def test_taken_back_the_model_runs_as_before():
    model = compile_layers(Stack(), backend=QUICK)
    assert decompile_layers(model) is model
    assert compiled(model) == []
    model(torch.randn(1, 3, 8))
    assert graphs() == 0


def test_what_somebody_else_compiled_stays():
    model = Stack()
    model.embed.compile(backend=QUICK)
    decompile_layers(compile_layers(model, backend=QUICK))
    assert compiled(model) == [model.embed]


def test_hooks_of_a_layer_still_run():
    model = Stack()
    model.blocks[1].register_forward_hook(lambda module, args, out: out * 0)
    compile_layers(model, backend=QUICK)
    with torch.no_grad():
        assert model.blocks[1](torch.randn(1, 3, 8)).count_nonzero() == 0


def test_a_copy_is_not_compiled_and_the_original_can_go():
    model = compile_layers(Stack(), backend=QUICK)
    assert compiled(copy.deepcopy(model)) == []
    with torch.no_grad():
        model(torch.randn(1, 3, 8))
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_a_graph_break_is_an_error_unless_allowed():
    class Talks(Block):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model = nn.ModuleList([Talks(4)])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_layers(model, backend=QUICK)[0](torch.randn(1, 2, 4))
    compile_layers(model, backend=QUICK, fullgraph=False)[0](torch.randn(1, 2, 4))


def test_options_are_refused_before_anything_is_changed():
    model = Stack()
    with pytest.raises(ArgumentError, match=r"the option 'mokernels\.fuse_everything', wanted one"):
        compile_layers(model, backend="mokernels", options={"mokernels.fuse_everything": True})
    with pytest.raises(RuntimeError, match="fast"):
        compile_layers(model, mode="fast")
    assert compiled(model) == []


def test_a_layer_sees_its_own_entry_of_a_cache():
    model = tiny_model("Llama")
    cache = StaticCache(model.config, max_cache_len=8)
    indices = [layer_index(layer) for layer in model.model.layers]
    assert indices == [0, 1]
    assert layer_index(model.model) is None
    assert own_entry(cache, 1) is cache.layers[1]
    view = LayerCache(cache, cache.layers[1])
    keys = torch.ones(1, 2, 3, 32)
    assert view.update(keys, keys, 0)[0] is cache.layers[1].keys
    assert cache.layers[1].cumulative_length == 3
    assert cache.layers[0].cumulative_length == 0
    assert view.is_compileable is True  # asked of the whole cache
    assert copy.copy(view).cache is cache


def test_what_is_no_such_cache_is_passed_as_it_is():
    config = tiny_model("Llama").config
    assert own_entry(torch.ones(2), 0) is None
    assert own_entry(DynamicCache(), 0) is None  # has no entries yet
    assert own_entry(StaticCache(config, max_cache_len=8), 2) is None
    offloading = StaticCache(config, max_cache_len=8)
    offloading.offloading = True
    assert own_entry(offloading, 0) is None


def test_a_compiled_layer_writes_to_the_given_cache():
    model = tiny_model("Llama")
    ids = torch.tensor([[5, 6, 7]])
    caches = [StaticCache(model.config, max_cache_len=8) for _ in range(2)]
    with torch.no_grad():
        expected = model(input_ids=ids, **{CACHE_NAME: caches[0]})
        compile_layers(model, backend="eager")
        assert isinstance(model.model.layers[0]._compiled_call_impl, CompiledLayer)
        found = model(input_ids=ids, **{CACHE_NAME: caches[1]})
    assert torch.equal(found.logits, expected.logits)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys)
    assert graphs() == 1
