"""The facts about every checkpoint format, one row each; nothing else re-derives them.

A format says how a linear layer's weight ``W [N, K]`` (``N`` output features, ``K`` input features)
is stored and how the activations that meet it are quantized. Sources: the exports of
nvidia-modelopt 0.47 and its ``export/quant_utils.py``; the element types are those of the OCP
Microscaling Formats (MX) specification 1.0 and of NVIDIA's NVFP4.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

E4M3_MAX = 448.0
"""Largest finite magnitude of float8_e4m3fn."""
E2M1_MAX = 6.0
"""Largest magnitude of FP4 E2M1."""
E8M0_BIAS = 127
"""A shared exponent byte u stands for 2 ** (u - 127)."""
E8M0_NAN = 255
"""The byte that the MX specification gives to NaN; no quantizer writes it."""
MXFP8_MAX_EXPONENT = 246
"""Largest exponent byte u of which every product stays finite in bf16: 448 * 2 ** (u - 127) has to
stay below 2 ** 128, and 448 = 1.75 * 2 ** 8."""
FP8_BLOCK = 128
"""Side of FP8_PB_WO's square weight blocks, and length of 1x128 activation blocks."""
NVFP4_BLOCK = 16
"""Elements of K that share one NVFP4 block scale."""
MXFP8_BLOCK = 32
"""Elements of K that share one MXFP8 exponent."""
NVFP4_TINY_SCALE = 1e-5
"""ModelOpt replaces an activation block's scale below this by 1, which makes its codes zero."""
FP8_TINY_AMAX = 2.0**-24
"""ModelOpt replaces an amax at or below this by 1, which makes the codes zero."""
NVFP4_MAX_INPUT_SCALE = 42.0
"""Above about this global scale, a block whose scale flushes to zero would keep non-zero codes
(6 g 2**-10 > 1/4): such a checkpoint means something else than ModelOpt's kernels compute."""


@dataclass(frozen=True)
class Element:
    """The type of one weight element.

    Attributes:
        name: its name in the literature.
        storage: dtype of the stored tensor.
        per_item: elements in one stored item; 2 means two nibbles in a byte, even K index low.
        max: largest finite magnitude.
    """

    name: str
    storage: torch.dtype
    per_item: int
    max: float


E4M3 = Element("E4M3", torch.float8_e4m3fn, 1, E4M3_MAX)
E2M1 = Element("E2M1", torch.uint8, 2, E2M1_MAX)


class Granularity(enum.Enum):
    """How many elements share a scale, as (weight shape -> scale shape)."""

    TENSOR = "tensor"
    """``[N, K] -> []``"""
    CHANNEL = "channel"
    """``[N, K] -> [N]``"""
    BLOCK = "block"
    """``[N, K] -> [ceil(N / 128), ceil(K / 128)]``"""
    GROUP = "group"
    """``[N, K] -> [N, K / group_size]``"""


class Activation(enum.Enum):
    """What happens to a linear layer's input before the product."""

    NONE = "16bit"
    """Nothing: the product takes the activations in their own dtype (weight-only)."""
    FP8_STATIC = "fp8_static"
    """E4M3 with one calibrated scale, the checkpoint's ``input_scale``."""
    FP8_PER_TOKEN = "fp8_per_token"
    """E4M3 with one scale per token, from that token's amax."""
    FP8_BLOCK = "fp8_block"
    """E4M3 with one scale per 128 consecutive elements of K (1x128)."""
    NVFP4 = "nvfp4"
    """E2M1 with one E4M3 scale per 16 elements, times the calibrated ``input_scale``."""
    MXFP8 = "mxfp8"
    """E4M3 with one power of two per 32 elements."""


Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor that a quantized layer stores, named ``<layer>.<leaf>``.

    Attributes:
        leaf: last part of the tensor's name.
        dtype: dtype in the file.
        shapes: every legal shape; the first is the one that ModelOpt 0.47 writes.
        required: whether the layer is broken without it.
    """

    leaf: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    required: bool = True


SCALAR_SHAPES: tuple[Shape, ...] = ((), (1,))


@dataclass(frozen=True)
class Format:
    """One quantization algorithm of ModelOpt.

    Attributes:
        name: ``quant_algo`` in upper case.
        element: type of the weight's elements.
        granularity: of the (first) weight scale.
        scale_dtype: dtype of the (first) weight scale; uint8 is a shared exponent (E8M0).
        activation: what a checkpoint of this format asks for.
        group_size: elements of K to a scale, for ``GROUP``; 0 otherwise.
        second_scale: whether one fp32 ``weight_scale_2`` multiplies every block scale.
        input_scale: whether the layer stores a calibrated activation scale.
        aliases: other spellings of the name that checkpoints use.
    """

    name: str
    element: Element
    granularity: Granularity
    scale_dtype: torch.dtype
    activation: Activation
    group_size: int = 0
    second_scale: bool = False
    input_scale: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing a model to this format has to see data."""
        return self.input_scale

    @property
    def k_multiple(self) -> int:
        """K has to be a multiple of this."""
        return self.group_size or 1

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activation treatments that a layer of this format can run with, its own first."""
        return (self.activation, *ALTERNATIVE_ACTIVATIONS.get(self.name, ()))

    def scale_shapes(self, n: int, k: int) -> tuple[Shape, ...]:
        """Legal shapes of ``weight_scale`` for a weight [n, k]."""
        if self.granularity is Granularity.TENSOR:
            return SCALAR_SHAPES
        if self.granularity is Granularity.CHANNEL:
            return ((n,),)
        if self.granularity is Granularity.GROUP:
            return ((n, k // self.group_size),)
        rows, columns = -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)
        shapes: tuple[Shape, ...] = ((rows, 1, columns, 1), (rows, columns))
        # ModelOpt squeezes the scale of a weight that fits one block down to no dimension.
        return ((), *shapes, (1,)) if rows == columns == 1 else shapes

    def tensors(self, n: int, k: int) -> tuple[StoredTensor, ...]:
        """What a layer with ``n`` outputs and ``k`` inputs stores, the bias aside."""
        weight_shape = (n, k // self.element.per_item)
        stored = [
            StoredTensor("weight", self.element.storage, (weight_shape,)),
            StoredTensor("weight_scale", self.scale_dtype, self.scale_shapes(n, k)),
        ]
        if self.second_scale:
            stored.append(StoredTensor("weight_scale_2", torch.float32, SCALAR_SHAPES))
        if self.input_scale:
            # FP8 without any input_scale is legal (quantized per token); the audit decides that
            # for the checkpoint as a whole, since one layer alone cannot.
            required = self.activation is not Activation.FP8_STATIC
            stored.append(StoredTensor("input_scale", torch.float32, SCALAR_SHAPES, required))
        return tuple(stored)


_ROWS = (
    Format(
        name="FP8",
        element=E4M3,
        granularity=Granularity.TENSOR,
        scale_dtype=torch.float32,
        activation=Activation.FP8_STATIC,
        input_scale=True,
    ),
    Format(
        name="FP8_PER_CHANNEL_PER_TOKEN",
        element=E4M3,
        granularity=Granularity.CHANNEL,
        scale_dtype=torch.float32,
        activation=Activation.FP8_PER_TOKEN,
    ),
    Format(
        name="FP8_PB_WO",
        element=E4M3,
        granularity=Granularity.BLOCK,
        scale_dtype=torch.float32,
        activation=Activation.NONE,
        aliases=("FP8_BLOCK_SCALES",),
    ),
    Format(
        name="NVFP4",
        element=E2M1,
        granularity=Granularity.GROUP,
        scale_dtype=torch.float8_e4m3fn,
        activation=Activation.NVFP4,
        group_size=NVFP4_BLOCK,
        second_scale=True,
        input_scale=True,
    ),
    Format(
        name="MXFP8",
        element=E4M3,
        granularity=Granularity.GROUP,
        scale_dtype=torch.uint8,
        activation=Activation.MXFP8,
        group_size=MXFP8_BLOCK,
    ),
)

FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
"""The formats that this version runs, by upper-case name."""

ALTERNATIVE_ACTIVATIONS: Mapping[str, tuple[Activation, ...]] = MappingProxyType(
    {
        "FP8": (Activation.NONE, Activation.FP8_PER_TOKEN),
        "FP8_PER_CHANNEL_PER_TOKEN": (Activation.NONE,),
        "FP8_PB_WO": (Activation.FP8_BLOCK,),
        "NVFP4": (Activation.NONE,),
        "MXFP8": (Activation.NONE,),
    }
)
"""Other treatments of the activations that a layer can run with, when the user asks for one (or,
for FP8, when the whole checkpoint was exported without calibrated input scales)."""

LATER_FORMATS: tuple[str, ...] = (
    "W4A16_NVFP4",
    "NVFP4_AWQ",
    "NVFP4_SVD",
    "W4A8_NVFP4_FP8",
    "MXFP4",
    "W4A8_MXFP4_FP8",
    "W4A16_AWQ",
    "W4A8_AWQ",
    "W8A8_SQ_PER_CHANNEL",
    "W8A16",
)
"""Algorithms of ModelOpt 0.47 that this version recognises by name but does not run."""

MIXED_PRECISION = "MIXED_PRECISION"
"""The ``quant_algo`` of a checkpoint that lists an algorithm for every quantized layer."""

KV_CACHE_FORMATS: tuple[str, ...] = ("FP8", "NVFP4", "NVFP4_AFFINE", "INT8")
"""KV-cache algorithms of ModelOpt; the scales are kept, the cache stays in the model's dtype."""

KV_CACHE_LEAVES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"k_proj": ("k_scale", "k_bias"), "v_proj": ("v_scale", "v_bias")}
)
"""Tensors of a quantized KV cache, by the last part of the projection's name that stores them."""

SCALE_LEAVES: tuple[str, ...] = ("weight_scale", "weight_scale_2", "input_scale")
"""Leaves that make a module a quantized one, whatever the configuration says."""

FOREIGN_LEAVES: Mapping[str, str] = MappingProxyType(
    {
        "pre_quant_scale": "the AWQ, SVD and SmoothQuant algorithms of ModelOpt",
        "weight_quantizer._svdquant_lora_a": "ModelOpt's NVFP4_SVD",
        "weight_quantizer._svdquant_lora_b": "ModelOpt's NVFP4_SVD",
        "svdquant_lora_a": "ModelOpt's NVFP4_SVD",
        "svdquant_lora_b": "ModelOpt's NVFP4_SVD",
        "weight_quantizer._scale": "a ModelOpt model that was compressed but not exported",
        "weight_scale_inv": "DeepSeek's FP8 layout",
        "weight_packed": "compressed-tensors",
        "weight_global_scale": "compressed-tensors",
        "input_global_scale": "compressed-tensors",
        "weight_zero_point": "compressed-tensors",
        "qweight": "GPTQ or AutoAWQ",
        "qzeros": "GPTQ or AutoAWQ",
    }
)
"""Leaves of formats that this version does not run, and whose they are; an error on any module."""

FUSED_SUFFIXES: tuple[str, ...] = (
    "_weight_scale",
    "_weight_scale_2",
    "_input_scale",
    "_pre_quant_scale",
)
"""Ends of a leaf's name where the experts of a layer are one 3-D tensor, for example
``experts.gate_up_proj_weight_scale``; such layers are not run yet."""

EMBEDDING_NAMES: frozenset[str] = frozenset(
    {
        "embed_tokens",
        "embeddings",
        "embedding",
        "word_embeddings",
        "tok_embeddings",
        "token_embd",
        "position_embeddings",
        "position_embedding",
        "token_type_embeddings",
        "embed_positions",
        "wte",
        "wpe",
        "embed_in",
        "word_embed",
    }
)
"""Last parts of the names of modules that look a row up; no algorithm here quantizes those."""


def find_format(name: str) -> Format | None:
    """Return the format called ``name`` in any letter case, or None if this version has none."""
    wanted = name.strip().upper()
    for row in _ROWS:
        if wanted == row.name or wanted in row.aliases:
            return row
    return None


def supported_names() -> str:
    """The supported formats as a readable list, for error messages."""
    return ", ".join(FORMATS)
