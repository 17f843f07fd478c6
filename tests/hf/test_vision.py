"""Vision-language models: the language is quantized, and names are those of the files."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mokernels
from mokernels.layers import QuantizedLinear
from tests.support.vision import batches, known_vision_model, see

# As nvidia-modelopt 0.47 writes them (tests/ptq/test_against_modelopt.py compares the files).
EXCLUDED = {
    "Qwen2_5_VL": ["lm_head", "model.embed_tokens", "visual*"],
    "Qwen3VLMoe": [
        "lm_head",
        "model.language_model.embed_tokens",
        "model.language_model.layers.0.mlp.gate",
        "model.language_model.layers.1.mlp.gate",
        "model.visual*",
    ],
    "Gemma3": ["lm_head", "vision_tower*"],
    "Llava": [
        "language_model.lm_head",
        "language_model.model.embed_tokens",
        "multi_modal_projector*",
        "vision_tower*",
    ],
}


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
@pytest.mark.parametrize("architecture", EXCLUDED)
def test_the_whole_way_round(architecture, format, tmp_path):
    known_vision_model(architecture).save_pretrained(tmp_path / "plain")
    load = AutoModelForImageTextToText.from_pretrained
    model = load(tmp_path / "plain", dtype=torch.bfloat16)
    mokernels.quantize(model, format, see, unseen="max", progress=False)
    names = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert names
    assert all("language_model" in name for name in names)
    folder = mokernels.export(model, tmp_path / "out")
    stated = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert stated["exclude_modules"] == EXCLUDED[architecture]
    assert mokernels.check(folder).ok
    ids = batches()[0]
    for again in (load(folder), mokernels.from_pretrained(folder)):
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
