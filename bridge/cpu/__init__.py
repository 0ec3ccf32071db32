"""Code for CPUs alone: it makes megatron-core run without CUDA and defines layers with kernels written for CPUs."""
