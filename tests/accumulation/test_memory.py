"""Peak memory of `accumulate` does not grow with the number of Monte-Carlo samples; the full graph's does.

Each case is a fresh process: its growth is that of the peak resident set when K goes from 2 (warm-up) to 64.
"""

import functools
import subprocess
import sys

import pytest

from tests.algorithms import RECIPES, objective_of

MB = 2**20
PROBE = """
import sys
import torch
from dllm_kernels import accumulate
from tests import algorithms, oracle
from tests.tiny import eurobert

variant, how = sys.argv[1:]
torch.set_num_threads(1)
B, S, V = 4, 32, 4096
model = eurobert(vocab=V, hidden=32, layers=1, dtype=torch.float32)
ids = torch.randint(3, V - 1, (B, S), generator=torch.Generator().manual_seed(0))
completion = torch.ones_like(ids, dtype=torch.bool)
objective = algorithms.objective_of(variant)

def run(K):
    K = algorithms.nearest_samples(variant, K)
    plan = algorithms.plan_of(variant, K, ids=ids, completion=completion, mask_id=V - 1)
    batch = algorithms.batch_of(objective, plan, torch.full((len(plan.rows),), -8.0), on_policy=how == "on-policy")
    if how == "full graph":
        objective.contributions(oracle.plan_logps(model, plan), plan, batch).backward()
    else:
        accumulate(model, plan, objective, batch)

# not ru_maxrss: a child starts with its parent's, so that in a large pytest nothing would seem to grow
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
run(2)
model.zero_grad()
run(2)
before = peak()
run(64)
print(before, peak())
"""
QUICK = ("wd1", "diffu_grpo", "bgpo", "gdpo", "rspo")  # one of each coupling

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")


@functools.cache
def peaks(variant: str, how: str) -> tuple[int, int]:
    """Peak resident sets of a fresh process in bytes: after K = 2, twice, and after K = 64."""
    done = subprocess.run([sys.executable, "-c", PROBE, variant, how], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split()[-2:])
    return before, after


def check(variant: str, how: str, full_graph: int) -> None:
    before, after = peaks(variant, how)
    assert after <= 1.05 * before
    assert after - before < 8 * MB
    assert full_graph > 200 * MB
    assert full_graph > 10 * (after - before)


@pytest.mark.parametrize("variant", QUICK)
def test_memory_is_flat_in_the_number_of_samples_where_the_full_graph_grows(variant):
    before, after = peaks("bgpo", "full graph")
    check(variant, "off-policy", after - before)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*RECIPES, "dmpo, unbias"])
def test_memory_of_every_algorithm_is_flat_where_its_own_full_graph_grows(variant):
    before, after = peaks(variant, "full graph")
    check(variant, "off-policy", after - before)
    if objective_of(variant).old_scores is not None:
        check(variant, "on-policy", after - before)
