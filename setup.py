"""Declares the C++ extension and, where a forge builds, the addresses; everything else is in pyproject.toml. The extension
knows nothing of torch, and an install without a C++ compiler goes through without it: the library then runs its PyTorch twin.

Develop: python setup.py build_ext --inplace
"""

import os
import re
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup


def addresses() -> dict[str, object]:
    """The project's URLs and a README whose links work on PyPI, from what GitHub's workflows know; none in a checkout."""
    readme, home = Path("README.md").read_text(encoding="utf-8"), None
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        home = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}"
        place = os.environ.get("GITHUB_SHA", "main")
        readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{home}/raw/{place}/", readme)
        readme = re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{home}/blob/{place}/", readme)
    pages = {"Homepage": "", "Documentation": "/tree/main/docs", "Issues": "/issues"}
    return {
        "long_description": readme,
        "long_description_content_type": "text/markdown",
        "project_urls": {name: home + page for name, page in pages.items()} if home else {},
    }


ParallelCompile().install()  # each instruction set is a file of its own: as many at once as there are cores
setup(
    **addresses(),
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
                "-Wall",
                "-Wextra",
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
    ],
)
