"""What quantize is told: names, patterns, ModelOpt's own configurations of several ages."""

import pytest

from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS
from mokernels.ptq.config import parse_config

FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    "axis": None,
}
OFF = {"quantizer_name": "*", "enable": False}
ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def rules(*entries, algorithm="max"):
    return {"quant_cfg": [OFF, *entries], "algorithm": algorithm}


def rule(pattern, cfg=None, **more):
    return {"quantizer_name": pattern, **({} if cfg is None else {"cfg": cfg}), **more}


def chosen(config, name, **options):
    row = parse_config(config, **options).choose(name)
    return row and row.name


@pytest.mark.parametrize("name", [*FORMATS, "nvfp4", "fp8_pb_wo"])
def test_names_in_any_case(name):
    assert chosen(name, MLP) == name.upper()


@pytest.mark.parametrize(
    "layer",
    [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.3.block_sparse_moe.gate",
        "model.visual.blocks.0.attn.qkv",
        "model.layers.0.mlp.router",
        "output",
    ],
)
def test_what_modelopt_leaves_alone_stays_plain(layer):
    assert chosen("FP8", layer) is None
    assert chosen({"*": "FP8"}, layer) is None


def test_a_gate_projection_is_no_router():
    assert chosen("FP8", "model.layers.0.mlp.gate_proj") == "FP8"


def test_the_last_pattern_counts_and_exact_names_beat_the_default_exclusions():
    config = {"*": "NVFP4", "*self_attn*": "FP8", "*down_proj": None, "lm_head": "FP8"}
    assert chosen(config, ATTENTION) == "FP8"
    assert chosen(config, MLP) is None
    assert chosen(config, "model.layers.0.mlp.up_proj") == "NVFP4"
    assert chosen(config, "lm_head") == "FP8"


@pytest.mark.parametrize("exclude", ["*mlp*", ["*.9.*", "*.0.mlp.down_proj"]])
def test_exclusions_win(exclude):
    assert chosen("FP8", MLP, exclude=exclude) is None
    assert chosen("FP8", ATTENTION, exclude=exclude) == "FP8"


def test_modelopts_rules_in_their_order():
    config = rules(
        rule("*weight_quantizer", FP8),
        rule("*input_quantizer", FP8),
        rule("*mlp*weight_quantizer", NVFP4),
        rule("*mlp*input_quantizer", NVFP4),
        rule("*lm_head*", enable=False),
    )
    assert (chosen(config, ATTENTION), chosen(config, MLP)) == ("FP8", "NVFP4")
    assert chosen(config, "lm_head") is None
    assert parse_config(config).kv_cache is None


def test_modelopts_older_dictionaries_and_names_of_bits():
    named = {"num_bits": "e4m3", "axis": None}
    default = {"default": {"enable": False}}
    rules = {
        "*weight_quantizer": named,
        "*input_quantizer": named,
        "*lm_head*": {"enable": False},
        "nn.BatchNorm1d": {"*": {"enable": False}},
    }
    config = {"quant_cfg": {**default, **rules}, "algorithm": "max"}
    assert chosen(config, ATTENTION) == "FP8"
    assert chosen(config, "lm_head") is None
    # A later rule counts more, as in ModelOpt 0.47, to which "default" is one like the others.
    assert chosen({**config, "quant_cfg": {**rules, **default}}, ATTENTION) is None


@pytest.mark.parametrize(("cache", "name"), [(FP8, "FP8"), (NVFP4, "NVFP4")], ids=["FP8", "NVFP4"])
def test_modelopts_kv_cache(cache, name):
    config = rules(
        rule("*weight_quantizer", FP8),
        rule("*input_quantizer", FP8),
        rule("*[kv]_bmm_quantizer", cache, enable=True),
    )
    assert parse_config(config).kv_cache == name
    assert chosen(config, MLP) == "FP8"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("FP5", r"the format 'FP5', wanted one of FP8, FP8_PER"),
        (8, r"of type int, wanted the name of a format"),
        ({}, r"an empty mapping: nothing would be quantized"),
        ({"*": 4}, r"the entry '\*': 4, wanted a pattern"),
        ({"*": "INT4"}, r"the format 'INT4', wanted one of"),
        (rules(algorithm="awq_lite"), r"the algorithm 'awq_lite', wanted 'max' or None"),
        (rules(algorithm={"method": "mse"}), r"the algorithm 'mse', wanted"),
        (rules(rule(3)), r"quant_cfg holds \{'quantizer_name': 3"),
        (rules("*"), r"quant_cfg holds '\*', wanted rules such as"),
        (rules(rule("*", [FP8, FP8])), r"quantizes a tensor twice in a row \(as W4A8 does\)"),
        (rules(rule("*weight_quantizer", {**FP8, "rotate": True})), r"sets rotate of a quantizer"),
        (rules(rule("*[kv]_bmm_quantizer", {"num_bits": 8})), r"quantizes the KV cache with of 8"),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(ArgumentError, match=message):
        parse_config(config)


def test_a_preset_that_is_not_run_is_refused_with_the_layer():
    config = rules(rule("*weight_quantizer", {"num_bits": 8, "axis": 0}))
    with pytest.raises(
        ArgumentError, match=r"q_proj' with weights of 8 bits axis 0 and activation"
    ):
        parse_config(config).choose(ATTENTION)


def test_unknown_caches_and_exclusions():
    with pytest.raises(ArgumentError, match=r"kv_cache='INT8' is not known, wanted 'FP8' or"):
        parse_config("FP8", kv_cache="INT8")
    with pytest.raises(ArgumentError, match=r"exclude holds 3, wanted patterns of module names"):
        parse_config("FP8", exclude=[3])
