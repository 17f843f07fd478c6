"""The check of a compiled model's step: what it lets pass, and what not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.support import llama
from bench.support.steps import EagerStep, nudged

CPU = torch.device("cpu")
DEEP = replace(llama.TINY, layers=6)


@pytest.fixture(params=["FP8", "NVFP4"])
def model(request: pytest.FixtureRequest) -> llama.Decoder:
    return llama.Decoder(DEEP, llama.quantized(request.param), CPU, batch=2, length=8)


@torch.no_grad()
def test_a_compiled_model_passes(model: llama.Decoder) -> None:
    torch._dynamo.reset()
    check = EagerStep.of(model).check(model)
    model.compile_layers("inductor")
    assert check(model()) <= 1


@torch.no_grad()
def test_the_eager_step_is_its_own_measure(model: llama.Decoder) -> None:
    eager = EagerStep.of(model)
    assert len(eager.states) == len(eager.updates) == len(eager.updates_moved) == 6
    assert all(0 < moved < 0.25 for moved in (eager.logits_moved, *eager.updates_moved))
    assert eager.check(model)(model()) == 0


@torch.no_grad()
def test_one_wrong_layer_does_not_pass_behind_a_bound_of_logits(model: llama.Decoder) -> None:
    eager = EagerStep.of(model)
    # As where fused projections get one of two scales; what FP8 lets pass is less.
    layer = model.layers[4].mlp.down_proj
    wrong = layer.weight_scale.float() * {"FP8": 1.5, "NVFP4": 2.0}[layer.format.name]
    layer.weight_scale.copy_(wrong.to(layer.weight_scale.dtype))
    logits = model()
    error = float((logits - eager.logits).norm() / eager.logits.norm())
    assert error < eager.logits_bound, "the logits alone would show it"
    assert eager.check(model)(logits) > 1


@torch.no_grad()
def test_not_a_number_does_not_pass(model: llama.Decoder) -> None:
    check = EagerStep.of(model).check(model)
    assert check(torch.full_like(model(), torch.nan)) == float("inf")


@torch.no_grad()
def test_a_prompt_has_no_layers_to_look_at() -> None:
    model = llama.Prefill(DEEP, llama.quantized("FP8"), CPU, tokens=8)
    eager = EagerStep.of(model)
    assert eager.states == []
    assert 0 < eager.logits_moved < 0.25
    assert eager.check(model)(model()) == 0
    assert eager.check(model)(-model()) > 1


@torch.no_grad()
def test_a_step_leaves_the_model_at_the_beginning(model: llama.Decoder) -> None:
    position, token = model.position.clone(), model.token.clone()
    EagerStep.of(model)
    assert torch.equal(model.position, position)
    assert torch.equal(model.token, token)
    assert not model.caches[0].keys.any()


def test_every_value_is_moved_by_one_rounding() -> None:
    values = torch.randn(64, 64).to(torch.bfloat16)
    steps = nudged(values).view(torch.int16).int() - values.view(torch.int16).int()
    assert set(steps.unique().tolist()) <= {-1, 1, 0, 2, -2}
    assert (steps.abs() == 1).float().mean() > 0.9
    assert torch.equal(nudged(values), nudged(values))
