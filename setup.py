"""Declares the C++ extension; everything else is in pyproject.toml. The extension knows nothing of torch, and an install
without a C++ compiler goes through without it: the library then runs its PyTorch twin.

Develop: python setup.py build_ext --inplace
"""

from glob import glob

import pybind11
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "dllm_kernels._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
            include_dirs=["csrc", pybind11.get_include()],
            # no contraction into FMA: every ISA must give the same bits
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-fast-math",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-pthread",
                "-g0",
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]
)
