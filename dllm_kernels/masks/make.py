"""`make_mask_plan`: from ids, a law and a seed to a checked `MaskPlan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks, noise
from dllm_kernels.masks import blocks, given_masks, given_states, laws
from dllm_kernels.masks.laws import Law
from dllm_kernels.masks.plan import MaskPlan, check_tensors, noise_stride
from dllm_kernels.masks.tails import eos_tail


def make_mask_plan(
    input_ids_BS: Tensor,
    completion_mask_BS: Tensor,
    *,
    law: str,
    samples: int | None,
    seed: int,
    sequence_ids: Tensor,
    mask_id: int,
    shift: int = 0,
    prompt_noise: float | None = None,
    iteration: int = 0,
    attention_mask_BS: Tensor | None = None,
    eos_id: int | None = None,
    tail: str | None = None,
    causal_block: int | None = None,
    block_origin: str = "sequence",
    edge: str = "clean",
    **options: Any,
) -> MaskPlan:
    """Plan `samples` masks of each sequence's completion.

    Args:
        input_ids_BS: clean ids, int `[B, S]`.
        completion_mask_BS: bool `[B, S]`, the tokens that may be hidden and scored; neither prompt nor
            padding.
        law: see below. samples: K; None where a trace or segments determine it.
        seed: 32-bit key word; equal seeds and sequence ids give equal masks everywhere.
        sequence_ids: int64 `[B]` from `noise.sequence_ids`, distinct.
        mask_id: the id written at hidden positions; must not occur in the completions.
        shift: 1 where position i is predicted by row i - 1 (Dream), else 0.
        prompt_noise: probability of hiding each prompt token, which is never scored; drawn for each sample, but once for all
            states of `trace` and `segments`. None: 0.15 for `full`, `block` and `segments`, else 0.
        iteration: inner iteration; the samples of different iterations are independent.
        attention_mask_BS: bool or int `[B, S]`, False at padding. Without it, every token before the
            completion counts as prompt.
        eos_id: None scores whole completions with their EOS tail. Given, tokens after the first EOS are never
            scored, and lengths and weights leave them out.
        tail: what the model sees of those tokens: "shown", as they are; "hidden", as the law hides the others
            where it draws each token by itself (`coupled`, `bernoulli`, DMPO's pairs) or follows steps, else
            always; "removed", nothing: they are padding of the plan, and the caller leaves them out of the
            model's attention mask (`masks.tails.eos_tail` finds them); `accumulate`, `score_samples` and
            `estimate_elbo` refuse a mask that shows them, a loop of your own asks `masks.tails.check_removed`.
            None: the law's own, "hidden" for `full`, `block`, `trace` and `segments`, "shown" for the others.
        causal_block: b, the block length of a block-causal model (SDAR, LLaDA2, Fast-dLLM v2, BD3-LM), which
            denoises a block given the clean blocks before it; None for a bidirectional one. Every law below is
            then drawn for each block, with the L, n and t of the block in its weight, and `unbiased` refers to
            the sum over blocks of their ELBOs given clean blocks before (arXiv 2503.09573, eq. 8). The model is
            called on `plan.layout(k)`, never on `noisy_ids` alone. Not for `block`; the prompt stays clean.
        block_origin: where blocks begin: "sequence", with the first real token (SDAR, LLaDA2); "completion",
            with the first token of the completion, the grid going on to the left (dLLM-RL).
        edge: with shift, the row that predicts the first token of a block: "clean", of the clean copy, or
            "noisy", of the noisy one (dFactory's shifted branch).
        options: of the law; any other is an error.

    Laws (L scorable tokens, n of them hidden in a sample; the score of a sequence is the mean over its K
    samples unless stated otherwise; `unbiased` refers to `ELBO = sum_{n=1..L} (1/n) E_{|m|=n} sum_{l in m}
    log p(y_l | y^m)`):

        bernoulli   each token with probability t ~ U(t_min, 1], or with the `t` given; weight 1/t, unbiased
                    but for t_min. weight="L/count": biased, L / (L + 1) times the ELBO. (LLaDA, arXiv
                    2502.09992, eq. 3)
        exact       n ~ U{1..L}, stratified over the samples or pairing="independent"; L/n; unbiased. (LLaDA
                    eq. 6, BGPO)
        exact_zero  n ~ U{0..L}, same; (L+1)/n, 0 for n = 0; unbiased. (ESPO, arXiv 2512.03759)
        antithetic  pairs: such a mask, then its complement with weight (L+1)/(L-n); unbiased. weight="dmpo":
                    Bernoulli with t ~ U(t_min = 0.1, 1] and L/count; biased. K even. (ESPO; DMPO, arXiv
                    2510.08233)
        coupled     all tokens, then pairs of Bernoulli(t) and its complement, t ~ U(t_low = 0.2, t_high =
                    0.8) or given, of weights 1/t, 1/(1-t); half the first plus the mean half-sum of a pair:
                    no ELBO, DiffuCoder's score summed over tokens. K odd. (arXiv 2506.20639)
        quadrature  Gauss-Legendre `nodes` (1..5) t with weights w on [0, 1], K / nodes masks of int(t L)
                    tokens at each (counts="round": rounded half up); w/t, or weight="wL/count"; summed over
                    nodes; biased, nodes without a token contribute 0. Sample k belongs to node k mod nodes.
                    (GDPO, arXiv 2510.08554)
        full        all tokens; 1; no ELBO. (d1, arXiv 2504.12216; wd1, arXiv 2507.08838)
        block       one block of `block_length` = 32 tokens, from a random order of the blocks: n ~ U{1..its
                    size} of it, all later tokens, earlier ones as the prompt; all hidden tokens are scored; 1
                    / their number; no ELBO. (SPG, arXiv 2510.09541)
        trace       the states of a rollout: `step_map_BS` (int64, the step that committed each token, -1
                    outside). Sample s hides the tokens of steps >= s, scores those of step s; 1; the score is
                    the sum. `steps_BJ` (int64, -1 none) picks steps; `shrink` merges that many consecutive
                    steps. With causal_block, sample r is the r-th distinct step of each block, `steps_BJ` picks
                    rows, `shrink` merges within a block. In place of a step map, events: `shown_BKS`, the ids
                    (any, int64) that each sample shows, `event_steps_BKS`, the step of what it scores, -1
                    nothing, and `event_ids_BKS`, what that step wrote. (TraceRL, arXiv 2509.06949; EGSPO)
        segments    the same for `segments` = N parts of T = `total_steps` steps (default: the sequence's own
                    last + 1): part k begins with step k T // N; each is scored in its first state. (d2, arXiv
                    2509.21474)
        given       masks drawn by another loop: `masked_KBS`, bool `[K, B, S]`, the completion tokens that
                    each sample hides and scores; `weight_KB`, `[K, B]`, default 1. No noise of ours is used. With
                    causal_block also `weight_KBS`, one weight of each block at the tokens it hides.

    Raises ValueError or TypeError naming the argument.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> completion = torch.tensor([[False, True, True, True]])
        >>> plan = make_mask_plan(ids, completion, law="exact", samples=3, seed=0,
        ...                       sequence_ids=torch.tensor([1]), mask_id=9)
        >>> sorted(plan.counts[:, 0].tolist())
        [1, 2, 3]
    """
    given_law = law == given_masks.LAW.name
    rule, options = (given_masks.LAW, options) if given_law else laws.resolve(law, options)
    checks.count("shift", shift, 0)
    checks.count("iteration", iteration, 0)
    checks.count("mask_id", mask_id, 0)
    noise.check_seed(seed)
    if prompt_noise is None:
        prompt_noise = rule.prompt_noise if causal_block is None else 0.0
    prompt_noise = checks.number("prompt_noise", prompt_noise, least=0)
    if prompt_noise > 1.0:
        raise ValueError(f"prompt_noise must be in [0, 1], got {prompt_noise}")
    check_tensors(input_ids_BS, completion_mask_BS, sequence_ids, attention_mask_BS)
    if checks.may_read(input_ids_BS):
        _check_values(input_ids_BS, completion_mask_BS, sequence_ids, attention_mask_BS, mask_id, shift)
    _check_blocks(rule, causal_block, block_origin, edge, prompt_noise, shift)
    if tail is not None:
        checks.choice("tail", tail, laws.TAILS)
        if eos_id is None or given_law:
            raise ValueError(f"tail must be None without eos_id and with law='given', whose masks say it, got {tail!r}")
    given = completion_mask_BS
    tail_BS = None
    if eos_id is not None:
        tail_BS = eos_tail(input_ids_BS, given, eos_id)
        completion_mask_BS = given & ~tail_BS
    removed_BS = tail_BS if tail == "removed" and causal_block is None else None
    prompt_BS = None
    if prompt_noise > 0.0:
        prompt_BS = (given.cumsum(-1) == 0) & given.any(-1, keepdim=True)
        if attention_mask_BS is not None:
            prompt_BS = prompt_BS & (attention_mask_BS != 0)
    block_BS = step_BS = None
    if causal_block is not None:
        real_BS = torch.ones_like(given) if attention_mask_BS is None else (attention_mask_BS != 0) | given
        if tail == "removed" and tail_BS is not None:
            real_BS, given = real_BS & ~tail_BS, completion_mask_BS
        block_BS = blocks.grid(real_BS, given, causal_block, block_origin)
        if shift and checks.may_read(given) and bool((given & (real_BS.cumsum(-1) <= shift)).any()):
            raise ValueError(f"completion_mask_BS must be False at the first {shift} real token(s), which no row predicts")
    fields: dict[str, Any] = {
        "input_ids_BS": input_ids_BS,
        "completion_mask_BS": completion_mask_BS,
        "sequence_ids_B": sequence_ids,
        "seed": seed,
        "mask_id": mask_id,
        "shift": shift,
        "iteration": iteration,
        "prompt_noise": prompt_noise,
        "prompt_mask_BS": prompt_BS,
        "removed_BS": removed_BS,
        "causal_block": causal_block,
        "block_origin": block_origin,
        "edge": edge,
        "block_BS": block_BS,
    }
    if given_law:
        return given_masks.make(fields, samples, **options)
    state_BS = state_BK = shown_BKS = step_BKS = target_BKS = None
    if rule.level == "steps" and any(options.get(name) is not None for name in given_states.EVENTS):
        shown_BKS, step_BKS, target_BKS = given_states.events(options, given)
        step_BKS = torch.where(completion_mask_BS[:, None], step_BKS, -1)  # not after the first EOS
        state_BK = torch.arange(shown_BKS.shape[1], device=given.device).expand(len(given), -1)
    elif rule.level == "steps" and block_BS is not None and causal_block is not None:
        state_BS, state_BK, step_BS = given_states.in_blocks(law, options, completion_mask_BS, block_BS, causal_block, samples)
    elif rule.level == "steps":
        state_BS, state_BK = given_states.states(law, options, given, samples)
    if state_BK is not None:
        tail_BS = None if state_BS is None else (state_BS >= 0) & ~completion_mask_BS
        options = {name: value for name, value in options.items() if name not in given_states.TENSORS}
        samples = state_BK.shape[1]
    samples = checks.count("samples", samples)
    laws.check_samples(rule, options, samples)
    if samples > (stride := noise_stride(rule, samples)) or (iteration + 1) * stride > 1 << 32:
        raise ValueError(f"samples and iteration must number at most 2^32 noise samples, got {samples} and {iteration}")
    return MaskPlan(
        **fields,
        sample_K=torch.arange(samples, device=input_ids_BS.device),
        law=law,
        options=options,
        samples=samples,
        tail_mask_BS=tail_BS if (tail or rule.tail) == "hidden" else None,
        state_BS=state_BS,
        state_BK=state_BK,
        step_BS=step_BS,
        shown_BKS=shown_BKS,
        step_BKS=step_BKS,
        target_BKS=target_BKS,
    )


def _check_blocks(rule: Law, causal_block: int | None, block_origin: str, edge: str, prompt_noise: float, shift: int) -> None:
    checks.choice("block_origin", block_origin, blocks.ORIGINS)
    checks.choice("edge", edge, blocks.EDGES)
    if causal_block is None:
        if block_origin != "sequence" or edge != "clean":
            raise ValueError(f"causal_block must be given with block_origin={block_origin!r} and edge={edge!r}, got None")
        return
    checks.count("causal_block", causal_block)
    if rule.level == "block":
        raise ValueError(
            f"law must be another than {rule.name!r} with causal_block={causal_block}: it hides all later blocks and noises "
            "earlier ones, which a block-causal model never sees"
        )
    if prompt_noise > 0:
        raise ValueError(f"prompt_noise must be 0 with causal_block={causal_block}, whose prompts are clean, got {prompt_noise}")
    if edge == "noisy" and not shift:
        raise ValueError("edge must be 'clean' with shift=0, where each row predicts its own token, got 'noisy'")


def _check_values(
    input_ids_BS: Tensor,
    completion_mask_BS: Tensor,
    sequence_ids: Tensor,
    attention_mask_BS: Tensor | None,
    mask_id: int,
    shift: int,
) -> None:
    if bool(completion_mask_BS[:, :shift].any()):
        raise ValueError(
            f"completion_mask_BS must be False at the first {shift} position(s) when shift={shift}, which no row predicts"
        )
    if attention_mask_BS is not None and bool((completion_mask_BS & (attention_mask_BS == 0)).any()):
        raise ValueError("completion_mask_BS must be False at padding, where attention_mask_BS is")
    if bool(((input_ids_BS == mask_id) & completion_mask_BS).any()):
        raise ValueError(f"input_ids_BS must not hold mask_id={mask_id} where completion_mask_BS is True")
    if len(torch.unique(sequence_ids)) != len(sequence_ids):
        raise ValueError("sequence_ids must be distinct: equal ids would share their noise")
