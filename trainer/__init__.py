"""The thin trainer of dllm-kernels: loops, data, files and the `dllm-train` command; no numerics of its own."""
