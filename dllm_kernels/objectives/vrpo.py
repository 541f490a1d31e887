"""VRPO: variance-reduced preference optimization, LLaDA 1.5 (arXiv 2505.19223, ACL 2026).

DPO with ELBOs in place of log-probs; policy and reference share their masks.

Unverified against its authors' code, which is closed: the loss is the paper's, `lengths` (in the engine `normalize` and
`window`) is what the public port (yjyddq/DARE at 83ae8a3) adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.update import Rewards, Signal

__all__ = ["vrpo", "vrpo_objective"]


def vrpo(
    chosen_elbo_B: Tensor,
    chosen_ref_B: Tensor,
    rejected_elbo_B: Tensor,
    rejected_ref_B: Tensor,
    *,
    beta: float,
    lengths: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`-mean_b log sigmoid(beta [(elbo - ref)(chosen_b) - (elbo - ref)(rejected_b)])`.

    Args:
        chosen_elbo_B, rejected_elbo_B: ELBOs `[B]` (nats) of the two completions of each pair, both differentiable, fp32
            or fp64; the mean over n samples.
        chosen_ref_B, rejected_ref_B: the same under the reference with the same masks; detached.
        beta: above 0; the port's is 0.2, for ELBOs divided by length.
        lengths: None: the paper's form. `[B]`, or a pair of them for chosen and rejected: divides the ELBOs, as the port does
            (llada_dp_actor_vrpo.py:126-127, where it is the response window). Where 0, 1 is used.

    Returns the scalar loss; the gradient at equal margins is beta / 2. Raises TypeError or ValueError naming the argument.

    Example:
        >>> chosen, rejected = torch.tensor([-4.0], requires_grad=True), torch.tensor([-5.0])
        >>> vrpo(chosen, torch.tensor([-4.0]), rejected, torch.tensor([-5.0]), beta=0.5).backward()
        >>> chosen.grad
        tensor([-0.2500])
    """
    (B,) = surrogates.check_policy("chosen_elbo_B", chosen_elbo_B, 1)
    checks.dtype("rejected_elbo_B", rejected_elbo_B, surrogates.SCORES)
    surrogates.check_values("chosen_ref_B", chosen_ref_B, [B], chosen_elbo_B)
    checks.shape("rejected_elbo_B", rejected_elbo_B, [B])
    checks.same_device("rejected_elbo_B", rejected_elbo_B, "chosen_elbo_B", chosen_elbo_B)
    surrogates.check_values("rejected_ref_B", rejected_ref_B, [B], chosen_elbo_B)
    checks.number("beta", beta, above=0)
    chosen_B, rejected_B = chosen_elbo_B - chosen_ref_B.detach(), rejected_elbo_B - rejected_ref_B.detach()
    if lengths is not None:
        pair = lengths if isinstance(lengths, tuple) else (lengths, lengths)
        if len(pair) != 2:
            raise ValueError(f"lengths must be one tensor or a pair of them, got {len(pair)}")
        chosen_B = chosen_B / surrogates.divisors("lengths", pair[0], [B], chosen_elbo_B)
        rejected_B = rejected_B / surrogates.divisors("lengths", pair[1], [B], chosen_elbo_B)
    return -F.logsigmoid(beta * (chosen_B - rejected_B)).sum() / B


def vrpo_objective(*, beta: float, normalize: bool = False, window: int | None = None) -> Objective:
    """`vrpo` for the engine; normalize divides the ELBOs by `window`, the port's form (line 126), or by the lengths of the plan.

    window: the tokens of the response window, the same for all; None: each completion's scored tokens.

    Batch: per sequence "ref_elbo", "group_ids" (int64, the pair) and "chosen" (bool). Every pair must hold one chosen and one
    rejected sequence; ValueError says where it does not (on a GPU under DLLM_KERNELS_VALIDATE=1).
    """
    checks.number("beta", beta, above=0)
    if window is not None:
        checks.count("window", window)

    def couple(elbo_B: Tensor, lengths_B: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        chosen_B, group_ids_B = entries["chosen"], entries["group_ids"]
        _check_pairs(chosen_B, group_ids_B)
        delta_B = elbo_B - entries["ref_elbo"].detach()
        if normalize:
            delta_B = delta_B / (lengths_B.to(delta_B.dtype).clamp(min=1.0) if window is None else window)
        margin_B = surrogates.group_sum(torch.where(chosen_B, delta_B, -delta_B), group_ids_B)
        return -surrogates.masked_sum(F.logsigmoid(beta * margin_B), chosen_B)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        return couple(surrogates.sequence_scores(logp_N, plan), plan.lengths_B, batch.per_sequence)

    return Objective(
        name="vrpo",
        contributions=contributions,
        coupling="batch",
        on_policy_coupling="batch",
        denominator="pairs",
        old_scores=None,
        per_sequence=("ref_elbo", "group_ids", "chosen"),
        reduce=surrogates.sequence_scores,
        couple=couple,
    )


def _check_pairs(chosen_B: Tensor, group_ids_B: Tensor) -> None:
    checks.dtype("chosen", chosen_B, [torch.bool])
    checks.dtype("group_ids", group_ids_B, [torch.int64])
    if not checks.may_read(chosen_B):
        return
    of_each_B = [surrogates.group_sum(kind_B.long(), group_ids_B) for kind_B in (chosen_B, ~chosen_B)]
    if bool((wrong_B := (of_each_B[0] != 1) | (of_each_B[1] != 1)).any()):
        raise ValueError(
            "group_ids must name pairs of one chosen and one rejected sequence, "
            f"got another count for id {int(group_ids_B[wrong_B][0])}"
        )


@dataclass(frozen=True)
class Options:
    """As the port has them."""

    beta: float = 0.2
    normalize: bool = True
    window: int | None = None  # what ELBOs are divided by: a run's own, where it is not given


def _best_and_worst(rewards: Rewards, objective: Objective, options: Options) -> Signal:
    """Pairs of the best and the worst rollout of each group whose rewards differ."""
    values_B, group_ids_B = rewards.values_B, rewards.group_ids_B
    chosen: list[int] = []
    rejected: list[int] = []
    for group in group_ids_B.unique():
        members = (group_ids_B == group).nonzero()[:, 0]
        best, worst = members[values_B[members].argmax()], members[values_B[members].argmin()]
        if values_B[best] > values_B[worst]:
            chosen.append(int(best))
            rejected.append(int(worst))
    pairs = torch.arange(len(chosen), device=values_B.device)
    is_chosen = torch.arange(2 * len(chosen), device=values_B.device) < len(chosen)
    kept = torch.tensor(chosen + rejected, dtype=torch.int64, device=values_B.device)
    return Signal(kept, {"chosen": is_chosen, "group_ids": torch.cat([pairs, pairs])}, float(max(1, len(chosen))))


RECIPE = Recipe(
    name="vrpo",
    title="VRPO: variance-reduced preference optimization (LLaDA 1.5)",
    arxiv="2505.19223",
    status="unverified",
    objective=vrpo_objective,
    law="exact",
    law_options={},
    samples=4,
    advantage=None,
    needs_old=False,
    needs_reference=True,
    inner_iterations=1,
    options=Options,
    from_run=lambda length, steps: {"window": length},
    signal=_best_and_worst,
    pairs=True,
    window="eos",
    tail="removed",
    notes="The training code is closed; a public port was read, whose defaults these are (the paper divides by no length). "
    "Port: learning rate 5e-7, 64 pairs a step, 10 epochs. It trains on pairs of completions, not on groups.",
)
