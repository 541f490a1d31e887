"""RSPO: relative score policy optimization (arXiv 2605.10218).

Unverified: no official code was found and the paper's equations were not read. This is the form of one third-party port
(SDogya/automatic-eureka at d354de5, `src/rl/losses/baselines.py`, citing "Eq. 3.3"), with which the abstract agrees.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.surrogates import sequence_scores

__all__ = ["rspo", "rspo_objective"]


def rspo(elbo_B: Tensor, ref_elbo_B: Tensor, advantages_B: Tensor, lengths_B: Tensor, *, lam: float = 0.01) -> Tensor:
    """`-mean_b w_b delta^_b`: regression of the relative log-ratio per token onto the target A / lam.

    `delta = (elbo - ref_elbo) / L`, `delta^ = delta - sg[mean over the batch of delta]`, `w = sg[A - lam delta^]`. Its
    gradient is lam times that of `mean_b (delta^ - A / lam)^2 / 2`; lam = 0 is REINFORCE on the ELBO.

    Args:
        elbo_B: sequence ELBOs `[B]` (nats), differentiable, fp32 or fp64.
        ref_elbo_B: the same under the frozen reference with the same masks; detached.
        advantages_B: `[B]`, relative to the group; detached.
        lengths_B: `[B]`, the completion lengths L; where 0, L = 1 is used.
        lam: at least 0.

    Returns the scalar loss; its value is no measure of progress, its gradient is that of the regression. Raises TypeError or
    ValueError naming the argument.

    Example:
        >>> import torch
        >>> elbo = torch.tensor([-8.0, -6.0], requires_grad=True)
        >>> rspo(elbo, elbo.detach(), torch.tensor([1.0, -1.0]), torch.tensor([4, 2])).backward()
        >>> elbo.grad
        tensor([-0.1250,  0.2500])
    """
    (B,) = surrogates.check_policy("elbo_B", elbo_B, 1)
    surrogates.check_values("ref_elbo_B", ref_elbo_B, [B], elbo_B)
    surrogates.check_values("advantages_B", advantages_B, [B], elbo_B)
    divisor_B = surrogates.divisors("lengths_B", lengths_B, [B], elbo_B)
    checks.number("lam", lam, least=0)
    return _total(elbo_B, ref_elbo_B, advantages_B, divisor_B, lam) / B


def _total(elbo_B: Tensor, ref_elbo_B: Tensor, advantages_B: Tensor, divisor_B: Tensor, lam: float) -> Tensor:
    delta_B = (elbo_B - ref_elbo_B.detach()) / divisor_B
    centred_B = delta_B - delta_B.detach().mean()
    residual_B = (advantages_B - lam * centred_B).detach()
    return -(residual_B * centred_B).sum()


def rspo_objective(*, lam: float = 0.01) -> Objective:
    """`rspo` for the engine, centred over all that one call (or its `group` of ranks) sees.

    Batch: per sequence "advantages" and "ref_elbo".
    """
    checks.number("lam", lam, least=0)

    def couple(elbo_B: Tensor, lengths_B: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        return _total(elbo_B, entries["ref_elbo"], entries["advantages"], lengths_B.to(elbo_B.dtype).clamp(min=1.0), lam)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        return couple(sequence_scores(logp_N, plan), plan.lengths_B, batch.per_sequence)

    return Objective(
        name="rspo",
        contributions=contributions,
        coupling="batch",
        on_policy_coupling="batch",
        denominator="sequences",
        old_scores=None,
        per_sequence=("advantages", "ref_elbo"),
        reduce=sequence_scores,
        couple=couple,
    )


RECIPE = Recipe(
    name="rspo",
    title="RSPO: relative score policy optimization",
    arxiv="2605.10218",
    status="unverified",
    objective=rspo_objective,
    law="bernoulli",
    law_options={"weight": "L/count"},
    samples=4,
    advantage="std",
    needs_old=False,
    needs_reference=True,
    inner_iterations=1,
    window="completion",
    notes="Abstract, a digest and one third-party port agree on the form; no official code, equations and hyper-parameters not "
    "checked. The port redraws empty masks, here they score 0. Group size, learning rate and inner iterations are not known.",
)
