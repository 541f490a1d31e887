"""The thin trainer of dllm-kernels: loops, data, files and the `dllm-kernels` command; no numerics of its own."""

from .names import share as _share

_share(__name__)
