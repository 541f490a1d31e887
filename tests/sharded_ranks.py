"""Run by test_sharded.py: the same checks in a process without ranks (size 0) and in worlds of several sizes.

python -m tests.sharded_ranks OUT WORK SIZE...: WORK is the name of a function here, of `Ranks`; what rank 0 of each world
returns is saved to OUT as {size: result}.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import EuroBertForMaskedLM  # noqa: F401 - imported once, before the ranks are forked

from dllm_kernels import accumulate, elbo_loss, generate, headless, noise
from dllm_kernels.accumulation import score_samples
from dllm_kernels.objectives import (
    BGPO,
    Batch,
    diffu_grpo_objective,
    dmpo_objective,
    egspo_sa_objective,
    gdpo_objective,
    rspo_objective,
    wd1_objective,
)
from tests.plans import plan_of
from tests.tiny import eurobert
from trainer.distributed import Ranks, advantages, clip_gradients, shard

F64 = torch.float64
LENGTHS = [5, 4, 0, 7, 3, 6, 2]
B = len(LENGTHS)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, -0.5, 0.7, 0.0, -1.2], dtype=F64)
GROUPS = torch.tensor([3, 3, 9, 9, 9, 5, 3])
CUTS = [{}, {"samples_per_pass": 4}, {"sequences_per_pass": 2}, {"samples_per_pass": 3, "sequences_per_pass": 1}]


def model_of(kind, dtype=F64):
    model = eurobert(vocab=101, hidden=16, dtype=dtype, tie_word_embeddings=kind == "tied")
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == (kind == "tied")
    if kind == "bias":
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 101, dtype=dtype))
    if kind == "frozen":
        head.requires_grad_(False)
    return model


def case(coupling, dtype=F64, **options):
    """(objective, plan, batch) of all sequences: scores of an old policy that is a little off."""
    law = {"none": "full", "token": "full", "steps": "trace"}.get(coupling, "exact")
    plan = plan_of(LENGTHS, law=law, samples=None if law == "trace" else 4, **options)
    old = model_of("untied", dtype)
    dense, sample = score_samples(old, plan, per_token=True) - 0.1, score_samples(old, plan) - 0.1
    elbo = (sample * plan.share_K.to(dtype)).sum(-1)
    weights = WEIGHTS.to(dtype)
    return {
        "none": lambda: (wd1_objective(), plan, Batch({"weights": weights, "group_ids": GROUPS})),
        "token": lambda: (diffu_grpo_objective(beta=0.0), plan, Batch({"advantages": weights}, {"old_logp": dense})),
        "sample": lambda: (BGPO, plan, Batch({"advantages": weights}, {"old_sample_elbo": sample})),
        "sequence": lambda: (gdpo_objective(), plan, Batch({"advantages": weights, "old_elbo": elbo})),
        "batch": lambda: (rspo_objective(lam=0.5), plan, Batch({"advantages": weights, "ref_elbo": elbo})),
        "batch, groups": lambda: (
            dmpo_objective(baseline="unbias"),
            plan,
            Batch({"weights": weights, "old_elbo": elbo, "group_ids": GROUPS}),
        ),
        "steps": lambda: (
            egspo_sa_objective(beta=0.0, tokens_per_step=1),
            plan,
            Batch({}, {"step_advantages": weights[:, None] * (torch.arange(plan.shape[0]) % 2), "old_sample_elbo": sample}),
        ),
    }[coupling]()


COUPLINGS = ("none", "token", "sample", "sequence", "batch", "batch, groups", "steps")


def full(tensor):
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def full_gradients(model):
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def step(model, coupling, mine, ranks, **options):
    """(loss, gradients) of one optimizer step over all ranks."""
    objective, plan, batch = case(coupling)
    model.zero_grad()
    plan, batch = plan.cut(sequences=mine), batch.cut(sequences=mine)
    if ranks.group is None:
        report = accumulate(model, plan, objective, batch, **options)
    else:
        report = accumulate(model, plan, objective, batch, **options)
        assert all(type(p.grad).__name__ == "DTensor" for p in model.parameters() if p.grad is not None)
    return ranks.total(float(report.loss)), full_gradients(model)


def gradients(ranks):
    """Every coupling and kind of head; cuts and splits of the batch that leave ranks with more, less or no work."""
    found = {}
    splits = {"even": ranks.share(B)} if ranks.group is not None else {"even": slice(None)}
    if ranks.size > 1:
        splits["first has all"] = slice(None) if ranks.is_first else slice(0, 0)
        splits["last has most"] = slice(1, None) if ranks.rank == ranks.size - 1 else slice(0, ranks.rank == 0)
    for kind in ("untied", "tied", "bias", "frozen"):
        model = shard(model_of(kind), ranks)
        for coupling in COUPLINGS if kind in ("untied", "tied") else ("sample", "sequence"):
            for number, cut in enumerate(CUTS if kind == "untied" else CUTS[:1]):
                for name, mine in splits.items() if number == 0 else [("even", splits["even"])]:
                    for last in (False, True) if ranks.group is not None else (False,):
                        found[kind, coupling, number, name, last] = step(model, coupling, mine, ranks, **cut, reduce_last=last)
    return found


def _rank(rank, size, store, work, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    result = globals()[work](Ranks(rank, size, torch.device("cpu"), dist.group.WORLD))
    if rank == 0:
        torch.save(result, out)
    dist.barrier()
    dist.destroy_process_group()


def world(work, size):
    """What rank 0 of `size` forked ranks returns."""
    if size == 0:
        return globals()[work](Ranks())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        context = multiprocessing.get_context("fork")  # torch is imported once
        ranks = [context.Process(target=_rank, args=(r, size, f"{folder}/store", work, out)) for r in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"a rank of {size} failed")
        return torch.load(out, weights_only=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({int(size): world(sys.argv[2], int(size)) for size in sys.argv[3:]}, sys.argv[1])
