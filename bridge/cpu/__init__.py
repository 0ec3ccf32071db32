"""What only CPUs need: megatron-core made to run without CUDA, and layers with kernels written for CPUs."""
