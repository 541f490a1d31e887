"""What is read from a rollout: entropies, the choice of steps, and the states to score, as mask plans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks, noise
from dllm_kernels.masks import blocks
from dllm_kernels.masks.make import make_mask_plan
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.noise import Stream
from dllm_kernels.rollouts.rollout import Rollout

SELECTIONS = ("entropy", "uniform", "random")


def step_entropy(commit_entropy_BL: Tensor, commit_step_BL: Tensor, *, steps: int | None = None) -> Tensor:
    """`H_k = mean over the tokens that step k revealed of -sum_v p_v log p_v`, fp32 `[T, B]`, in nats (EGSPO,
    arXiv 2603.12554).

    Entropies are at temperature 1 before the step, as rollouts keep them. The published code stores whole
    probability rows over the vocabulary instead.

    Args:
        commit_entropy_BL: float `[B, L]`, `Rollout.commit_entropy_BL`. commit_step_BL: int32 or int64 `[B,
            L]`; -1 for tokens that no step revealed. steps: T; None takes the last step + 1, a host sync on a
            GPU.

    NaN where a step revealed no token of a sequence. Raises ValueError or TypeError naming the argument.

    Example:
        >>> step_entropy(torch.tensor([[1.0, 3.0, 0.5]]), torch.tensor([[0, 0, 1]]))
        tensor([[2.0000],
                [0.5000]])
    """
    checks.dtype("commit_entropy_BL", commit_entropy_BL, [torch.float32, torch.float64])
    checks.shape("commit_entropy_BL", commit_entropy_BL, [None, None])
    checks.dtype("commit_step_BL", commit_step_BL, [torch.int32, torch.int64])
    checks.shape("commit_step_BL", commit_step_BL, list(commit_entropy_BL.shape))
    checks.same_device("commit_step_BL", commit_step_BL, "commit_entropy_BL", commit_entropy_BL)
    if steps is None:
        steps = max(1, int(commit_step_BL.max()) + 1) if commit_step_BL.numel() else 1
    checks.count("steps", steps)
    checks.in_range("commit_step_BL", commit_step_BL, -1, steps)
    index_BL = commit_step_BL.long() + 1  # column 0: revealed by no step, and dropped
    total_BT = commit_entropy_BL.new_zeros(len(index_BL), steps + 1).scatter_add_(1, index_BL, commit_entropy_BL)
    count_BT = torch.zeros_like(total_BT).scatter_add_(1, index_BL, torch.ones_like(commit_entropy_BL))
    return (total_BT / count_BT)[:, 1:].t().float()


def select_steps(
    entropy_TB: Tensor, k: int, how: str = "entropy", *, seed: int = 0, sequence_ids: Tensor | None = None
) -> Tensor:
    """Each sequence's own k steps to train on, int64 `[B, k]` (EGSPO, arXiv 2603.12554; its code, lines
    675-715).

    Args:
        entropy_TB: `[T, B]` from `step_entropy`, NaN where there is no step.
        how: "entropy": the k largest, descending, ties to the earlier step; "uniform": spread evenly;
            "random": drawn uniformly, keyed by seed and sequence_ids `[B]`. The last two include the last
            step and are ascending.

    Filled with -1 where a sequence has fewer than k steps. Raises ValueError or TypeError naming the
    argument.

    Example:
        >>> select_steps(torch.tensor([[0.1], [0.9], [0.5]]), 2)
        tensor([[1, 2]])
    """
    checks.dtype("entropy_TB", entropy_TB, [torch.float32, torch.float64])
    checks.shape("entropy_TB", entropy_TB, [None, None])
    checks.count("k", k)
    checks.choice("how", how, SELECTIONS)
    entropy_BT = entropy_TB.detach().t()
    B, T = entropy_BT.shape
    there_BT = ~entropy_BT.isnan()
    if how == "entropy":
        value_BT = torch.where(there_BT, entropy_BT, -torch.inf)
        order_BT = value_BT.argsort(dim=-1, descending=True, stable=True)
        chosen_BK = torch.where(there_BT.gather(1, order_BT), order_BT, -1)[:, :k]
        return torch.nn.functional.pad(chosen_BK, (0, max(0, k - T)), value=-1)
    count_B1 = there_BT.sum(-1, keepdim=True)
    if how == "uniform":
        slot_K = torch.arange(1, k + 1, device=entropy_TB.device)
        few_BK = torch.where(slot_K <= count_B1, slot_K - 1, -1)
        rank_BK = torch.where(count_B1 >= k, slot_K * count_B1 // k - 1, few_BK)
    else:
        if sequence_ids is None:
            raise ValueError("sequence_ids must be given with how='random', whose draws are keyed by them, got None")
        checks.shape("sequence_ids", sequence_ids, [B])
        steps_T = torch.arange(T, device=entropy_TB.device)
        bits_BT = noise.row_bits(seed, Stream.LEVEL, sequence_ids[:, None], torch.zeros_like(steps_T), steps_T)
        rank_BT = torch.where(there_BT, there_BT.cumsum(-1) - 1, -1)
        drawn_BT = noise.smallest(bits_BT[None], (there_BT & (rank_BT < count_B1 - 1)), (count_B1.t() - 1).clamp(0, k - 1))[0]
        drawn_BT = drawn_BT | (there_BT & (rank_BT == count_B1 - 1))
        places_BT = torch.where(drawn_BT, steps_T, T).sort(dim=-1).values
        places_BT = torch.nn.functional.pad(places_BT, (0, max(0, k - T)), value=T)[:, :k]
        return torch.where(places_BT < T, places_BT, -1)
    order_BT = torch.where(there_BT, 0, 1).argsort(dim=-1, stable=True)  # existing steps, ascending
    return torch.where(rank_BK < 0, -1, order_BT.gather(1, rank_BK.clamp(min=0)))


def trajectory_rows(
    rollout: Rollout,
    steps_BJ: Tensor | None = None,
    *,
    shrink: int = 1,
    segments: int | None = None,
    shift: int | None = None,
    eos_id: int | None = None,
    causal_block: int | None = None,
    prompt_noise: float | None = None,
    score: str = "last",
) -> MaskPlan:
    """The states of a rollout and the tokens decided in each, as a `MaskPlan` with states as samples.

    Args:
        steps_BJ: int64 `[B, J]` from `select_steps`, -1 for none: only those steps (EGSPO). None: all steps.
        shrink: number of consecutive steps per state (TraceRL). segments: number of equal parts of the steps
            instead (d2; law "segments"), each scored in its first state.
        shift: 1 where position i is predicted by row i - 1; None takes the rollout's. eos_id: tokens after
            the first EOS are not scored; None takes that of the rollout. causal_block: the block length of a
            block-causal model, as in `make_mask_plan`; None takes that of the rollout, of whose settings it is
            one where the model is known to be block-causal. prompt_noise: probability of hiding a prompt token;
            None: 0.15 for segments, as published, and 0 for single or merged steps.
        score: "last": each token of the completion in the state before the event that last set it, an edited
            one from the row that shows what it replaced. "all_events": every event, also those that later
            edits superseded.

    Failed sequences cannot be scored: remove them first (`rollout.kept`). Raises ValueError or
    TypeError naming the argument.

    Example:
        >>> from dllm_kernels import generate
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> rollout = generate(model, torch.tensor([[1, 2, 3]]), length=4, steps=2, block_length=4,
        ...                    mask_id=10)
        >>> chosen = select_steps(step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL), 1)
        >>> trajectory_rows(rollout, chosen).counts
        tensor([[2]])
    """
    if not isinstance(rollout, Rollout):
        raise TypeError(f"rollout must be a Rollout, got {type(rollout).__name__}")
    if checks.may_read(rollout.failed_B) and bool(rollout.failed_B.any()):
        raise ValueError(
            f"rollout must not hold failed sequences, got {rollout.failed_B.nonzero()[:, 0].tolist()}; take them out"
        )
    if segments is not None and (steps_BJ is not None or shrink != 1):
        raise ValueError("segments must be None where steps_BJ or shrink is given: it cuts all steps")
    if steps_BJ is not None:
        checks.dtype("steps_BJ", steps_BJ, [torch.int64])
        checks.in_range("steps_BJ", steps_BJ, -1, rollout.masked_entropy_BT.shape[1])
    checks.choice("score", score, ("last", "all_events"))
    if causal_block is None:
        causal_block = rollout.settings.get("causal_block")
    events = score == "all_events" or rollout.edited
    if events and (segments is not None or shrink != 1):
        raise ValueError("segments and shrink must be left out where tokens were edited or all events are scored")
    options: dict[str, Any] = {"step_map_BS": rollout.step_map_BS}
    if events:
        options = event_states(rollout, causal_block, steps_BJ, last_only=score == "last")
    else:
        options |= {"shrink": shrink, "steps_BJ": steps_BJ} if segments is None else {"segments": segments}
    facts: dict[str, Any] = {"shift": shift, "eos_id": eos_id, "causal_block": causal_block, "prompt_noise": prompt_noise}
    return plan_of_states(rollout, "trace" if segments is None else "segments", **options, **facts)


def plan_of_states(rollout: Rollout, law: str, *, seed: int | None = None, **options: Any) -> MaskPlan:
    """`make_mask_plan` of states that `options` name, with what is true of the rollout where they do not say otherwise."""
    rollout.need_steps()
    settings = rollout.settings
    for name, usual in (("shift", 0), ("eos_id", None)):
        if options.get(name) is None:
            options[name] = settings.get(name, usual)
    return make_mask_plan(
        rollout.ids_BS,
        rollout.completion_mask_BS,
        law=law,
        samples=None,
        seed=settings.get("seed", 0) if seed is None else seed,
        sequence_ids=rollout.sequence_ids_B,
        mask_id=rollout.mask_id,
        attention_mask_BS=rollout.attention_mask_BS,
        **options,
    )


def trajectory_logp(rollout: Rollout, plan: MaskPlan, *, approximate: bool = False) -> Tensor:
    """Log-probs `[B, K]`, float64, of the tokens decided in each state of `trajectory_rows`, as seen by the rollout.

    The scores of the sampling policy without another pass over the model: `old_sample_elbo` of EGSPO. States
    must be single steps: with `shrink` or segments the rollout saw later states, which is a ValueError. So is a
    rollout with kept keys and values, whose log-probs are not those of the policy that is trained, unless
    `approximate` says that they are wanted as they are.

    Example:
        >>> from dllm_kernels import generate
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> rollout = generate(model, torch.tensor([[1, 2, 3]]), length=4, steps=2, block_length=4,
        ...                    mask_id=10)
        >>> trajectory_logp(rollout, trajectory_rows(rollout)).shape
        torch.Size([1, 2])
    """
    if rollout.approximate and not approximate:
        raise ValueError(
            f"rollout must be exact, got one of cache={rollout.settings.get('cache')!r}: as old scores its log-probs would put "
            "the cache's error into every ratio; score its states (score_samples), or pass approximate=True to see them"
        )
    if rollout.unscored:
        raise ValueError("rollout must have log-probs, got one whose engine did not tell them: see score_rollout")
    if plan.law != "trace" or plan.options["shrink"] != 1:
        raise ValueError(f"plan must be of law 'trace' with shrink=1, got {plan.law!r} with {dict(plan.options)}")
    return rollout_logp(rollout, plan).sum(-1, dtype=torch.float64).t()


def event_states(
    rollout: Rollout, causal_block: int | None, steps_BJ: Tensor | None, *, last_only: bool
) -> dict[str, Tensor | None]:
    """Options of law `trace` that score a rollout's events: sample r shows the r-th state of every block in which something is
    scored (without blocks, of the sequence).
    """
    ids_BS, events = rollout.ids_BS, rollout.events
    B, S = ids_BS.shape
    real_BS = torch.ones_like(rollout.completion_mask_BS) if rollout.attention_mask_BS is None else rollout.attention_mask_BS
    block_BS = torch.zeros_like(ids_BS)
    if causal_block is not None:
        block_BS = blocks.grid(real_BS.bool(), rollout.completion_mask_BS, causal_block, "sequence")
    at = events.sequence_E, events.position_E
    wanted_E = rollout.completion_mask_BS[at] & events.writes(rollout.mask_id)
    if last_only:
        wanted_E = wanted_E & events.last(ids_BS.shape)
    if steps_BJ is not None:
        wanted_E = wanted_E & (steps_BJ[events.sequence_E] == events.step_E[:, None]).any(-1)
    chosen = events.at(wanted_E)
    block_E = block_BS[chosen.sequence_E, chosen.position_E]
    # the rank of each step among those of its block
    found, group_E = torch.unique(torch.stack([chosen.sequence_E, block_E, chosen.step_E], 1), dim=0, return_inverse=True)
    new_G = torch.ones(len(found), dtype=torch.bool, device=ids_BS.device)
    new_G[1:] = (found[1:, :2] != found[:-1, :2]).any(-1)
    place_G = torch.arange(len(found), device=ids_BS.device)
    rank_G = place_G - torch.where(new_G, place_G, 0).cummax(0).values
    K, J = (int(rank_G.max()) + 1 if len(found) else 1), int(block_BS.max()) + 1
    step_BKJ = torch.full((B, K, J), -1, device=ids_BS.device)
    step_BKJ[found[:, 0], rank_G, found[:, 1]] = found[:, 2]
    # what has no state in a sample is shown as it ended
    before_BKS = step_BKJ.gather(2, block_BS.clamp(min=0)[:, None].expand(B, K, S))
    before_BKS = torch.where(before_BKS < 0, torch.iinfo(torch.int64).max, before_BKS)
    steps_BKS = torch.full((B, K, S), -1, device=ids_BS.device)
    written_BKS = torch.zeros_like(steps_BKS)
    goal = chosen.sequence_E, rank_G[group_E], chosen.position_E
    steps_BKS[goal], written_BKS[goal] = chosen.step_E, chosen.new_id_E
    shown_BKS = rollout.states(before_BKS)
    return {"shown_BKS": shown_BKS, "event_steps_BKS": steps_BKS, "event_ids_BKS": written_BKS}


def rollout_logp(rollout: Rollout, plan: MaskPlan) -> Tensor:
    """Log-probs `[K, B, S]` of a plan's scored tokens at their events, 0 elsewhere."""
    if plan.step_BKS is not None:
        events, steps_BKS = rollout.events, plan.step_BKS[:, plan.sample_K]
        logp_BKS = torch.zeros(steps_BKS.shape, dtype=events.logp_E.dtype, device=steps_BKS.device)
        for level in events.levels(rollout.ids_BS.shape):
            at = level.sequence_E, slice(None), level.position_E
            logp_BKS[at] = torch.where(steps_BKS[at] == level.step_E[:, None], level.logp_E[:, None], logp_BKS[at])
        return logp_BKS.transpose(0, 1)
    logp_BS = rollout.spread(rollout.commit_logp_BL, torch.zeros_like(rollout.ids_BS, dtype=rollout.commit_logp_BL.dtype))
    return torch.where(plan.scored, logp_BS, 0.0)
