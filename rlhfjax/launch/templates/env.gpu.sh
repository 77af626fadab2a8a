# What a process on NVIDIA GPUs gets of its environment. What is set already stays as it is.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Overlap of sending and computing: RLHFJAX_OVERLAP=1. Off by default, since nobody has measured here what it brings. With
# CUDA_DEVICE_MAX_CONNECTIONS=1 Hopper starts kernels in their order; newer GPUs are slower with it.
if [[ "${RLHFJAX_OVERLAP:-0}" == 1 ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
  XLA_FLAGS+=" --xla_gpu_all_gather_combine_threshold_bytes=1073741824"
  XLA_FLAGS+=" --xla_gpu_all_reduce_combine_threshold_bytes=1073741824"
  XLA_FLAGS+=" --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
  XLA_FLAGS+=" --xla_gpu_enable_pipelined_all_gather=true"
  XLA_FLAGS+=" --xla_gpu_enable_pipelined_reduce_scatter=true"
  XLA_FLAGS+=" --xla_gpu_enable_pipelined_all_reduce=true"
fi
