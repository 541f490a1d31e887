"""Run by test_passes.py in a process of its own, which becomes two: each rank accumulates its share of a
batch.

python -m tests.accumulation.ranked_accumulation STORE OUT: rank 0 saves each case's loss and gradients,
summed over the ranks, to OUT.
"""

import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist

from dllm_kernels import accumulate
from dllm_kernels.objectives import BGPO, Batch, dmpo_objective, rspo_objective, vrpo_objective
from tests.plans import plan_of
from tests.tiny import eurobert, gradients

F64 = torch.float64
OF_RANKS = ([0, 1, 5], [2, 3, 4])  # groups and pairs lie on both


def model():
    return eurobert(vocab=100)


def cases():
    plan = plan_of([5, 4, 6, 7, 3, 2])
    g = torch.Generator().manual_seed(0)
    A, ref, weights = (torch.randn(6, generator=g, dtype=F64) for _ in range(3))
    ids, chosen = torch.tensor([7, 2, 7, 2, 4, 4]), torch.tensor([True, False, False, True, True, False])
    return {
        "rspo": (rspo_objective(lam=0.5), plan, Batch({"advantages": A, "ref_elbo": ref - 20})),
        "vrpo": (vrpo_objective(beta=0.1), plan, Batch({"ref_elbo": ref - 20, "group_ids": ids, "chosen": chosen})),
        "dmpo, unbias": (
            dmpo_objective(baseline="unbias"),
            plan,
            Batch({"weights": weights, "old_elbo": ref - 20, "group_ids": ids}),
        ),
        "bgpo": (BGPO, plan, Batch({"advantages": A})),  # nothing to share but the denominator
    }


def run(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found, policy = {}, model()
    mine = torch.tensor(OF_RANKS[rank])
    for name, (objective, plan, batch) in cases().items():
        policy.zero_grad()
        report = accumulate(policy, plan.cut(sequences=mine), objective, batch.cut(sequences=mine), group=dist.group.WORLD)
        parts = [None, None]
        dist.all_gather_object(parts, (float(report.loss), gradients(policy)))
        summed = {key: parts[0][1][key] + parts[1][1][key] for key in parts[0][1]}
        found[name] = (parts[0][0] + parts[1][0], summed)
    _, plan, batch = cases()["rspo"]
    with pytest.raises(ValueError, match="plan must hold sequence ids"):  # both ranks hold all of it
        accumulate(policy, plan, rspo_objective(), batch, group=dist.group.WORLD)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # torch is imported once
    ranks = [context.Process(target=run, args=(rank, sys.argv[1], sys.argv[2])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
