"""Peak memory of `accumulate` does not grow with the number of Monte-Carlo samples; the full graph's does.

Each case is a fresh process: its growth is that of the peak resident set when K goes from 2 (warm-up) to 64.
"""

import functools
import subprocess
import sys

import pytest

MB = 2**20
PROBE = """
import sys
import torch
from dllm_kernels import accumulate, make_mask_plan
from dllm_kernels.objectives import BGPO, Batch, bgpo
from tests.tiny import eurobert

case = sys.argv[1]
torch.set_num_threads(1)
B, S, V = 2, 64, 4096
model = eurobert(vocab=V, hidden=32, layers=1, dtype=torch.float32)
ids = torch.randint(3, V - 1, (B, S), generator=torch.Generator().manual_seed(0))
A = torch.tensor([1.0, -1.0])

def run(K):
    plan = make_mask_plan(ids, torch.ones_like(ids, dtype=torch.bool), law="exact", samples=K, seed=0,
                          sequence_ids=torch.arange(B), mask_id=V - 1)
    old = torch.full((B, K), -8.0 * S)
    if case == "full_graph":
        logits = model(plan.noisy_ids.view(K * B, S)).logits.view(K * B * S, V)
        logp = logits.log_softmax(-1)[plan.rows.index].gather(1, plan.rows.target[:, None])[:, 0]
        bgpo(plan.elbo(logp), old, A).backward()
    else:
        accumulate(model, plan, BGPO, Batch({"advantages": A}, {"old_sample_elbo": old} if case == "off_policy" else {}))

# not ru_maxrss: a child starts with its parent's, so that in a large pytest nothing would seem to grow
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
run(2)
model.zero_grad()
run(2)
before = peak()
run(64)
print(peak() - before)
"""


@functools.cache
def growth(case: str) -> int:
    """Bytes by which the peak resident set of a fresh process grows from K = 2 to K = 64."""
    done = subprocess.run([sys.executable, "-c", PROBE, case], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("case", ["on_policy", "off_policy"])
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_memory_is_flat_in_the_number_of_samples_where_the_full_graph_grows(case):
    assert growth("full_graph") > 200 * MB
    assert growth(case) < 8 * MB
    assert growth("full_graph") > 10 * max(growth(case), 0)
