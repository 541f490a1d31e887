"""A small ragged plan, and sequence-level fixtures, for the tests of the sequence-level objectives."""

import torch

from dllm_kernels import make_mask_plan

F64 = torch.float64
COMPLETIONS = (4, 0, 7, 1, 5, 3)  # one without a token
GROUPS = (9, 4, 9, 4, 9, 4)  # interleaved


def plan_of(law, samples, *, shift=0, **options):
    """Six sequences of ragged completions after prompts of 2 tokens."""
    S = 2 + max(COMPLETIONS)
    at = torch.arange(S)
    completion = (at >= 2) & (at < 2 + torch.tensor(COMPLETIONS)[:, None])
    return make_mask_plan(
        torch.arange(6 * S).reshape(6, S),
        completion,
        law=law,
        samples=samples,
        seed=1,
        sequence_ids=torch.arange(6) + 50,
        mask_id=999,
        shift=shift,
        **options,
    )


def scores(spread=0.8, seed=0):
    """(policy, old, reference, advantages, lengths) of six sequences; one on-policy, one advantage 0, one without a token."""
    g = torch.Generator().manual_seed(seed)
    old = -9 * torch.rand(6, generator=g, dtype=F64)
    elbo = old + spread * torch.randn(6, generator=g, dtype=F64)
    elbo[1] = old[1] = 0.0
    elbo[3] = old[3]
    ref = old + spread * torch.randn(6, generator=g, dtype=F64)
    advantages = torch.tensor([1.5, -0.5, -1.0, 2.0, 0.0, -2.0], dtype=F64)
    return elbo.requires_grad_(), old, ref, advantages, torch.tensor(COMPLETIONS)
