"""Checkpoints of NVIDIA ModelOpt: what the JSON files say, what the tensors are, and an audit."""

from mokernels.checkpoint.audit import audit, check
from mokernels.checkpoint.config import (
    QUANT_CONFIG_FILE,
    parse_quantization,
    read_quantization,
)
from mokernels.checkpoint.header import TensorInfo
from mokernels.checkpoint.layout import parse_quantization_file
from mokernels.checkpoint.plan import CheckpointPlan, LayerPlan
from mokernels.checkpoint.reader import Checkpoint, looks_quantized, open_checkpoint
from mokernels.checkpoint.report import Report
from mokernels.checkpoint.schema import QuantizationConfig, matches
from mokernels.checkpoint.weights import quantize_weight
from mokernels.checkpoint.writer import write_checkpoint

__all__ = [
    "QUANT_CONFIG_FILE",
    "Checkpoint",
    "CheckpointPlan",
    "LayerPlan",
    "QuantizationConfig",
    "Report",
    "TensorInfo",
    "audit",
    "check",
    "looks_quantized",
    "matches",
    "open_checkpoint",
    "parse_quantization",
    "parse_quantization_file",
    "quantize_weight",
    "read_quantization",
    "write_checkpoint",
]
