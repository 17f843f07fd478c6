"""Checkpoint names and module names of a transformers model.

Both are the same for most models. Where they differ (a checkpoint of a full model loaded into its
base class, vision-language models, renamed architectures), transformers renames keys as it loads;
we ask the same functions, so that what is planned is what will be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from mokernels.hf.experts import has_experts, without_merging


class Namer:
    """From a checkpoint's tensor names to a model's parameter names.

    Args:
        model: a transformers model, its layers not replaced yet.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        if has_experts(model):
            mapping = without_merging(mapping)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._model = model
        self.parameters = dict(model.state_dict())
        self.modules = dict(model.named_modules())

    def parameter(self, key: str) -> str:
        """Name in the model of the tensor ``key`` (the first, where one becomes several)."""
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self.parameters
        )[0]
        return key if renamed not in self.parameters and key in self.parameters else renamed

    def module(self, layer: str) -> str:
        """Name in the model of the layer ``layer``, by the name that its weight gets."""
        return self.parameter(f"{layer}.weight").removesuffix(".weight")

    def linear_layers(self, keys: Iterable[str]) -> list[str]:
        """Names in the checkpoint, whose tensors are ``keys``, of the model's ``nn.Linear``s."""
        layers = [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]
        return [
            layer for layer in layers if isinstance(self.modules.get(self.module(layer)), nn.Linear)
        ]

    def ignores(self, layer: str) -> bool:
        """Whether the model does not read a layer that checkpoints have.

        DeepSeek's, which predict a second token, are an example.
        """
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        key = f"{layer}.weight"
        return self.parameter(key) not in self.parameters and any(
            re.search(pattern, key) for pattern in patterns
        )

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Parameters of the base model that no tensor of the checkpoint fills.

        transformers initialises them at random with a warning. New heads on top of the base model
        are left to it: they are what fine-tuning starts from. So are models whose tensors it
        merges or splits while loading.
        """
        if self._converters:
            return []
        filled = {self.parameter(key) for key in keys}
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        for target, source in tied.items():
            if {target, source} & filled:
                filled |= {target, source}
        ignored = getattr(self._model, "_keys_to_ignore_on_load_missing", None) or ()
        prefix = f"{self._prefix}." if self._prefix in self.modules else ""
        return [
            name
            for name in self.parameters
            if name.startswith(prefix)
            and name not in filled
            and not any(re.search(pattern, name) for pattern in ignored)
        ]


def stored_names(model: nn.Module) -> Callable[[str], str]:
    """From names of a model's modules, or patterns of them, to those that are saved.

    transformers renames tensors as it saves; what the JSON files say of modules has to follow.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    entries = getattr(model, "_weight_conversions", None)
    if entries is None:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        entries = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    reverse = [entry.reverse_transform() for entry in reversed(entries)]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]

    def stored(name: str) -> str:
        module = name.removesuffix("*").removesuffix(".")
        key = f"{module}.weight"
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        return key.removesuffix(".weight") + name[len(module) :]

    return stored
