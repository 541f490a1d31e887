"""Triton kernels; nothing here is imported unless it is used, so that the library needs no Triton."""
