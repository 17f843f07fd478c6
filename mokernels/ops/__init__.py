"""``torch.ops.mokernels.*``: importing this package registers every operator.

Each operator has a schema, a fake implementation (so that torch.compile and torch.export see its
shapes), a CPU implementation, which is the definition in :mod:`mokernels.numerics`, and a Triton
implementation for CUDA, HIP and XPU that is imported when it first runs. The ``*_linear`` and
``*_weight_only_gemm`` operators and the ``fake_quantize_*`` also have a gradient.
"""

# Each registers its operators.
from mokernels.ops import fake_quantize, fused, gemm, linear, quantize  # noqa: F401
