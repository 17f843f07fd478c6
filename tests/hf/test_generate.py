"""mokernels.generate: transformers' tokens, few compilations, captured steps, models left alone."""

import gc
import logging
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, StaticCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import mokernels
from mokernels.compile import compile_layers, decompile_layers
from mokernels.compile.regional import HowToCompile
from mokernels.errors import ArgumentError
from mokernels.hf import decoding
from mokernels.hf.decoding import generate_with, session_of
from mokernels.hf.generate import Plan, cache_size, choose_plan
from mokernels.hf.obstacles import to_capture
from mokernels.hf.static_cache import CACHE_NAME, rounded_length
from tests.support.models import export, tiny_model
from tests.support.recorded import Recorded, Rerun

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints"
QUICK = "eager"  # a backend that only traces
GREEDY = {"do_sample": False, "max_new_tokens": 4}
WINDOW = {"sliding_window": 16}


@pytest.fixture(autouse=True)
def _counted():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for a second core takes longer than these products
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_num_threads(threads)


def prompt(tokens: int, rows: int = 1) -> dict[str, torch.Tensor]:
    """Random ids and their mask; the first of several rows is padded on the left."""
    generator = torch.Generator().manual_seed(tokens + 100 * rows)
    ids = torch.randint(3, 100, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, 0], mask[0, 0] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def static(model, inputs, **options):
    """transformers alone, with a cache of the length that ours has."""
    arguments = {**inputs, **GREEDY, **options}
    cache = StaticCache(model.config, max_cache_len=cache_size(model, arguments, None)[1])
    return model.generate(**arguments, **{CACHE_NAME: cache}, disable_compile=True)


def stepping(model, inputs, capture, *, compile=False, **options):
    """Ours, with steps captured by a stand-in."""
    arguments = {**inputs, **GREEDY, **options}
    size = cache_size(model, arguments, None)
    return generate_with(model, arguments, size, compile=compile, capture=capture)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# test_compile.py has all formats. A prompt of one token needs one graph: less to wait for.
@pytest.mark.newest
@pytest.mark.parametrize(("name", "tokens"), [("fp8_pc_pt", 1), ("nvfp4", 9)])
# What comes from the cache on disk is not in the report.
@torch._inductor.config.patch(emulate_precision_casts=True, force_disable_caches=True)
def test_compiled_tokens_are_eager_tokens_bit_for_bit(name, tokens):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    model.generation_config.eos_token_id = None
    ids = load_file(GOLDEN / name / "oracle.safetensors")["input_ids"][:1, :tokens]
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    found = mokernels.generate(model, ids, compile=True, **options)
    assert graphs() == (1 if tokens == 1 else 2)
    fused = mokernels.compile.report(model).graphs[-1]
    assert "self_attn.q_proj" in fused.modules  # told by their place in the layer
    expected = static(model, {"input_ids": ids}, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("architecture", "layers"), [("Llama", 2), ("Llama", 6), ("Qwen3", 3), ("Gemma", 3)]
)
def test_two_compilations_whatever_the_lengths_and_layers(architecture, layers):
    model = tiny_model(architecture, num_hidden_layers=layers)
    compile_layers(model, backend=QUICK)
    for tokens in (5, 9, 17, 33, 1):
        mokernels.generate(model, prompt(tokens), compile=True, **GREEDY)
    assert graphs() == 2
    for tokens in (5, 9, 17, 33, 1):
        mokernels.generate(model, prompt(tokens, rows=3), compile=True, **GREEDY)
    assert graphs() == 4  # one row is special, and as it was
    mokernels.generate(model, prompt(7, rows=2), compile=True, **GREEDY)
    mokernels.generate(model, prompt(8), compile=True, **GREEDY)
    assert graphs() == 4


def test_quantized_layers_compile_no_oftener(tmp_path):
    folder = export(tiny_model("Llama", num_hidden_layers=4), tmp_path / "m", "FP8")
    model = compile_layers(mokernels.from_pretrained(folder), backend=QUICK)
    for tokens in (5, 9, 1):
        mokernels.generate(model, prompt(tokens), compile=True, **GREEDY)
    assert graphs() == 2


@pytest.mark.parametrize("layers", [2, 6])
def test_windows_are_compiled_apart_from_full_attention(layers):
    # Half of the layers have a window of 16 tokens, which the longer prompts and answers fill.
    model = tiny_model("Gemma2", num_hidden_layers=layers, **WINDOW)
    compile_layers(model, backend=QUICK)
    for tokens in (14, 25, 9, 40):
        mokernels.generate(model, prompt(tokens), compile=True, **GREEDY)
    # Full: prompt, step. Window: prompts that fit or not, the first and later steps, full or not.
    assert graphs() == 7


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("Llama", {}), ("Qwen3", {}), ("Gemma", {}), ("Gemma2", WINDOW), ("Mistral", WINDOW)],
    ids=["Llama", "Qwen3", "Gemma", "Gemma2", "Mistral"],
)
def test_replayed_steps_make_the_same_tokens(architecture, sizes, rows):
    model, capture = tiny_model(architecture, **sizes), Recorded()
    for tokens in (12, 30, 1):
        options = {"max_new_tokens": 6}
        found = stepping(model, prompt(tokens, rows), capture, **options)
        assert torch.equal(found, static(model, prompt(tokens, rows), **options))
    # A full window is moved, which is other work than filling it.
    assert capture.count == (2 if sizes else 1)


def test_replayed_logits_are_those_of_each_step():
    model = tiny_model("Llama")
    options = {"return_dict_in_generate": True, "output_logits": True}
    found = stepping(model, prompt(6), Recorded(), **options)
    expected = static(model, prompt(6), **options)
    assert all(map(torch.equal, found.logits, expected.logits))
    assert len(found.logits) == 4


def test_the_captured_step_holds_the_compiled_layers():
    model, capture = tiny_model("Llama"), Rerun()
    expected = [static(model, prompt(tokens)) for tokens in (5, 9, 1)]
    compile_layers(model, backend=QUICK)
    for tokens, wanted in zip((5, 9, 1), expected, strict=True):
        assert torch.equal(stepping(model, prompt(tokens), capture, compile=True), wanted)
    assert capture.count == 1
    assert graphs() == 2


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
def test_quantized_steps_are_replayed(tmp_path, format):
    model = mokernels.from_pretrained(export(tiny_model("Llama"), tmp_path / "m", format))
    for tokens in (4, 7):
        found = stepping(model, prompt(tokens), Recorded())
        assert torch.equal(found, static(model, prompt(tokens)))


def test_several_answers_to_a_prompt_and_prompts_in_chunks():
    model, capture = tiny_model("Llama"), Recorded()
    found = stepping(model, prompt(5), capture, do_sample=True, num_return_sequences=3)
    assert found.shape == (3, 9)
    chunked = stepping(model, prompt(9), capture, prefill_chunk_size=4)
    assert torch.equal(chunked, static(model, prompt(9)))


def test_a_moved_or_replaced_weight_is_captured_anew():
    model, capture = tiny_model("Llama"), Recorded()
    stepping(model, prompt(5), capture)
    stepping(model, prompt(6), capture)
    assert capture.count == 1
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    found = stepping(model, prompt(5), capture)
    assert capture.count == 2
    assert torch.equal(found, static(model, prompt(5)))


def test_a_step_is_captured_with_and_without_batch_invariance():
    model, capture = tiny_model("Llama"), Recorded()
    for mode in (nullcontext(), mokernels.batch_invariant()) * 2:
        with mode:
            stepping(model, prompt(5), capture)
    assert capture.count == 2


def test_two_sizes_are_kept_and_release_frees_them():
    model, capture = tiny_model("Llama"), Recorded()
    for rows in (1, 2, 1, 2):
        stepping(model, prompt(5, rows), capture)
    assert capture.count == 2
    for rows in (3, 1):  # 3 puts 1 out, which was used before 2
        stepping(model, prompt(5, rows), capture)
    assert capture.count == 4
    mokernels.release(model)
    stepping(model, prompt(5, 1), capture)
    assert capture.count == 5


def test_a_returned_cache_is_the_callers():
    model = tiny_model("Llama")
    options = {"compile": False, "cuda_graphs": False, "return_dict_in_generate": True}
    first = stepping(model, prompt(5), Recorded(), return_dict_in_generate=True)
    kept = first[CACHE_NAME].layers[0].keys.clone()
    stepping(model, prompt(7), Recorded())
    assert torch.equal(first[CACHE_NAME].layers[0].keys, kept)
    assert mokernels.generate(model, prompt(5), **options, **GREEDY).sequences.shape == (1, 9)


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.put_shapes, self.ended = [], False

    def put(self, value):
        self.put_shapes.append(tuple(value.shape))

    def end(self):
        self.ended = True


def test_streamer_and_criteria_pass_through():
    model, words = tiny_model("Llama"), Words()
    criteria = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 7])])
    found = stepping(model, prompt(5), Recorded(), streamer=words, stopping_criteria=criteria)
    assert found.shape == (1, 7)
    assert words.put_shapes == [(1, 5), (1,), (1,)]
    assert words.ended


def test_ids_and_a_tokenizers_dict_are_taken():
    model = tiny_model("Llama")
    inputs = prompt(5)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(mokernels.generate(model, inputs["input_ids"], **GREEDY), expected)
    assert torch.equal(mokernels.generate(model, inputs, **GREEDY), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["no_grad", "inference"])
def test_both_modes_share_one_cache(inside):
    model = tiny_model("Llama")
    stepping(model, prompt(5), Recorded())
    with torch.inference_mode(inside):
        found = stepping(model, prompt(5), Recorded())
    assert torch.equal(found, static(model, prompt(5)))


def test_the_model_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(decoding, "HowToCompile", lambda: HowToCompile(QUICK))
    model = tiny_model("Llama")
    before = dict(vars(model))
    stepping(model, prompt(5), Rerun(), compile=True)

    def breaks(ids, scores):
        assert model._compiled_call_impl is None
        assert model.model.layers[0]._compiled_call_impl is not None
        raise KeyError("a criterion's own")

    with pytest.raises(KeyError, match="a criterion's own"):
        stepping(model, prompt(5), Rerun(), compile=True, stopping_criteria=[breaks])
    assert vars(model) == before
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert torch.equal(stepping(model, prompt(5), Recorded()), static(model, prompt(5)))


def test_a_forward_that_was_replaced_before_comes_back():
    model, calls = tiny_model("Llama"), []
    original = model.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = counting
    stepping(model, prompt(5), Recorded())
    assert model.forward is counting
    assert calls


def test_what_is_kept_does_not_keep_the_model():
    gc.collect()
    model, before = tiny_model("Llama"), len(decoding._SESSIONS)
    compile_layers(model, backend=QUICK)
    mokernels.generate(model, prompt(5), compile=True, **GREEDY)
    decompile_layers(model)
    stepping(model, prompt(5), Recorded())
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert len(decoding._SESSIONS) == before


def test_generating_within_a_generation_is_refused():
    model = tiny_model("Llama")

    def nested(ids, scores):
        stepping(model, prompt(5), Recorded())

    with pytest.raises(ArgumentError, match="is generating already"):
        stepping(model, prompt(5), Recorded(), stopping_criteria=[nested])


def test_threads_take_turns():
    model, inside, together = tiny_model("Llama"), [], []

    def note(ids, scores):
        inside.append(threading.get_ident())
        together.append(len(set(inside)))
        if ids.shape[1] == 9:
            inside.clear()
        return torch.tensor([False])

    def run():
        stepping(model, prompt(5), Recorded(), stopping_criteria=[note])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 8


@pytest.mark.parametrize(
    ("options", "clause"),
    [
        ({"num_beams": 2}, "the option num_beams is 2, and a static cache wants None or 1"),
        ({"prompt_lookup_num_tokens": 3}, "the option prompt_lookup_num_tokens is 3"),
        ({"assistant_model": object()}, "the option assistant_model is 'object'"),
        ({"use_cache": False}, "the option use_cache is False"),
        ({"cache_implementation": "offloaded"}, "the option cache_implementation is 'offloaded'"),
        ({"guidance_scale": 1.5}, "the option guidance_scale is 1.5"),
        ({"output_hidden_states": True}, "the option output_hidden_states is True"),
        ({"past_key_values": StaticCache}, "the option past_key_values is 'type'"),
        ({"cache": StaticCache}, "the option cache is 'type'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_without_a_static_cache(options, clause):
    model = tiny_model("Llama")
    with pytest.raises(ArgumentError, match=f"cannot obey compile=True: {clause}.*'auto'"):
        mokernels.generate(model, prompt(5), compile=True, **options)
    with pytest.raises(ArgumentError, match=f"cannot obey cuda_graphs=True: {clause}"):
        choose_plan(model, options, "auto", True)
    assert choose_plan(model, options, "auto", "auto") == Plan(False, False)


def test_beams_are_searched_by_transformers_alone():
    model = tiny_model("Llama")
    options = {"num_beams": 2, **GREEDY}
    found = mokernels.generate(model, prompt(5), **options)
    assert torch.equal(found, model.generate(**prompt(5), **options))


def test_an_option_of_the_models_own_configuration_counts():
    model = tiny_model("Llama")
    model.generation_config.num_beams = 4
    with pytest.raises(ArgumentError, match="the option num_beams is 4"):
        mokernels.generate(model, prompt(5), compile=True)
    assert choose_plan(model, {"num_beams": 1}, True, False) == Plan(True, False)


def test_cuda_graphs_want_a_gpu():
    model = tiny_model("Llama")
    with pytest.raises(
        ArgumentError, match="cuda_graphs=True: the model is on the device 'cpu', which has no CUDA"
    ):
        mokernels.generate(model, prompt(5), cuda_graphs=True)
    assert choose_plan(model, {}, "auto", "auto") == Plan(False, False)
    assert choose_plan(model, {}, True, "auto") == Plan(True, False)


def say_on_gpu(model, monkeypatch) -> None:
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))


def test_on_a_gpu_both_are_chosen_and_said(monkeypatch, caplog):
    model = tiny_model("Llama")
    say_on_gpu(model, monkeypatch)
    caplog.set_level(logging.INFO, logger="mokernels")
    assert choose_plan(model, {}, "auto", "auto") == Plan(True, True)
    assert "compiled layers True, CUDA graphs True" in caplog.text
    assert choose_plan(model, {}, False, "auto") == Plan(False, False)
    assert choose_plan(model, {}, False, True) == Plan(False, True)
    assert choose_plan(model, {"num_beams": 2}, "auto", "auto") == Plan(False, False)
    assert "runs uncompiled: the option num_beams is 2" in caplog.text


def test_steps_that_a_graph_cannot_hold(monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = tiny_model("Llama", rope_parameters=rope)
    say_on_gpu(dynamic, monkeypatch)
    assert "its rotary embedding (dynamic) changes" in to_capture(dynamic, True)
    assert choose_plan(dynamic, {}, "auto", "auto") == Plan(True, False)
    sliding = tiny_model("Gemma2")
    say_on_gpu(sliding, monkeypatch)
    assert "a full sliding window is moved by uncompiled code" in to_capture(sliding, False)
    assert to_capture(sliding, True) is None
    seeing = tiny_model("Llama")
    monkeypatch.setattr(type(seeing.config), "get_text_config", lambda self, **_: dynamic.config)
    assert "LlamaForCausalLM takes more than text" in to_capture(seeing, True)


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda m: setattr(m, "hf_device_map", {"a": 0, "b": "cpu"}), "parts are on several"),
        (lambda m: m.compile(), "the model is compiled already"),
        (lambda m: m.model.layers[0].compile(), "the model is compiled already"),
        (lambda m: setattr(m.config, "_attn_implementation", "flex_attention"), "'flex_attention'"),
        (lambda m: setattr(m.model, "layers", torch.nn.Sequential(*m.model.layers)), "no list of"),
    ],
    ids=["devices", "compiled", "compiled-layer", "attention", "no-layers"],
)
def test_models_without_a_static_cache(change, clause):
    model = tiny_model("Llama")
    change(model)
    with pytest.raises(ArgumentError, match=f"cannot obey compile=True: .*{clause}"):
        mokernels.generate(model, prompt(5), compile=True)
    assert choose_plan(model, {}, "auto", "auto") == Plan(False, False)


def test_models_of_other_kinds():
    with pytest.raises(ArgumentError, match="the model is a Linear, no causal language model"):
        mokernels.generate(torch.nn.Linear(2, 2), prompt(5), compile=True)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([1, 2], {}, r"inputs is a list, wanted token ids \[B, T\]"),
        (torch.tensor([1, 2]), {}, r"The prompt \(input_ids\) is \[2\], wanted a tensor"),
        ({"attention_mask": torch.ones(1, 2)}, {}, "is NoneType, wanted a tensor"),
        (prompt(5), {"attention_mask": None}, "attention_mask was given in inputs and as an"),
        (prompt(5), {"compile": "yes"}, "compile is 'yes', wanted True, False or 'auto'"),
        (prompt(5), {"compile": True, "max_cache_len": 24, "max_new_tokens": 20},
         "max_cache_len is 24, but a prompt of 5 tokens and the longest answer to it make 25"),
    ],
    ids=["list", "vector", "nothing", "twice", "choice", "short"],
)  # fmt: skip
def test_arguments_that_cannot_be(inputs, options, message):
    with pytest.raises(ArgumentError, match=message):
        mokernels.generate(tiny_model("Llama"), inputs, **options)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_new_tokens": 4}, 256),
        ({"max_new_tokens": 300}, 512),
        ({"max_new_tokens": 1000}, 1005),  # beyond what the model knows anyway
        ({"max_length": 600}, 600),
        ({}, 256),
    ],
)
def test_lengths_are_rounded_up_to_few(options, length):
    model = tiny_model("Llama", max_position_embeddings=600)
    assert cache_size(model, {**prompt(5, 3), **options}, None) == (3, length)


def test_powers_of_two_up_to_what_the_model_knows():
    found = [rounded_length(tokens, 3000) for tokens in (1, 256, 257, 2000, 2049, 4000)]
    assert found == [256, 256, 512, 2048, 3000, 4000]
    assert rounded_length(4000, None) == 4096


def test_a_given_length_is_the_caches():
    model = tiny_model("Llama")
    output = generate_with(
        model,
        {**prompt(5), **GREEDY, "return_dict_in_generate": True},
        cache_size(model, prompt(5), 33),
        compile=False,
        capture=None,
    )
    assert output[CACHE_NAME].get_max_length() == 33
    assert session_of(model)._kept == {}
