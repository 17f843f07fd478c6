"""Bit for bit what ModelOpt 0.47 exports, from the amax that it calibrated; no ModelOpt needed."""

import json

import pytest

import mokernels
from mokernels.checkpoint.layout import nested_layout
from mokernels.formats import FORMATS
from mokernels.ptq.config import parse_config
from mokernels.ptq.convert import convert_layers, fused_groups
from mokernels.ptq.rehearse import choose_layers, excluded_patterns
from tests.ptq.golden import (
    ARCHITECTURES,
    FILE,
    MIXED_CASES,
    PRESETS,
    batches,
    digest,
    known_model,
    weights_of,
)

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("format", PRESETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_and_configuration(architecture, format):
    entry, model = GOLDEN[f"{architecture} {format}"], known_model(architecture)
    chosen = choose_layers(model, parse_config(format))
    excluded = excluded_patterns(model, chosen)
    assert nested_layout(FORMATS[format], excluded, None) == entry["hf_quant_config"]
    noise = convert_layers(model, chosen, entry["amax"], fused_groups(chosen))
    assert digest(model.state_dict().items()) == entry["digest"]
    bits = 8 // FORMATS[format].element.per_item
    assert all({8: 28, 4: 17}[bits] < value < {8: 40, 4: 25}[bits] for value in noise.values())


@pytest.mark.parametrize(("architecture", "format"), MIXED_CASES)
def test_mixtures_of_experts(architecture, format, tmp_path):
    entry, model = GOLDEN[f"{architecture} {format}"], known_model(architecture)
    mokernels.quantize(model, format, batches(), unseen="max", progress=False)
    folder = mokernels.export(model, tmp_path / "out", reload=False)
    stated = json.loads((folder / "hf_quant_config.json").read_text())
    assert stated == entry["hf_quant_config"]
    assert digest(weights_of(folder).items()) == entry["digest"]


def test_the_digest_sees_every_bit():
    model = known_model("Llama")
    before = digest(model.state_dict().items())
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    assert digest(model.state_dict().items()) != before
