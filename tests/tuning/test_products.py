"""The products of a checkpoint: distinct, fused groups as one, and the kinds that layers launch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mokernels
from mokernels.cli.tune import products
from mokernels.formats import FORMATS, Activation
from mokernels.layers import linear_class
from mokernels.layers.siblings import link_siblings
from mokernels.ops.launch import decode, gemm, layer, quantizing
from mokernels.ops.layer_kinds import kind_of_layer
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS
from mokernels.tuning import Product
from mokernels.tuning.operands import draw_weight
from tests.support.checkpoints import TINY, Linear, make_checkpoint

CPU = torch.device("cpu")


def sizes(found: tuple[Product, ...]) -> list[tuple[int, int, int]]:
    return [(product.n, product.k, product.layers) for product in found]


def test_projections_of_one_input_are_one_product(tmp_path):
    attention = [
        Linear(f"model.layers.{i}.self_attn.{p}_proj", 64, 64) for i in (0, 1) for p in "qkv"
    ]
    others = [Linear("model.layers.0.self_attn.o_proj", 64, 64), Linear("mlp.gate_proj", 160, 64)]
    folder = make_checkpoint(tmp_path / "c", "FP8_PER_CHANNEL_PER_TOKEN", [*attention, *others])
    found = products(folder, "checkpoint")
    assert sorted(sizes(found)) == [(64, 64, 1), (160, 64, 1), (192, 64, 2)]
    group = next(product for product in found if product.n == 192)
    assert group.example == " + ".join(layer.name for layer in attention[:3])


def test_members_that_differ_are_no_group(tmp_path):
    # q_proj has a bias; k_proj and v_proj have none, and are together as large.
    found = products(make_checkpoint(tmp_path / "c", "MXFP8", TINY), "checkpoint")
    assert sizes(found) == [(64, 160, 1), (160, 64, 1), (64, 64, 2)]


def test_groups_are_those_of_a_loaded_model(tmp_path):
    net = nn.ModuleDict({
        name: nn.Linear(64, 64, bias=False) for name in ("q_proj", "k_proj", "v_proj", "w1", "w3")
    })  # fmt: skip
    layers = [Linear(name, 64, 64) for name in net]
    folder = make_checkpoint(tmp_path / "c", "FP8", layers, plain={}, exclude=())
    mokernels.load_into(net, folder)
    link_siblings(net)
    planned = sorted({linear.plan_n for linear in net.values()})
    assert sorted(product.n for product in products(folder, "checkpoint")) == planned


def test_the_treatment_of_activations_can_be_chosen(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "FP8_PB_WO", TINY)
    assert {p.activation for p in products(folder, "fp8_block")} == {Activation.FP8_BLOCK}
    with pytest.raises(mokernels.ArgumentError, match="activations='8bit' is not known"):
        products(folder, "8bit")


CASES = [
    (target, name, activation)
    for target in (*CUDA_TARGETS, *HIP_TARGETS)
    for name, row in FORMATS.items()
    for activation in row.activations
]


@pytest.mark.parametrize(
    ("target", "name", "activation"), CASES, ids=lambda v: getattr(v, "name", str(v))
)
def test_layers_launch_the_kind_that_is_tuned(target, name, activation, monkeypatch):
    asked = []
    for module in (gemm, decode, quantizing):
        stock = module.choose

        def choose(kind, m, n, k, *rest, _stock=stock):
            asked.append((kind, n, k))
            return _stock(kind, m, n, k, *rest)

        monkeypatch.setattr(module, "choose", choose)
    row = FORMATS[name]
    product = Product(row, activation, 128, 256)
    leaves = {leaf: t.to("meta") for leaf, t in draw_weight(product, CPU, seed=0).items()}
    for rows in (2, 200):
        x = torch.empty(rows, 256, dtype=torch.bfloat16, device="meta")
        layer.plan_layer(row, activation, x, leaves, target=target)
    assert set(asked) == {(kind_of_layer(row, activation, target), 128, 256)}


@pytest.mark.parametrize(("name", "activation"), [
    (name, activation) for name, row in FORMATS.items() for activation in row.activations
], ids=str)  # fmt: skip
def test_random_operands_are_legal_and_finite(name, activation):
    row = FORMATS[name]
    leaves = draw_weight(Product(row, activation, 160, 256), CPU, seed=1)
    linear = linear_class(row)(row, 256, 160, activation=activation)
    for leaf in linear.stored_leaves:
        own = getattr(linear, leaf)
        drawn = leaves[leaf]
        assert drawn.dtype == own.dtype
        assert drawn.numel() == own.numel()
        own.data.copy_(drawn.reshape(own.shape))
    linear.refresh()
    y = linear(torch.randn(3, 256).to(torch.bfloat16))
    assert y.isfinite().all()
    assert 1e-4 < float(y.float().abs().mean()) < 1e4
