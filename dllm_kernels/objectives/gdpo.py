"""GDPO: Group diffusion policy optimization (arXiv 2510.08554, ICLR 2026).

A PPO clip on the ratio of sequence ELBOs, which a Gauss-Legendre rule over the mask level makes nearly deterministic.

Verified against the code (KevinRojas1499/GDPO at 1918683); the paper's form is secondhand. Not NeMo-RL's `gdpo`, which
normalises several rewards.
"""

from __future__ import annotations

from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Clip, Recipe

__all__ = ["gdpo", "gdpo_objective"]

MODES = ("paper", "code")


def gdpo(
    elbo_B: Tensor,
    old_elbo_B: Tensor,
    advantages_B: Tensor,
    lengths_B: Tensor,
    *,
    epsilon: float = 0.5,
    ref_elbo: Tensor | None = None,
    beta: float = 0.0,
    mode: str = "code",
) -> Tensor:
    """`-mean_b f_b` with f the clipped ratio of sequence ELBOs.

    "code", the default: `f = min(rho A, clip(rho, 1 +- epsilon) A)`, `rho = exp((elbo - old_elbo) / L)` (gdpo_trainer.py:99-138).
    "paper": `f = (1/L) min(rho A, clip(rho, 1 +- epsilon) A)`, `rho = exp(elbo - old_elbo)`. Known at
    second hand; its gradients differ from the published run's by 40 to 49 %.

    Args:
        elbo_B: sequence ELBOs `[B]` (nats), differentiable, fp32 or fp64.
        old_elbo_B: the same under the old policy with the same masks; detached. (The published run draws other masks for
            it in all inner iterations but the first.)
        advantages_B: `[B]`, reward minus its group's mean; detached.
        lengths_B: `[B]`, the completion lengths L; where 0, the sequence has no token and L = 1 is used.
        epsilon: the clip, in [0, 1].
        ref_elbo: `[B]` under the reference, detached; needed where beta > 0.
        beta: adds `beta * k3(elbo - ref_elbo)` to -f, on the raw ELBOs and divided by no length in either mode, as the code.

    Returns the scalar loss. Gradient of f: A rho, times 1/L, unless strictly clipped. Raises TypeError or ValueError naming
    the argument.

    Example:
        >>> import torch
        >>> elbo = torch.tensor([-8.0, -6.0], requires_grad=True)
        >>> loss = gdpo(elbo, elbo.detach(), torch.tensor([1.0, -1.0]), torch.tensor([4, 2]))
        >>> loss.backward()
        >>> elbo.grad
        tensor([-0.1250,  0.2500])
    """
    (B,) = surrogates.check_policy("elbo_B", elbo_B, 1)
    surrogates.check_values("old_elbo_B", old_elbo_B, [B], elbo_B)
    surrogates.check_values("advantages_B", advantages_B, [B], elbo_B)
    divisor_B = surrogates.divisors("lengths_B", lengths_B, [B], elbo_B)
    _check_options(epsilon, beta, mode)
    if beta > 0:
        if ref_elbo is None:
            raise ValueError(f"ref_elbo must be given where beta > 0, got None with beta={beta}")
        surrogates.check_values("ref_elbo", ref_elbo, [B], elbo_B)
    return _total(elbo_B, old_elbo_B, advantages_B, divisor_B, ref_elbo, epsilon, beta, mode) / B


def _check_options(epsilon: float, beta: float, mode: str) -> None:
    surrogates.check_clip(epsilon, epsilon)
    checks.number("beta", beta, least=0)
    checks.choice("mode", mode, MODES)


def _total(
    elbo_B: Tensor,
    old_elbo_B: Tensor,
    advantages_B: Tensor,
    divisor_B: Tensor,
    ref_elbo_B: Tensor | None,
    epsilon: float,
    beta: float,
    mode: str,
) -> Tensor:
    delta_B = elbo_B - old_elbo_B.detach()
    if mode == "code":
        loss_B = -surrogates.clipped_ratio_term(delta_B / divisor_B, advantages_B, epsilon, epsilon)
    else:
        loss_B = -surrogates.clipped_ratio_term(delta_B, advantages_B, epsilon, epsilon) / divisor_B
    if beta > 0 and ref_elbo_B is not None:
        loss_B = loss_B + beta * surrogates.k3(elbo_B - ref_elbo_B.detach())
    return loss_B.sum()


def gdpo_objective(*, epsilon: float = 0.5, beta: float = 0.0, mode: str = "code") -> Objective:
    """`gdpo` for the engine. Batch: per sequence "advantages", "old_elbo" (absent on-policy), and "ref_elbo" where beta > 0."""
    _check_options(epsilon, beta, mode)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        elbo_B, entries = plan.score(logp_N), batch.per_sequence
        divisor_B = plan.lengths_B.to(elbo_B.dtype).clamp(min=1.0)
        old_elbo_B, ref_elbo_B = entries.get("old_elbo", elbo_B), entries.get("ref_elbo")
        return _total(elbo_B, old_elbo_B, entries["advantages"], divisor_B, ref_elbo_B, epsilon, beta, mode)

    return Objective(
        name="gdpo",
        contributions=contributions,
        coupling="sequence",
        on_policy_coupling="sequence" if beta > 0 else "none",
        denominator="sequences",
        old_scores="old_elbo",
        per_sequence=("advantages", "old_elbo", *(("ref_elbo",) if beta > 0 else ())),
        scale=None if beta > 0 else "advantages",
    )


RECIPE = Recipe(
    name="gdpo",
    title="GDPO: Group diffusion policy optimization",
    arxiv="2510.08554",
    status="verified against the code",
    objective=gdpo_objective,
    law="quadrature",
    law_options={"nodes": 3},
    samples=3,
    advantage="mean",
    needs_old=True,
    needs_reference=False,
    inner_iterations=12,
    clip=lambda options: Clip(options.epsilon, options.epsilon, per_token=options.mode == "code"),
    window="completion",
    notes="The official code was read, the paper's form (no length inside the ratio, 1/|y| outside) is secondhand. "
    "Code: 6 completions a prompt, learning rate 3e-7, 256 tokens, LoRA 128.",
)
