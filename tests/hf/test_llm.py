"""``mokernels.LLM``: batches of prompts, by continuous batching and by padded batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import mokernels
from mokernels import LLM, SamplingParams
from mokernels.errors import ArgumentError, BackendError, CheckpointError
from mokernels.hf import continuous, llm
from mokernels.hf.answers import Answer
from mokernels.hf.engine import Engine
from tests.demo.tiny import byte_tokenizer, save_model, talkative_model
from tests.support.models import export

PROMPTS = ["Hello, my", "a", "What is the longest prompt of these?"]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = export(talkative_model(), tmp_path_factory.mktemp("model") / "m", "FP8_PB_WO")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def padded(folder) -> LLM:
    return LLM(folder, dtype=torch.float32, continuous_batching=False, max_num_seqs=2)


@pytest.fixture(scope="module")
def batched(folder) -> LLM:
    return LLM(folder, dtype=torch.float32, continuous_batching=True, max_num_seqs=2)


@pytest.fixture(params=["padded", "batched"])
def both(request) -> LLM:
    return request.getfixturevalue(request.param)


def tokens(outputs) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


def alone(model: LLM, prompt: str, count: int) -> list[int]:
    """The greedy continuation, by forward passes alone."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    for _ in range(count):
        with torch.inference_mode():
            best = model.model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
    return ids[0, start:].tolist()


def test_greedy_answers_are_those_of_each_prompt_alone(both):
    outputs = both.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(outputs) == [alone(both, prompt, 12) for prompt in PROMPTS]
    assert [output.prompt for output in outputs] == PROMPTS
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    for output in outputs:
        assert output.finished
        assert output.prompt_token_ids == both.tokenizer(output.prompt)["input_ids"]
        (answer,) = output.outputs
        assert (answer.index, answer.finish_reason, answer.stop_reason) == (0, "length", None)
        assert answer.text == both.tokenizer.decode(answer.token_ids)


def test_the_model_is_as_it_was(both):
    own, attention = both.model.generation_config, both.model.config._attn_implementation
    both.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    assert both.model.generation_config is own
    assert both.model.config._attn_implementation == attention == "sdpa"


def test_prompts_of_all_kinds(padded):
    ids = padded.tokenizer("abc")["input_ids"]
    wanted = tokens(padded.generate("abc", GREEDY, use_tqdm=False))
    for prompt in (ids, [ids], ["abc"], {"prompt": "abc"}, [{"prompt_token_ids": ids}]):
        assert tokens(padded.generate(prompt, GREEDY, use_tqdm=False)) == wanted
    assert padded.generate([], GREEDY, use_tqdm=False) == []


def test_stop_texts_cut_the_answer(both):
    text = both.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = text[4:6]
    cut = text.index(stop)

    def stopped(**options):
        params = SamplingParams(temperature=0, max_tokens=12, stop=["no", stop], **options)
        return both.generate(PROMPTS, params, use_tqdm=False)[1].outputs[0]

    answer = stopped()
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text[:cut], "stop", stop)
    assert answer.token_ids == alone(both, PROMPTS[1], 12)[: len(answer.token_ids)]
    assert stop in both.tokenizer.decode(answer.token_ids)
    assert stop not in both.tokenizer.decode(answer.token_ids[:-1])
    assert stopped(include_stop_str_in_output=True).text == text[: cut + len(stop)]


def test_stop_tokens_and_the_models_own_end(both, monkeypatch):
    made = alone(both, PROMPTS[1], 12)
    token = made[5]
    place = made.index(token)

    def stopped(**options):
        params = SamplingParams(temperature=0, max_tokens=12, **options)
        return both.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0]

    answer = stopped(stop_token_ids=[token])
    assert answer.token_ids == made[: place + 1]
    assert answer.text == both.tokenizer.decode(made[:place])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token)
    monkeypatch.setattr(both.model.generation_config, "eos_token_id", [token, 1])
    answer = stopped()
    assert (answer.token_ids, answer.stop_reason) == (made[: place + 1], None)
    assert stopped(ignore_eos=True).token_ids == made


def test_a_seed_is_of_its_prompt_alone(padded):
    def sample(prompts, **options):
        params = SamplingParams(temperature=1.5, top_p=0.9, max_tokens=8, **options)
        return tokens(padded.generate(prompts, params, use_tqdm=False))

    together = sample(PROMPTS, seed=3)
    assert together == [row for prompt in PROMPTS for row in sample(prompt, seed=3)]
    assert sample(PROMPTS, seed=4) != together
    torch.manual_seed(0)
    first = sample(PROMPTS)
    assert sample(PROMPTS) != first
    torch.manual_seed(0)
    assert sample(PROMPTS) == first


def test_several_answers_have_seeds_of_their_own(padded):
    def sample(seed, n=1):
        params = SamplingParams(temperature=1.5, max_tokens=6, seed=seed, n=n)
        return tokens(padded.generate("abc", params, use_tqdm=False))

    assert sample(5, n=3) == [*sample(5), *sample(6), *sample(7)]


def test_each_prompt_has_its_own_parameters(padded):
    params = [
        GREEDY,
        SamplingParams(temperature=1.2, seed=1, max_tokens=5, top_k=20),
        SamplingParams(temperature=0, repetition_penalty=1.8, max_tokens=9),
    ]
    together = tokens(padded.generate(PROMPTS, params, use_tqdm=False))
    separate = zip(PROMPTS, params, strict=True)
    assert together == [tokens(padded.generate(*pair, use_tqdm=False))[0] for pair in separate]
    assert [len(row) for row in together] == [12, 5, 9]
    assert together[2] != alone(padded, PROMPTS[2], 9)


def test_continuous_batching_takes_different_parameters_in_groups(batched):
    hot = SamplingParams(temperature=1.3, top_k=10, max_tokens=4)
    outputs = batched.generate(PROMPTS, [GREEDY, hot, GREEDY], use_tqdm=False)
    assert [len(row) for row in tokens(outputs)] == [12, 4, 12]
    assert tokens(outputs)[2] == alone(batched, PROMPTS[2], 12)
    # One likely token: sampling finds what greedy does.
    sure = SamplingParams(temperature=1.0, top_k=1, max_tokens=3)
    assert tokens(batched.generate("a", sure, use_tqdm=False)) == [alone(batched, "a", 3)]


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"min_p": 0.1}, {"presence_penalty": 0.5}, {"min_tokens": 2}]
)
def test_continuous_batching_refuses_what_it_would_not_do(batched, options):
    with pytest.raises(ArgumentError, match="continuous_batching=True cannot be obeyed: it "):
        batched.generate("a", SamplingParams(**options), use_tqdm=False)


def test_auto_chooses_by_device_and_parameters(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(llm, "answer_padded", lambda *_: seen.append("padded"))
    monkeypatch.setattr(llm, "answer_continuously", lambda *_: seen.append("continuous"))
    model = LLM(folder)
    model.generate("a", GREEDY, use_tqdm=False)
    gpu = torch.device("cuda")
    monkeypatch.setattr(type(model.model), "device", property(lambda self: gpu))
    model.generate("a", GREEDY, use_tqdm=False)
    model.generate("a", SamplingParams(seed=1), use_tqdm=False)
    assert seen == ["padded", "continuous", "padded"]


def test_a_failure_of_continuous_batching_is_told(batched, monkeypatch):
    forward = type(batched.model).forward

    def fail(self, *args, **kwargs):
        raise RuntimeError("the kernel is missing")

    monkeypatch.setattr(type(batched.model), "forward", fail)
    with pytest.raises(BackendError, match=r"the kernel is missing.*continuous_batching=False"):
        batched.generate(PROMPTS, GREEDY, use_tqdm=False)
    monkeypatch.setattr(type(batched.model), "forward", forward)
    assert tokens(batched.generate("a", GREEDY, use_tqdm=False)) == [alone(batched, "a", 12)]


def test_a_model_without_it_says_so():
    class Other:
        pass

    assert continuous.obstacle(Other(), []) == "Other has no continuous batching"


def test_chat_uses_the_template(padded):
    messages = [{"role": "user", "content": "Hello"}]
    (output,) = padded.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<bos>Hello"
    assert output.prompt_token_ids == [1, *padded.tokenizer("Hello")["input_ids"]]
    assert tokens([output]) == [alone(padded, "<bos>Hello", 12)]
    both = padded.chat([messages, messages], GREEDY, use_tqdm=False)
    assert tokens(both) == tokens([output, output])
    other = padded.chat(messages, GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}")
    assert other[0].prompt == "Hello"


def test_chat_without_a_template(padded, monkeypatch):
    monkeypatch.setattr(padded.tokenizer, "chat_template", None)
    with pytest.raises(ArgumentError, match="The tokenizer has no chat template"):
        padded.chat([{"role": "user", "content": "Hello"}])


def test_the_models_own_recommendation(padded, monkeypatch):
    own = padded.model.generation_config
    monkeypatch.setattr(own, "temperature", 0.25)
    monkeypatch.setattr(own, "repetition_penalty", 1.5)
    wanted = SamplingParams(temperature=0.25, repetition_penalty=1.5)
    assert padded.get_default_sampling_params() == wanted
    assert len(tokens(padded.generate("a", use_tqdm=False))[0]) == 16
    # Parameters that are given leave nothing of the model's own.
    assert tokens(padded.generate("a", GREEDY, use_tqdm=False)) == [alone(padded, "a", 12)]


def test_the_progress_bar_counts_answers(both, capsys):
    both.generate(PROMPTS, GREEDY)
    assert "3/3" in capsys.readouterr().err
    both.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_answers_end_where_the_positions_do(padded):
    ids = [40] * 1020
    params = SamplingParams(temperature=0, max_tokens=None)
    (answer,) = padded.generate(ids, params, use_tqdm=False)[0].outputs
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")
    for bad in ([40] * 1024, ""):
        with pytest.raises(
            ArgumentError, match="wanted at least 1 and fewer than the 1024 positions of the model"
        ):
            padded.generate(bad, params, use_tqdm=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate(["a", "b"], [GREEDY]), "There are 2 prompts and 1 sampling"),
        (lambda model: model.generate({"text": "a"}), "A prompt is a dict with 'text', wanted"),
    ],
)
def test_wrong_calls(padded, call, message):
    with pytest.raises(ArgumentError, match=message):
        call(padded)


def test_a_plain_model_is_loaded_too(tmp_path):
    save_model(tmp_path)
    model = LLM(tmp_path, dtype=torch.float32)
    assert tokens(model.generate("a", GREEDY, use_tqdm=False)) == [alone(model, "a", 12)]
    with pytest.raises(ArgumentError, match="activations='16bit' is for ModelOpt checkpoints"):
        LLM(tmp_path, activations="16bit")


def test_folders_that_cannot_be(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"\[folder-missing\]"):
        LLM(tmp_path / "nothing")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ArgumentError, match=r"no tokenizer.*pass the original model as token"):
        LLM(bare)
    assert tokens(LLM(bare, tokenizer=folder).generate("a", GREEDY, use_tqdm=False))
    with pytest.raises(ArgumentError, match="continuous_batching is 'yes', wanted True, False"):
        LLM(folder, continuous_batching="yes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0, wanted at least 1"),
        ({"max_model_len": 1}, "max_model_len is 1, wanted at least 2, or None"),
        (
            {"gpu_memory_utilization": 1.5},
            r"gpu_memory_utilization is 1\.5, wanted a share above 0",
        ),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, wanted 1: .* start torchrun"),
        ({"quantization": "awq"}, "quantization is 'awq', wanted 'modelopt', or None"),
    ],
)
def test_options_that_cannot_be(folder, options, message):
    with pytest.raises(ArgumentError, match=message):
        LLM(folder, **options)


def test_options_as_users_of_vllm_write_them(folder, tmp_path):
    options = {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "enforce_eager": True}
    model = LLM(folder, quantization="modelopt", max_model_len=8, seed=3, **options)
    longer = SamplingParams(max_tokens=12)
    (answer,) = model.generate([5, 6, 7], longer, use_tqdm=False)[0].outputs
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")
    torch.manual_seed(3)
    again = model.generate([5, 6, 7], longer, use_tqdm=False)[0].outputs[0]
    assert again.token_ids == answer.token_ids
    with pytest.raises(ArgumentError, match="fewer than the 8 positions of max_model_len"):
        model.generate([5] * 8, longer, use_tqdm=False)
    save_model(tmp_path)
    with pytest.raises(ArgumentError, match=r"was given, but .* holds no checkpoint of ModelOpt's"):
        LLM(tmp_path, quantization="modelopt")


def test_continuous_batching_gets_the_options_too(batched):
    engine = Engine(7, gpu_memory_utilization=0.4, enforce_eager=True)
    row = Answer([1], GREEDY, 0, frozenset(), 4, str)
    config = continuous._batching_config(batched.model, [row], engine)
    assert config.max_requests_per_batch == 7
    assert config.max_memory_percent == 0.4
    assert config.use_cuda_graph is False


def test_tokens_at_least(padded):
    ends = set(tokens(padded.generate(PROMPTS, GREEDY, use_tqdm=False))[0])
    few = {"temperature": 0, "max_tokens": 12, "stop_token_ids": sorted(ends)}
    (short,) = tokens(padded.generate(PROMPTS[0], SamplingParams(**few), use_tqdm=False))
    assert len(short) == 1
    params = SamplingParams(**few, min_tokens=5)
    (made,) = tokens(padded.generate(PROMPTS[0], params, use_tqdm=False))
    assert len(made) >= 6
    assert not ends & set(made[:5])
    both = padded.generate(PROMPTS, [params, GREEDY, params], use_tqdm=False)
    assert tokens(both)[0] == made
    assert tokens(both)[1] == alone(padded, PROMPTS[1], 12)


def test_names_are_the_packages():
    assert mokernels.LLM is LLM
    assert mokernels.SamplingParams is SamplingParams
