"""Adapters are imported when asked for; a missing package is one sentence."""

import subprocess
import sys

import pytest

from dllm_kernels.integrations import needs


def test_the_library_imports_no_adapter():
    code = "import sys, dllm_kernels, dllm_kernels.objectives; print([n for n in sys.modules if 'integrations' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_missing_package_says_what_to_install_and_other_errors_are_their_own():
    here = r"^nowhere is missing; pip install 'dllm-kernels\[integrations\]' brings it$"
    with pytest.raises(ModuleNotFoundError, match=here), needs("nowhere"):
        import nowhere  # noqa: F401
    part = r"^json\.core is missing; pip install another brings it$"
    with pytest.raises(ModuleNotFoundError, match=part), needs("json", "pip install another"):
        import json.core  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'elsewhere'$"), needs("nowhere"):
        import elsewhere  # noqa: F401
