"""What jax asks a GPU that is not here: its cuDNN and its compute capability, where it decides on a kernel.

jax has no other way to be told (0.10 to 0.12), so the functions that ask are replaced, in a process that compiles for
GPUs alone. Where a version has others, programs with cuDNN's attention fail, and the plan says so.
"""

from typing import Any

CUDNN = 91000  # the version of `topology`'s description


def described_as(capability: float) -> None:
    """Let jax find this cuDNN and a GPU of this compute capability."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    asked: Any = attention
    asked.check_cudnn_version = lambda: CUDNN
    asked.check_compute_capability = lambda wanted: capability >= float(wanted)
    asked.is_cuda_compute_capability_equal = lambda wanted: capability == float(wanted)
