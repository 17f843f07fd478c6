"""Experts of transformers' mixtures as linear layers, which checkpoints of ModelOpt hold.

transformers keeps the experts of a layer in two 3-D parameters, and merges and splits their tensors
as it loads and saves. A quantized expert has tensors of its own: codes, scales of its blocks and
scalars of its projections. So before layers are quantized or loaded, the parameters are taken apart
into ``nn.Linear`` modules under the names that their tensors have in checkpoints, and everything
else treats these as it does any linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mokernels.errors import ArgumentError
from mokernels.formats import Format
from mokernels.ptq.config import QuantizeConfig

_FUSED, _DOWN = "gate_up_proj", "down_proj"
_MEMBER = re.compile(r"\.experts\.\d+\.([^.]+)\.weight_scale$")


@dataclass(frozen=True)
class ExpertNames:
    """How the projections of an expert are called in a checkpoint."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def __iter__(self) -> Iterator[str]:
        return iter((self.gate, self.up, self.down))


KNOWN_NAMES = (ExpertNames(), ExpertNames("w1", "w3", "w2"))


class Expert(nn.Module):
    """The projections of one expert, as a place for their names."""


class Experts(nn.ModuleList):
    """Experts as modules; called as the module of transformers that they replace.

    Args:
        fused: that module. Its gate is applied, with whatever limits it has.
        names: of the projections.
    """

    def __init__(self, fused: nn.Module, names: ExpertNames) -> None:
        super().__init__(_taken_apart(fused, names))
        self.names = names
        self.num_experts = len(self)
        # Not a submodule: its parameters are the experts' now.
        self.__dict__["fused"] = fused

    # Which experts run is known on the host alone: nothing that a graph could hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' results, each times its weight.

        Args:
            hidden_states: [T, H].
            top_k_index: the experts of each token, [T, top_k].
            top_k_weights: their weights, [T, top_k].

        Returns:
            [T, H], in the dtype of ``hidden_states``.
        """
        result = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number < len(self):
                token, place = torch.where(top_k_index == number)
                made = self._one(self[number], hidden_states[token])
                made = made * top_k_weights[token, place, None]
                result.index_add_(0, token, made.to(result.dtype))
        return result

    def _one(self, expert: nn.Module, x: Tensor) -> Tensor:
        gate, up, down = (getattr(expert, name) for name in self.names)
        both = torch.cat([gate(x), up(x)], dim=-1)
        made: Tensor = down(self.__dict__["fused"]._apply_gate(both))
        return made


def _taken_apart(fused: Any, names: ExpertNames) -> Iterator[Expert]:
    gate_up, down = fused.gate_up_proj, fused.down_proj
    for number in range(gate_up.shape[0]):
        expert = Expert()
        parts = (*gate_up[number].chunk(2, dim=0), down[number])
        for name, part in zip(names, parts, strict=True):
            setattr(expert, name, _linear(part.detach(), gate_up.requires_grad))
        yield expert


def _linear(weight: Tensor, trains: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    return linear


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with experts in two 3-D parameters that :func:`expand` can take apart, by name.

    Interleaved, transposed and biased ones (gpt-oss, Llama 4) are not among them, nor what does not
    follow transformers' interface of experts, by which others may compute what their class does.
    """
    return {name: module for name, module in model.named_modules() if _can_expand(module)}


def _can_expand(module: nn.Module) -> bool:
    gate_up, down = (module._parameters.get(leaf) for leaf in (_FUSED, _DOWN))
    if gate_up is None or down is None or not gate_up.dim() == down.dim() == 3:
        return False
    others = {name for name, _ in module.named_parameters()} - {_FUSED, _DOWN}
    usual = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True,
             "has_post_expert_norm": False}  # fmt: skip
    plain = all(getattr(module, name, value) == value for name, value in usual.items())
    follows = hasattr(module, "_apply_gate")
    return follows and plain and not others and 2 * down.shape[2] == gate_up.shape[1]


def expand(model: nn.Module, names: ExpertNames) -> dict[str, nn.Module]:
    """Take all fused experts apart, in place.

    Returns:
        The modules that were replaced, by name.
    """
    replaced = fused_experts(model)
    for name, module in replaced.items():
        model.set_submodule(name, Experts(module, names))
    if replaced:
        kept = getattr(model, "_weight_conversions", None)
        if kept is not None:
            model._weight_conversions = without_merging(kept)  # type: ignore[assignment]
    return replaced


def expand_for(model: nn.Module, keys: Iterable[str]) -> dict[str, nn.Module]:
    """Take experts apart that a checkpoint, whose tensors are ``keys``, holds quantized.

    Returns:
        The modules that were replaced, by name: none, or all that can be.

    Raises:
        ArgumentError: their projections have names that no known mixture has.
    """
    found = {match[1] for key in keys if (match := _MEMBER.search(key))}
    if not found or not fused_experts(model):
        return {}
    for names in KNOWN_NAMES:
        if found <= set(names):
            return expand(model, names)
    raise ArgumentError(
        f"The checkpoint calls projections of its experts {', '.join(sorted(found))}, wanted "
        f"{' or '.join(', '.join(names) for names in KNOWN_NAMES)}."
    )


@contextmanager
def apart(model: nn.Module, config: QuantizeConfig) -> Iterator[list[list[str]]]:
    """Take experts apart to quantize them, where a configuration chooses any.

    Gives the groups of layers whose activations have one amax, as in ModelOpt's exports: the gates
    and ups of all experts of a layer, and their downs. If what happens inside fails, the model is
    put together again; otherwise its 3-D parameters are let go.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    names = names_of(get_model_conversion_mapping(model))
    chosen = any(
        config.choose(f"{place}.0.{name}") is not None
        for place in fused_experts(model)
        for name in names
    )
    if chosen:
        _check_resident(model)
    conversions = getattr(model, "_weight_conversions", None)
    replaced = expand(model, names) if chosen else {}
    try:
        yield [group for place in replaced for group in _groups(model, place)]
    except BaseException:
        for place, module in replaced.items():
            model.set_submodule(place, module)
        if conversions is not None:
            model._weight_conversions = conversions  # type: ignore[assignment]
        raise
    for module in replaced.values():
        module._parameters.clear()


def _check_resident(model: nn.Module) -> None:
    for place, module in fused_experts(model).items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ArgumentError(
                f"The experts {place!r} are offloaded, and experts that are offloaded cannot be "
                f"taken apart. Leave them plain with exclude=['{place}*'], and so those of the "
                "other layers; or load the model without offloading them."
            )


def _groups(model: nn.Module, place: str) -> Iterator[list[str]]:
    experts: Any = model.get_submodule(place)
    gate, up, down = experts.names
    for leaves in ((gate, up), (down,)):
        yield [f"{place}.{number}.{leaf}" for number in range(len(experts)) for leaf in leaves]


def by_container(model: nn.Module, layers: Mapping[str, Format]) -> dict[str, Format]:
    """Formats by name, those of experts once by the name of all of them, where they are the same.

    So ModelOpt lists them in checkpoints of several formats.
    """
    containers = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    inside = {
        name: container
        for container in containers
        for name in layers
        if name.startswith(f"{container}.")
    }
    formats: dict[str, set[Format]] = {container: set() for container in containers}
    for name, container in inside.items():
        formats[container].add(layers[name])
    return {
        inside[name] if name in inside and len(formats[inside[name]]) == 1 else name: row
        for name, row in layers.items()
    }


def names_of(conversions: Iterable[Any]) -> ExpertNames:
    """How checkpoints of a model call them, from what transformers merges while it loads."""
    gate_up: list[str] = []
    down: list[str] = []
    for entry in conversions:
        targets, sources = map(_patterns, (entry.target_patterns, entry.source_patterns))
        if any(target.endswith(f"experts.{_FUSED}") for target in targets) and len(sources) == 2:
            gate_up = [_projection(source) for source in sources]
        elif any(target.endswith(f"experts.{_DOWN}") for target in targets) and len(sources) == 1:
            down = [_projection(sources[0])]
    return ExpertNames(*gate_up, *down) if gate_up and down else ExpertNames()


def without_merging(conversions: Iterable[Any]) -> list[Any]:
    """Conversions of transformers without those that make 3-D parameters of experts."""
    return [entry for entry in conversions if not _merges_experts(entry)]


def _merges_experts(entry: Any) -> bool:
    ends = (f"experts.{_FUSED}", f"experts.{_DOWN}")
    return any(target.endswith(ends) for target in _patterns(entry.target_patterns))


def _patterns(value: str | list[str]) -> list[str]:
    """Patterns without what transformers adds to some of them at the end."""
    listed = [value] if isinstance(value, str) else list(value)
    return [pattern.removesuffix("$") for pattern in listed]


def _projection(source: str) -> str:
    """``gate_proj`` of ``mlp.experts.*.gate_proj.weight``."""
    return source.removesuffix(".weight").rpartition(".")[2]


def has_experts(model: nn.Module) -> bool:
    """Whether experts of the model are modules of ours."""
    return any(isinstance(module, Experts) for module in model.modules())
