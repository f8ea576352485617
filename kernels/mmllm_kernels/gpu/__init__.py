"""The Triton path: `launch` has the functions that `sorted_tokens` has; the other modules are its kernels."""
