"""The quantizer that transformers calls for checkpoints with ``quant_method: modelopt``."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mokernels.checkpoint import CheckpointPlan, LayerPlan, audit, open_checkpoint
from mokernels.errors import CheckpointError, Finding
from mokernels.formats import Format
from mokernels.hf.experts import expand_for, without_merging
from mokernels.hf.names import Namer
from mokernels.hf.parallel import check_shards, register_replicate, scale_styles
from mokernels.layers import (
    StoredSpec,
    attach_kv_scales,
    check_activation_choice,
    choose_activation,
    finish_loading,
    make_layer,
)

logger = logging.getLogger("mokernels")

METHODS = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
"""Values of ``quant_method`` that mark a ModelOpt checkpoint; exports write the first."""


def register() -> None:
    """Tell transformers which classes handle ModelOpt checkpoints; safe to call twice."""
    for method in METHODS:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = ModelOptConfig
        auto.AUTO_QUANTIZER_MAPPING[method] = ModelOptQuantizer
    types = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if ModelOptConfig not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, ModelOptConfig)


class ModelOptConfig(QuantizationConfigMixin):
    """``quantization_config`` of a ModelOpt checkpoint, kept as it was written.

    Args:
        activations: how to run it: ``"checkpoint"``, ``"16bit"`` or ``"fp8_block"``; see
            :func:`mokernels.from_pretrained`. It is not saved.
        written: the fields of config.json.
    """

    def __init__(self, activations: str = "checkpoint", **written: Any) -> None:
        self.quant_method = written.setdefault("quant_method", METHODS[0])
        self.activations = activations
        self.written = written

    def get_loading_attributes(self) -> dict[str, str]:
        """What a user may choose anew for a checkpoint that is already quantized."""
        return {"activations": self.activations}

    def to_dict(self) -> dict[str, Any]:
        """The fields as the checkpoint has them, for saving."""
        return copy.deepcopy(self.written)


class ModelOptQuantizer(HfQuantizer):
    """Audits the checkpoint, replaces linear layers, and leaves the loading to transformers.

    The layers' tensors have the checkpoint's own names and dtypes, so no weight conversion is
    needed, and what is saved later is what was loaded.
    """

    requires_calibration = True  # quantizing while loading is not offered

    quantization_config: ModelOptConfig
    _took_experts_apart = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse an unknown choice of activations before anything is read."""
        check_activation_choice(self.quantization_config.activations)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """None that merge experts we took apart; the signature covers older transformers too."""
        return (
            without_merging(weight_conversions) if self._took_experts_apart else weight_conversions
        )

    def preprocess_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Replace the layers; before transformers 5.21, also extend the parallelism plan here."""
        super().preprocess_model(model, *args, **kwargs)
        if not hasattr(HfQuantizer, "update_parallel_plan") and getattr(model, "_tp_plan", None):
            register_replicate()
            self.update_parallel_plan(model, model._tp_plan)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Say how scales follow their weight under tensor parallelism."""
        if plan:
            plan.update(scale_styles(model, plan))

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        namer, plan = self._audited_plan(model, checkpoint_files)
        modules = {layer.name: namer.module(layer.name) for layer in plan.layers}
        projections = {name: namer.module(name) for name in plan.kv_scales}
        for layer in plan.layers:
            self._replace(model, layer, modules[layer.name], plan.config.formats)
        for projection, tensors in plan.kv_scales.items():
            attach_kv_scales(model.get_submodule(projections[projection]), stored_specs(tensors))
        untie(model, set(modules.values()))

    def _audited_plan(
        self, model: nn.Module, files: list[str] | None
    ) -> tuple[Namer, CheckpointPlan]:
        source = getattr(model.config, "name_or_path", "?")
        with open_checkpoint(_folder(files or [], source)) as checkpoint:
            if set(checkpoint.files) != {Path(file).name for file in files or []}:
                raise CheckpointError(source, [_other_files(files or [], checkpoint.files)])
            self._took_experts_apart = bool(expand_for(model, checkpoint.tensors))
            namer = Namer(model)
            names = namer.linear_layers(checkpoint.tensors)
            report = audit(checkpoint, values="scales", linear_names=names)
        plan = _without_ignored(namer, report.plan)
        findings = [
            *report.errors,
            *_misfits(namer, plan, type(model).__name__),
            *_missing(namer, checkpoint.tensors),
        ]
        if findings:
            raise CheckpointError(source, findings)
        for warning in report.warnings:
            logger.warning("%s", warning)
        return namer, plan

    def _replace(
        self, model: nn.Module, layer: LayerPlan, module: str, beside: tuple[Format, ...]
    ) -> None:
        linear = model.get_submodule(module)
        activation = choose_activation(
            layer.format,
            self.quantization_config.activations,
            has_input_scale="input_scale" in layer.tensors,
            beside=beside,
        )
        tensors = {
            leaf: spec for leaf, spec in stored_specs(layer.tensors).items() if leaf != "bias"
        }
        new = make_layer(
            linear, layer.format, tensors=tensors, activation=activation, name=layer.name
        )
        # Codes left on the meta device (disk offload) are not to be initialised at random.
        new._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(module, new)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        finish_loading(model)
        check_shards(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes the checkpoint's tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the frozen quantized layers can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the model."""
        return True


def _folder(files: list[str], source: str) -> Path:
    """The one folder that holds all the files that transformers is going to read."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise CheckpointError(source, [_not_safetensors(files)])
    folders = {Path(file).parent for file in files}
    inside = not os.path.isdir(source) or all(
        Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source))
        for folder in folders
    )
    if len(folders) != 1 or not inside:
        raise CheckpointError(
            source,
            [
                Finding(
                    "file-name",
                    "the index names files outside of the folder",
                    found=", ".join(sorted(map(str, folders))),
                    wanted="files in the folder of the index",
                    remedy="Do not load this checkpoint unless you trust who made it.",
                    file="model.safetensors.index.json",
                )
            ],
        )
    return folders.pop()


def _other_files(files: list[str], audited: Iterable[str]) -> Finding:
    return Finding(
        "files-not-audited",
        "transformers would read other files than those of the checkpoint",
        found=", ".join(sorted(Path(file).name for file in files)),
        wanted=", ".join(audited),
        remedy="Load the checkpoint without variant=, and without other weights in its folder.",
    )


def _not_safetensors(files: list[str]) -> Finding:
    return Finding(
        "not-safetensors",
        "a ModelOpt checkpoint is loaded from safetensors files alone",
        found=", ".join(Path(file).name for file in files) or "no file",
        wanted="model.safetensors or its shards",
        remedy="Load the folder by its path, without state_dict=.",
    )


def _without_ignored(namer: Namer, plan: CheckpointPlan) -> CheckpointPlan:
    """The plan without what the model's class leaves in the files: layers for other programs."""
    layers = tuple(layer for layer in plan.layers if not namer.ignores(layer.name))
    scales = {name: group for name, group in plan.kv_scales.items() if not namer.ignores(name)}
    return dataclasses.replace(plan, layers=layers, kv_scales=scales)


def _misfits(namer: Namer, plan: CheckpointPlan, architecture: str) -> Iterator[Finding]:
    """Quantized layers of the checkpoint that are no linear layer of that size in the model."""
    for layer in plan.layers:
        module = namer.modules.get(namer.module(layer.name))
        if isinstance(module, nn.Linear):
            found = f"Linear({module.in_features}, {module.out_features})"
        else:
            found = "no such module" if module is None else type(module).__name__
        wanted = f"Linear({layer.k}, {layer.n})"
        if found != wanted:
            yield Finding(
                "layer-not-in-model",
                f"a quantized layer does not fit {architecture}",
                found=found,
                wanted=wanted,
                remedy="Check that config.json is this checkpoint's. Experts that a model keeps "
                "transposed or interleaved (gpt-oss, Llama 4) are not supported by this version.",
                layer=layer.name,
            )


def _missing(namer: Namer, keys: Iterable[str]) -> Iterator[Finding]:
    for name in namer.missing(keys):
        yield Finding(
            "tensor-missing",
            "the model has a parameter that the checkpoint lacks",
            remedy="Check that the checkpoint is complete, and that config.json is its own.",
            tensor=name,
        )


def untie(model: nn.Module, quantized: set[str]) -> None:
    """Keep transformers from tying a quantized layer's codes to the input embedding.

    ModelOpt stores a quantized ``lm_head`` beside the embedding and leaves
    ``tie_word_embeddings: true`` in config.json.
    """
    owned = {f"{module}.weight" for module in quantized}
    # The first is what transformers re-reads when tie_weights() is called later (PEFT, users),
    # the second what it ties while loading.
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict):
            setattr(model, attribute, {k: v for k, v in tied.items() if k not in owned})


def stored_specs(tensors: Mapping[str, Any]) -> dict[str, StoredSpec]:
    """The dtype and shape of stored tensors, by leaf name."""
    return {leaf: StoredSpec(info.dtype, tuple(info.shape)) for leaf, info in tensors.items()}
