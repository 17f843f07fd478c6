"""Decoder layers and whole models in the shape of Llama, with random weights.

Competitors get the same transformers code and differ in their linear layers alone: bf16, ours of a
format, or plain-torch quantization with ``torch._scaled_mm``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.support import peers
from mokernels.checkpoint import quantize_weight
from mokernels.formats import FORMATS
from mokernels.layers import QuantizedLinear, finish_loading, make_layer

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int

    def config(self) -> Any:
        """transformers' configuration; attention is PyTorch's for everybody."""
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )
        config._attn_implementation = "sdpa"
        return config

    @property
    def linear_weights(self) -> int:
        """Weights of a layer that are quantized."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


LLAMA_8B = Sizes(4096, 14336, 32, 32, 8, 128256, 128)
SMOLLM2_135M = Sizes(576, 1536, 30, 9, 3, 49152, 64)
SMALL = Sizes(256, 768, 4, 4, 2, 1024, 64)
TINY = Sizes(128, 256, 2, 2, 1, 128, 64)

Convert = Callable[[nn.Linear], nn.Module]
# What calibration would have stored for activations of up to 16, which random models stay below.
AMAX = 16.0
INPUT_SCALE = {"FP8": AMAX / 448, "NVFP4": AMAX / (6 * 448)}


class ScaledMMLinear(nn.Module):
    """What one writes without mokernels: per-token quantization in torch, then ``_scaled_mm``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = peers.row_weight(linear.weight.detach())
        self.weight = nn.Buffer(codes)
        self.scale = nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = peers.quantize_rows(x.flatten(0, -2))
        y = peers.multiply(codes, self.weight, scale, self.scale, True)
        return y.unflatten(0, x.shape[:-1])


def keep(linear: nn.Linear) -> nn.Module:
    """bf16, as it is."""
    return linear


def quantized(format: str) -> Convert:
    """Ours: the layer that a checkpoint of this format gets."""
    row = FORMATS[format]

    def convert(linear: nn.Linear) -> QuantizedLinear:
        layer = make_layer(linear, row)
        scale = INPUT_SCALE.get(format)
        for leaf, tensor in quantize_weight(row, linear.weight, input_scale=scale).items():
            getattr(layer, leaf).data.copy_(tensor.reshape(getattr(layer, leaf).shape))
        return layer

    return convert


def build_layer(config: Any, convert: Convert, device: torch.device, seed: int) -> nn.Module:
    """One decoder layer; the same seed gives every competitor the same weights."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    # All layers have index 0: a cache of ours belongs to one layer, and one graph serves them all.
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    layer = layer.to(BF16).to_empty(device=device).eval().requires_grad_(False)
    fill(layer, seed)
    calm(layer, config.num_hidden_layers)
    replace_linears(layer, convert)
    return layer


def fill(module: nn.Module, seed: int) -> None:
    """Random weights that keep the size of what they multiply, whatever the width; norms near 1.

    At 4096 that is the 0.02 of trained models. A fixed 0.02 would leave narrow models with layers
    that add next to nothing, and tests of them with nothing to see.
    """
    for number, parameter in enumerate(module.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(1000 * seed + number)
        deviation = 1.28 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(0, deviation, generator=generator)
        if parameter.dim() == 1:
            parameter.data.add_(1)


def fill_ends(embedding: nn.Module, head: nn.Module, norm: nn.Module) -> None:
    """What comes before and after the layers. Embeddings have the size of what passes layers: 1."""
    for seed, part in enumerate((embedding, head, norm)):
        fill(part, 500 + seed)
    embedding.weight.data.mul_(embedding.weight.shape[1] ** 0.5 / 1.28)


def calm(layer: nn.Module, layers: int) -> None:
    """Let every layer add little to what passes it, as in trained models.

    Otherwise a random model amplifies a single rounding until no two computations of it agree, and
    nothing can be checked.
    """
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.data.mul_((2 * layers) ** -0.5)


def replace_linears(module: nn.Module, convert: Convert) -> None:
    """Convert every linear layer inside, and finish what loading a checkpoint would finish."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, convert(child))
    if any(isinstance(m, QuantizedLinear) for m in module.modules()):
        finish_loading(module)


def rotary(config: Any, device: torch.device) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).to(device)


class FixedCache:
    """Keys and values of one layer, [batch, heads, length, head_dim], at fixed addresses.

    transformers' own caches differ between the versions that are supported; attention only calls
    ``update``.
    """

    def __init__(self, config: Any, batch: int, length: int, position: Tensor) -> None:
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=BF16, device=position.device)
        self.values = torch.zeros(shape, dtype=BF16, device=position.device)
        self.position = position

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write at ``position``; returns everything, the mask hides what is not written yet."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


def _as_it_is(values: Tensor) -> Tensor:
    return values


class Decoder(nn.Module):
    """A model that decodes one token for each of a batch, with everything at fixed addresses.

    A step takes the token that the step before chose, and moves the position on, so that a captured
    step can be replayed. After the last position it begins anew.

    Args:
        sizes: of the model.
        convert: makes the linear layers; embedding and head stay bf16.
        device: where it is built.
        batch: sequences.
        length: of the cache.
    """

    def __init__(
        self, sizes: Sizes, convert: Convert, device: torch.device, batch: int, length: int
    ) -> None:
        super().__init__()
        config = self.config = sizes.config()
        self.layers = nn.ModuleList(
            [build_layer(config, convert, device, seed) for seed in range(sizes.layers)]
        )
        self.embedding = nn.Embedding(sizes.vocab, sizes.hidden, dtype=BF16, device=device)
        self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False, dtype=BF16, device=device)
        self.norm = type(self.layers[0].input_layernorm)(sizes.hidden).to(device, BF16)
        fill_ends(self.embedding, self.head, self.norm)
        self.rotary = rotary(config, device)
        self.start(batch, length)
        self.requires_grad_(False)

    def begin(self) -> None:
        """The same sequences from their beginning, with an empty cache."""
        self.start(self.token.shape[0], self.places.shape[0])

    def start(self, batch: int, length: int) -> None:
        """Forget everything; a cache of this size from now on."""
        device = self.head.weight.device
        self.token = torch.ones(batch, 1, dtype=torch.long, device=device)
        self.position = torch.full((1,), length // 2, device=device)
        self.places = torch.arange(length, device=device)
        self.caches = [FixedCache(self.config, batch, length, self.position) for _ in self.layers]

    def compile_layers(self, backend: str | Callable[..., Any]) -> None:
        """Regional compilation: one graph for all layers."""
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=backend)

    def forward(self, moved: Callable[[Tensor], Tensor] = _as_it_is) -> Tensor:
        """One step; returns the logits [batch, vocab].

        Args:
            moved: changes the embeddings, to see what becomes of that.
        """
        hidden = self._through(moved(self.embedding(self.token)))[-1]
        logits = self.head(self.norm(hidden))[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.copy_((self.position + 1) % self.places.shape[0])
        return logits

    def states(self) -> list[Tensor]:
        """What enters each layer at this position; the position stays."""
        return self._through(self.embedding(self.token))[:-1]

    def updates(self, states: list[Tensor]) -> list[Tensor]:
        """What each layer adds to its own state, fp32: a layer alone, not behind the others."""
        rotations, mask = self._place(states[0])
        triples = zip(self.layers, states, self.caches, strict=True)
        return [
            run_layer(layer, state, rotations, mask, cache).float() - state.float()
            for layer, state, cache in triples
        ]

    def _through(self, hidden: Tensor) -> list[Tensor]:
        """What enters each layer, and what leaves the last."""
        rotations, mask = self._place(hidden)
        passed = [hidden]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            passed.append(run_layer(layer, passed[-1], rotations, mask, cache))
        return passed

    def _place(self, hidden: Tensor) -> tuple[Any, Tensor]:
        """Rotations of this position, and the mask of what lies before it."""
        mask = (self.places <= self.position)[None, None, None, :]
        return self.rotary(hidden, self.position[None]), mask


class Prefill(nn.Module):
    """transformers' own model over a prompt; returns the logits."""

    def __init__(self, sizes: Sizes, convert: Convert, device: torch.device, tokens: int) -> None:
        super().__init__()
        import transformers

        model = transformers.LlamaForCausalLM(sizes.config()).to(device, BF16).eval()
        for seed, layer in enumerate(model.model.layers):
            fill(layer, seed)
            calm(layer, sizes.layers)
        fill_ends(model.model.embed_tokens, model.lm_head, model.model.norm)
        replace_linears(model.model, convert)  # the head stays bf16
        self.model = model.requires_grad_(False)
        self.ids = torch.arange(tokens, device=device)[None] % sizes.vocab

    def begin(self) -> None:
        """A prompt has no state."""

    def forward(self, moved: Callable[[Tensor], Tensor] = _as_it_is) -> Tensor:
        """The logits [1, tokens, vocab]; ``moved`` changes the embeddings."""
        embeddings = moved(self.model.get_input_embeddings()(self.ids))
        return self.model(inputs_embeds=embeddings, use_cache=False).logits

    def states(self) -> list[Tensor]:
        """None: its layers are not run by themselves."""
        return []

    def updates(self, states: list[Tensor]) -> list[Tensor]:
        """None, as there are no states."""
        return []


def run_layer(
    layer: nn.Module, hidden: Tensor, rotations: Any, mask: Tensor | None, cache: Any = None
) -> Tensor:
    """Call a decoder layer of whichever transformers is installed."""
    given = {} if cache is None else {cache_argument(type(layer)): cache}
    result = layer(hidden, attention_mask=mask, position_embeddings=rotations, **given)
    return result[0] if isinstance(result, tuple) else result


def cache_argument(layer_class: type[nn.Module]) -> str:
    """transformers calls it ``past_key_values`` up to some version, ``cache`` later."""
    names = inspect.signature(layer_class.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    raise TypeError(
        f"{layer_class.__name__}.forward takes {', '.join(names)}: wanted a cache among them, "
        "called 'cache' or 'past_key_values'. Teach bench/support/llama.py its new name."
    )
