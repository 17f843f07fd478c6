"""Host side of the Triton kernels: one function for each operator, named as the operator.

A launcher takes the operator's arguments, already checked, on a CUDA, HIP or XPU device (on the CPU
under Triton's interpreter), and a keyword ``target`` that overrides the device's own: the tests run
the choices of every target that way. It plans its launches as data (:class:`plan.Launch`), which
the tests compile ahead of time for targets that this machine lacks, and then runs them.
"""
