"""``mokernels generate`` on a tiny checkpoint with a tokenizer of bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from typer.testing import CliRunner

import mokernels
from mokernels.cli import app
from mokernels.cli.generate import Sampling, encode
from mokernels.compile import compile_layers
from mokernels.demo import hub
from mokernels.errors import ArgumentError
from tests.demo.tiny import byte_tokenizer, talkative_model
from tests.support.models import export

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = export(talkative_model(), tmp_path_factory.mktemp("model") / "m", "FP8_PB_WO")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: False)


def generate(*arguments: object, code: int = 0, **environment: str):
    words = ["generate", *map(str, arguments), "--max-new-tokens", "8", "--device", "cpu"]
    result = runner.invoke(app, words)
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


def expected_answer(folder: Path, text: str, **options) -> str:
    """The greedy continuation, by the library alone."""
    model, tokenizer = mokernels.from_pretrained(folder, **options), byte_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    for _ in range(8):
        with torch.inference_mode():
            best = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
    return tokenizer.decode(ids[0, -8:])


def test_the_chat_template_is_used_where_there_is_one(folder):
    wanted = expected_answer(folder, "<bos>Hello", dtype=torch.float32)
    assert wanted.strip()
    assert generate(folder, "-p", "Hello", "--dtype", "float32").stdout == f"{wanted}\n"


def test_without_the_chat_template_the_text_is_continued(folder):
    wanted = expected_answer(folder, "Hello", dtype=torch.float32)
    assert wanted != expected_answer(folder, "<bos>Hello", dtype=torch.float32)
    result = generate(folder, "-p", "Hello", "--dtype", "float32", "--no-chat")
    assert result.stdout == f"{wanted}\n"


def test_the_whole_text_at_once_is_the_streamed_text(folder):
    streamed = generate(folder, "-p", "Hello")
    assert generate(folder, "-p", "Hello", "--no-stream").stdout == streamed.stdout


def test_compiled_the_text_is_the_same(folder, monkeypatch):
    seen = []
    run = mokernels.generate

    def spy(model, inputs, **options):
        seen.append(options["compile"])
        if options["compile"] is True:
            compile_layers(model, backend="eager")  # takes less long
        return run(model, inputs, **options)

    wanted = generate(folder, "-p", "Hello", "--dtype", "float32").stdout
    monkeypatch.setattr(mokernels, "generate", spy)
    counters.clear()
    assert generate(folder, "-p", "Hello", "--dtype", "float32", "--no-compile").stdout == wanted
    assert generate(folder, "-p", "Hello", "--dtype", "float32").stdout == wanted
    assert counters["stats"]["unique_graphs"] == 0
    assert generate(folder, "-p", "Hello", "--dtype", "float32", "--compile").stdout == wanted
    assert counters["stats"]["unique_graphs"] == 2
    assert seen == [False, "auto", True]


def test_sampling_depends_on_the_seed_alone(folder):
    def sample(seed):
        options = ("--temperature", 2, "--top-p", 0.9, "--seed", seed)
        return generate(folder, "-p", "Hello", *options).stdout

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert sample(1) != generate(folder, "-p", "Hello").stdout


def test_activations_reach_the_loader(folder, monkeypatch):
    seen = []
    load = mokernels.from_pretrained

    def spy(path, **options):
        seen.append(options)
        return load(path, **options)

    monkeypatch.setattr(mokernels, "from_pretrained", spy)
    generate(folder, "-p", "x", "--activations", "fp8_block", "--dtype", "float16")
    assert seen == [{"activations": "fp8_block", "dtype": torch.float16, "device_map": "cpu"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-p", 0.5), "--top-p has no effect without sampling"),
        (("--temperature", 1, "--top-p", 0), "--top-p is 0.0, wanted a share above 0"),
        (("--dtype", "int4"), "--dtype is 'int4', wanted one of auto, bfloat16"),
        (("--activations", "4bit"), "activations='4bit' is not known"),
        (("--device", "abacus"), "The device 'abacus' cannot be used"),
    ],
)
def test_options_that_cannot_be(folder, options, message):
    words = ["generate", str(folder), "-p", "x", *map(str, options)]
    result = runner.invoke(app, words, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_checkpoint_without_tokenizer_says_what_to_do(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    result = generate(bare, "-p", "Hello", code=2)
    assert "holds no tokenizer" in result.stderr
    assert "--tokenizer" in result.stderr
    given = generate(bare, "-p", "Hello", "--tokenizer", folder)
    assert given.stdout == generate(folder, "-p", "Hello").stdout


def test_chat_without_a_template_is_refused():
    tokenizer = byte_tokenizer(chat=False)
    with pytest.raises(ArgumentError, match="has no chat template"):
        encode(tokenizer, "Hello", chat=True)
    assert encode(tokenizer, "Hello", chat=None)["input_ids"].shape == (1, 5)


def test_a_plain_checkpoint_is_refused(tmp_path):
    talkative_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    result = generate(tmp_path, "-p", "Hello", code=1)
    assert "[not-modelopt]" in result.stderr


def test_a_broken_checkpoint_is_refused_without_a_traceback(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "hf_quant_config.json").read_text())
    config["quantization"]["quant_algo"] = "NVFP4"
    (broken / "hf_quant_config.json").write_text(json.dumps(config))
    result = generate(broken, "-p", "Hello", code=1)
    assert "[format-contradiction]" in result.stderr
    assert "Traceback" not in result.output


def test_greedy_ignores_what_the_model_says_about_sampling():
    assert Sampling().options() == {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": 256,
    }
