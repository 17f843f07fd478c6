"""How a kernel begins before the one before it has ended, on GPUs that can (Hopper and later).

A launch that is a programmatic dependent one (:meth:`mokernels.ops.launch.plan.Launch.run`) gets
ready while the kernel before it ends, instead of after it: a microsecond or two, of ten. In
exchange it has to wait itself for what it reads.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def wait_for_inputs():
    """Wait until all kernels before this one have ended.

    Comes before the first access of memory in every kernel, so that none overtakes another. Where
    launches are not dependent it costs nothing.
    """
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_the_next_begin():
    """Let programs of the next kernel take this one's place once all programs have been here.

    They wait for this kernel's end. It comes after the main loop: earlier ones would hold registers
    and shared memory that programs of this kernel wait for, which cost up to 20 % on an H200.
    """
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()
