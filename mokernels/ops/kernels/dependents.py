"""How a kernel begins before the one before it has ended, on GPUs that can (Hopper and later).

A launch that is a programmatic dependent one (:meth:`mokernels.ops.launch.plan.Launch.run`) takes
the processors that the kernel before it leaves free, and gets ready while that kernel ends, instead
of after it: a microsecond or two, of ten. In exchange it has to wait itself for what it reads.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def wait_for_inputs():
    """Let the next kernel get ready, and wait until all before this one have ended.

    Comes before the first access of memory in every kernel. The next kernel begins once all
    programs of this one have been here, and waits here for this one's end: so none overtakes, and
    what a kernel reads was written before. Where launches are not dependent it costs nothing.
    """
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
