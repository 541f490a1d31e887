"""A head that is split over processes by vocabulary gives what the whole head gives."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dllm_kernels.head import shards

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_scores_gradients_losses_and_draws_are_those_of_the_whole_head(tmp_path, world):
    """To fp32 rounding, tokens exactly. Ranks hold unequal parts; one of four holds nothing, and of another all is suppressed."""
    command = [sys.executable, "-m", "tests.head.split_ranks", str(tmp_path / "store"), str(world)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-6000:]


def test_where_values_are_not_read_a_rank_raises_by_itself():
    """As on a GPU without DLLM_KERNELS_VALIDATE: agreeing would stall it."""
    elsewhere = torch.empty(0, device="meta")
    assert shards.agree(None, elsewhere, None) is None
    with pytest.raises(ValueError, match="hidden is bad"):
        shards.agree(ValueError("hidden is bad"), elsewhere, None)
