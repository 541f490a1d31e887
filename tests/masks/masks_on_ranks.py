"""Run by test_plan_anywhere.py in a process of its own, which becomes four: each rank plans its share of a
batch.

python -m tests.masks.masks_on_ranks STORE OUT: rank 0 saves the masks of all ranks of 1, 2 and 4 to OUT.
"""

import multiprocessing
import sys

import torch
import torch.distributed as dist

from tests.plans import PRESETS, preset

LENGTHS = [5, 0, 7, 3, 6, 1, 7, 2]
IDS = torch.arange(8) * 2**58 - 2**60


def masks(name, sequences):
    return preset(name, [LENGTHS[b] for b in sequences], S=9, ids=IDS[sequences], prompt_noise=0.3, iteration=2)


def run(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    found = {}
    for world in (1, 2, 4):
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        for name in PRESETS:
            plan = masks(name, list(range(rank, 8, world)))
            shares = [None] * world
            dist.all_gather_object(shares, (plan.masked, plan.scored, plan.weight_KB), group=group)
            found[world, name] = shares
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # torch is imported once
    ranks = [context.Process(target=run, args=(rank, sys.argv[1], sys.argv[2])) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
