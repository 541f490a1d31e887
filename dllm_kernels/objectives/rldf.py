"""RLDF: reinforcement learning from denoising feedback (arXiv 2605.25638).

From a few states of the rollout, drawn by how surprising their step was, the policy is trained toward the final completion:
on all hidden tokens that are already likely (the clipped clean state), and on those that the step itself decides.

Verified against the code (ant-research/Drift at 7abd99b, trainer/masking_strategy.py, lines 200-360, and trainer/main_rl.py,
lines 194-250 and 302-434).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import checks, noise
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.masks.tails import eos_tail
from dllm_kernels.noise import Stream
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import check_mask, check_policy, check_values, dense_logp
from dllm_kernels.objectives.tokens import check_ratio_options, check_reference, old_and_reference, token_terms
from dllm_kernels.objectives.update import States
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import plan_of_states, step_entropy

__all__ = ["rldf", "rldf_objective", "weighted_steps"]


def rldf(
    logp_BL: Tensor,
    old_logp_BL: Tensor,
    ref_logp_BL: Tensor | None,
    advantages_B: Tensor,
    hidden_mask_BL: Tensor,
    decided_mask_BL: Tensor,
    *,
    epsilon: float = 0.2,
    beta: float = 0.01,
    threshold: float = 0.6,
) -> Tensor:
    """`mean_b (1/|M_b|) sum_{l in M_b} [ -min(rho A, clip(rho, 1 +- epsilon) A) + beta k3(logp, ref) ]`, `rho = e^(logp - old)`.

    A row is a pair (sequence, state), and M_b the hidden tokens with `e^old >= threshold`, and all that the state's step
    decides (lines 341-362 of main_rl.py; its `loss_norm` "sample").

    Args:
        logp_BL: log-probs `[B, L]` of the final tokens in the state, float32 or float64, differentiable.
        old_logp_BL, ref_logp_BL: the same of the policy that generated and of the reference, which may be None where beta is 0.
            On-policy old is `logp_BL.detach()`, by which the code filters then too.
        advantages_B: `[B]`, (reward - mean) / std within the group.
        hidden_mask_BL: bool `[B, L]`, the hidden tokens that may be scored (to the first EOS). decided_mask_BL: those of them
            that the step decided. The rest may hold anything. An empty row contributes 0 and is counted in B.
        epsilon, beta: the clip, in [0, 1], and the weight of the KL. threshold: in [0, 1]; 0 takes all hidden tokens.

    Everything but logp_BL is detached, M_b is data. Raises TypeError or ValueError naming the argument.

    Example:
        >>> logp = torch.tensor([[-0.1, -2.0, -3.0]], requires_grad=True)
        >>> hidden, decided = torch.tensor([[True, True, True]]), torch.tensor([[False, True, False]])
        >>> rldf(logp, logp, logp, torch.tensor([2.0]), hidden, decided).backward()
        >>> logp.grad
        tensor([[-1., -1.,  0.]])
    """
    _check_options(epsilon, beta, threshold)
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_mask("hidden_mask_BL", hidden_mask_BL, sizes, logp_BL)
    check_mask("decided_mask_BL", decided_mask_BL, sizes, logp_BL)
    check_values("old_logp_BL", old_logp_BL, sizes, logp_BL, where=hidden_mask_BL)
    check_reference("ref_logp_BL", ref_logp_BL, sizes, logp_BL, beta, where=hidden_mask_BL)
    check_values("advantages_B", advantages_B, sizes[:1], logp_BL)
    kept_BL = _kept(old_logp_BL, hidden_mask_BL, decided_mask_BL, threshold)
    return _total(logp_BL, old_logp_BL, ref_logp_BL, advantages_B, kept_BL, epsilon, beta) / sizes[0]


def _check_options(epsilon: float, beta: float, threshold: float) -> None:
    check_ratio_options(epsilon, beta)
    if checks.number("threshold", threshold, least=0) > 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")


def _kept(old: Tensor, hidden: Tensor, decided: Tensor, threshold: float) -> Tensor:
    bound = math.log(threshold) if threshold > 0 else -math.inf
    return hidden & ((old.detach() >= bound) | decided)


def _total(
    logp: Tensor, old: Tensor, ref: Tensor | None, advantages_B: Tensor, kept: Tensor, epsilon: float, beta: float
) -> Tensor:
    terms = token_terms(logp, old, ref, advantages_B[:, None], kept, epsilon=epsilon, beta=beta)
    return (terms / kept.sum(-1, keepdim=True).clamp(min=1)).sum()


def rldf_objective(*, epsilon: float = 0.2, beta: float = 0.01, threshold: float = 0.6) -> Objective:
    """`rldf` for the engine, on plans of law `trace`; a sample's step is the earliest of its scored tokens'.

    Its denominator is the number of pairs (sequence, state) with a token. Entries: "advantages" `[B]`; "old_logp"
    `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0. Raises ValueError for plans of another law.
    """
    _check_options(epsilon, beta, threshold)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        if plan.law != "trace" or plan.rows.state is None:
            raise ValueError(f"plan must be of law 'trace' for rldf, got {plan.law!r}")
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, ref_KBS = old_and_reference(batch, logp_KBS)
        step_KBS = plan.dense(plan.rows.state.double()).masked_fill(~plan.scored, math.inf)
        kept_KBS = _kept(old_KBS, plan.scored, step_KBS == step_KBS.amin(-1, keepdim=True), threshold)
        return _total(logp_KBS, old_KBS, ref_KBS, batch.per_sequence["advantages"], kept_KBS, epsilon, beta)

    return Objective(
        name="rldf",
        contributions=contributions,
        coupling="sample",
        on_policy_coupling="sample",  # which tokens count is read from the current policy
        denominator="steps",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp", "ref_logp") if beta > 0 else ("old_logp",),
        scale=None if beta > 0 else "advantages",
    )


def weighted_steps(
    surprise_BT: Tensor, k: int, *, temperature: float = 1.0, seed: int = 0, sequence_ids: Tensor | None = None
) -> Tensor:
    """k steps of each sequence, int64 `[B, k]`, -1 where it has fewer, drawn without replacement by `softmax(surprise / T)`.

    By the k largest of `surprise / T` plus Gumbel noise, keyed by seed and sequence_ids (masking_strategy.py, lines 200-360,
    draws by `multinomial`, and fills up with repeated steps where there are fewer).

    Args:
        surprise_BT: float `[B, T]`, the mean of -log p of the tokens that each step decided; NaN where it decided none.
        temperature: above 0; inf draws uniformly, and 0 takes the k most surprising steps.
        sequence_ids: int64 `[B]`; needed unless temperature is 0.

    Raises TypeError or ValueError naming the argument.

    Example:
        >>> weighted_steps(torch.tensor([[0.1, 0.9, 0.5]]), 2, temperature=0.0)
        tensor([[1, 2]])
    """
    checks.dtype("surprise_BT", surprise_BT, [torch.float32, torch.float64])
    checks.shape("surprise_BT", surprise_BT, [None, None])
    checks.count("k", k)
    if not (isinstance(temperature, (int, float)) and temperature >= 0):
        raise ValueError(f"temperature must be at least 0, got {temperature!r}")
    there_BT = ~surprise_BT.isnan()
    value_BT = torch.where(there_BT, surprise_BT.double(), 0.0)
    if temperature > 0:
        if sequence_ids is None:
            raise ValueError("sequence_ids must be given where temperature is above 0: they key the draws, got None")
        checks.shape("sequence_ids", sequence_ids, [len(surprise_BT)])
        zeros_B = torch.zeros_like(sequence_ids)
        noise_BT = noise.gumbel(noise.row_bits(seed, Stream.LEVEL, sequence_ids, zeros_B, zeros_B), surprise_BT.shape[1])
        value_BT = value_BT / temperature + noise_BT
    value_BT = value_BT.masked_fill(~there_BT, -math.inf)
    order_BT = value_BT.argsort(dim=-1, descending=True, stable=True)
    chosen_BK = torch.where(there_BT.gather(1, order_BT), order_BT, -1)[:, :k]
    return torch.nn.functional.pad(chosen_BK, (0, max(0, k - surprise_BT.shape[1])), value=-1)


@dataclass(frozen=True)
class Options:
    """Of the loss, and of the choice of states."""

    epsilon: float = 0.2
    beta: float = 0.01
    threshold: float = 0.6  # probability from which a hidden token counts
    selected_steps: int = 4  # states of each rollout
    temperature: float = 1.0  # of their choice by surprise

    def __post_init__(self) -> None:
        checks.count("selected_steps", self.selected_steps)
        checks.number("temperature", self.temperature, least=0)


def _weighted_states(rollout: Rollout, options: Options, seed: int) -> States:
    """All hidden tokens of the drawn states, each with its own step; the states see the tail as the rollout did."""
    completion_BS, step_BS = rollout.completion_mask_BS, rollout.step_map_BS
    eos = rollout.settings.get("eos_id")
    counts_BS = completion_BS if eos is None else completion_BS & ~eos_tail(rollout.ids_BS, completion_BS, eos)
    inside_BL = rollout.place_BL & counts_BS.gather(1, rollout.column_BL)
    committed_BL = torch.where(inside_BL, rollout.commit_step_BL, -1)
    surprise_TB = step_entropy(-rollout.commit_logp_BL, committed_BL, steps=rollout.masked_entropy_BT.shape[1])
    k, temperature, ids_B = options.selected_steps, options.temperature, rollout.sequence_ids_B
    steps_BJ = weighted_steps(surprise_TB.t(), k, temperature=temperature, seed=seed, sequence_ids=ids_B)
    before_BJS = steps_BJ[:, :, None].expand(-1, -1, step_BS.shape[1])
    shown_BJS = rollout.states(torch.where(before_BJS < 0, torch.iinfo(torch.int64).max, before_BJS))
    hidden_BJS = (shown_BJS == rollout.mask_id) & (step_BS >= 0)[:, None]
    plan = plan_of_states(
        rollout,
        "trace",
        seed=seed,
        prompt_noise=0.0,
        shown_BKS=shown_BJS,
        event_steps_BKS=torch.where(hidden_BJS & completion_BS[:, None], step_BS[:, None], -1),
        event_ids_BKS=rollout.ids_BS[:, None].long().expand(hidden_BJS.shape),
    )
    return States(rollout, plan, steps_BJ, replayed=False)


RECIPE = Recipe(
    name="rldf",
    title="RLDF: Reinforcement Learning from Denoising Feedback",
    arxiv="2605.25638",
    status="verified against the code",
    objective=rldf_objective,
    law="trace",
    law_options={},
    samples=None,
    advantage="std",
    needs_old=True,
    needs_reference=True,
    inner_iterations=1,
    options=Options,
    trajectory=Trajectory(
        _weighted_states,
        lambda options, length, steps: -(-length // 2),
        lambda options, length, steps: min(options.selected_steps, steps),
    ),
    window="eos",
    blocks=False,
    tail="hidden",
    notes="The code was read, of the paper the abstract. Its REINFORCE form of a single inner iteration has the gradient of the "
    "ratio. `loss_norm` is its default 'sample'; the LLaDA runs divide by the tokens of a batch's i-th states. Groups of 4, "
    "learning rate 1e-6, 256 tokens, temperature 1; states of edited rollouts are those of the last events.",
)
