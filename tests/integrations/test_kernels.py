"""The folder for Hugging Face `kernels` loads and gives the package's own numbers, beside the package, with Triton too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import dllm_kernels
from dllm_kernels.integrations.kernels import EXPORTS, write

WHY = "kernels is not installed: pip install 'dllm-kernels[integrations]'"
LOAD = """
import sys
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""


def run(code: str, folder: Path, **environment: str) -> str:
    """In a folder without the package, so that whatever runs comes with the kernel."""
    blocked = "import sys\nsys.modules['dllm_kernels'] = None\n" + LOAD + code
    done = subprocess.run(
        [sys.executable, "-c", blocked, str(folder)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_gives_the_package_s_numbers_beside_the_package(tmp_path):
    kernels = pytest.importorskip("kernels", reason=WHY)
    write(tmp_path)
    kernel = kernels.get_local_kernel(tmp_path, backend="cpu")
    assert sorted(kernel.__all__) == sorted(name for names in EXPORTS.values() for name in names)
    assert kernel.score_tokens is not dllm_kernels.score_tokens
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(37, (6,), generator=generator)
    results = []
    for module in (dllm_kernels, kernel):
        hidden = torch.randn(6, 8, generator=generator.manual_seed(1)).requires_grad_()
        weight = torch.randn(37, 8, generator=generator).requires_grad_()
        scores = module.score_tokens(hidden, weight, target, want=("logp", "entropy"), suppress=(3,))
        (scores.logp.sin() + scores.entropy).sum().backward()
        results.append((scores.logp, scores.entropy, hidden.grad, weight.grad))
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_it_needs_no_package_and_its_triton_head_runs_interpreted(tmp_path):
    pytest.importorskip("kernels", reason=WHY)
    pytest.importorskip("triton")
    write(tmp_path)
    code = """
import torch
generator = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(5, 16, generator=generator), torch.randn(40, 16, generator=generator)
target = torch.randint(40, (5,), generator=generator)
logp = kernel.score_tokens(hidden, weight, target).logp
want = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
print(float((logp - want).abs().max()) < 1e-5, any("triton.head" in name for name in sys.modules))
"""
    assert run(code, tmp_path).split() == ["True", "False"]
    assert run(code, tmp_path, TRITON_INTERPRET="1", DLLM_KERNELS_BACKEND="triton").split() == ["True", "True"]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "build" / "torch-cpu").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        write(tmp_path)
