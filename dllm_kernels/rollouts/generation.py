"""`generate`: rollouts of a masked diffusion model without logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks, noise
from dllm_kernels.model.headless import Body, context_length, dropout_names, headless
from dllm_kernels.model.kept import KINDS, Kept, check_kept
from dllm_kernels.model.layouts import (
    Cached,
    Lengths,
    Packed,
    Padded,
    Prompts,
    Shadowed,
    causal_block,
    lengths_of,
    takes,
    takes_cache,
)
from dllm_kernels.model.sharding import Shards
from dllm_kernels.rollouts import canvas, running
from dllm_kernels.rollouts.denoising import Decoding, Denoiser, OnStep
from dllm_kernels.rollouts.events import Events
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.samplers import Sampler, check_steps, resolve

__all__ = ["Rollout", "generate"]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor | Sequence[Tensor],
    *,
    length: int | Sequence[int] | None,
    mask_id: int,
    sampler: str = "llada",
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    suppress: Sequence[int] = (),
    suppress_mask: bool = True,
    commit_last: Sequence[int] = (),
    guidance: float = 0.0,
    shift: int = 0,
    eos_id: int | None = None,
    micro_batch: int | None = None,
    deterministic: bool = False,
    width: int | None = None,
    packed: bool = False,
    cache: bool | str = False,
    refresh: int | None = None,
    greedy: bool = False,
    on_step: OnStep | None = None,
    **options: Any,
) -> Rollout:
    """Fill what is undecided: one model call per denoising step, the head on candidate rows only.

    Args:
        model: a Hugging Face masked language model in eval mode.
        prompt_ids: int64 `[B, P]`, all of one length, or left-padded with attention_mask `[B, P]`; or a
            sequence of int64 `[P_b]`, padded on the right, which leaves positions as in the prompt alone.
        length: tokens to generate after each prompt, an int or a list with one for each. None: prompts are
            canvases (`rollouts.canvas.make_canvas`), whose mask_id places, anywhere, are filled; a block is then
            of consecutive places, not columns, and the last may be short. mask_id: marks undecided places;
            never drawn unless suppress_mask=False (parity with LLaDA's own code).
        sampler, steps, block_length, options: see below; an option of another sampler is an error. Where length
            is not one int, `steps` of a sampler with blocks are those of a block, at most block_length, so that
            what a sequence gets does not depend on the longest of the batch.
        temperature: 0 greedy, else Gumbel-max. top_k, top_p: as in `sample_tokens`.
        seed, sequence_ids: int64 `[B]`, distinct: the noise key of each sequence; required if noise is drawn.
        suppress: more ids with probability 0. commit_last: ids (EOS, EoT) to commit last, whatever their
            confidence.
        guidance: classifier-free, `z + guidance (z - z without prompt)`; doubles the rows of a call.
        shift: 1 where position i is predicted by row i - 1 (Dream), else 0.
        eos_id: if given, a sequence ends with the block of its first EOS (`dream`: as soon as nothing before
            one is undecided), and the rest is filled with EOS.
        micro_batch: sequences per model call. As one finishes the next enters, each at a step of its own (with
            a cache, or where all take the same steps, in rounds). With `deterministic` calls are filled up, so
            all have the same shape and a sequence has the same bits in any company. width: columns of ragged
            prompts (and their lengths, or canvases), for the same purpose.
        packed: all sequences in one row without padding, for ragged prompts (with flash-attn's
            variable-length kernel if the model uses flash-attn).
        cache: True: keep keys and values of finished blocks; for block-causal models that take
            `past_key_values`, with a sampler of the sequence's own blocks; exact. "prefix" or "dual" (Fast-dLLM,
            arXiv 2505.22618): for bidirectional models, with a sampler whose blocks divide the completion; keys
            and values of what lies before the active block, or on both sides of it, stay as the block's first
            step made them. An approximation, which the rollout records (`stale_at`).
        refresh: with those, compute everything every so many steps of a block; 1 is exact, None once a block.
        greedy: also return `greedy_BTL`, the likeliest completion before each step (EGSPO-SA), from the same
            passes; the head then runs on all masked rows.
        on_step: called with the step's number and the completions so far `[B, L]` after each step.

    Samplers (a block is `block_length` consecutive tokens, decided before the next block begins):

        llada          blocks, which must divide the length; `steps` in all, a multiple of the blocks,
                       remainders to the earliest steps of a block. remasking="low_confidence" (probability of
                       the token drawn, at temperature 1) or "random". renormalise=True: that probability is
                       among the ids not in commit_last (LLaDA's confidence_eos_eot_inf at temperature 0).
        roar           blocks as for llada; a token a step in random order (DMPO): the sum of `commit_logp_BL` is
                       the exact log-probability of the completion given its order.
        dream          no blocks; `steps` along t from 1 to eps=1e-3. alg="origin" (each token with
                       probability 1 - s/t), "maskgit_plus", "topk_margin", "entropy", all of the distribution
                       that is drawn from; alg_temp > 0 draws the order instead of sorting it. Use shift=1 for
                       Dream's own models. alg="confidence_threshold" (Fast-dLLM): of the surest tokens that an
                       even schedule has asked for so far, those of probability threshold=0.9 or more, at least
                       one; for as many steps as it takes.
        fast_dllm      blocks as for llada; a step commits every token of probability threshold=0.9 or more,
                       at least one. With factor=f instead: the n surest, n as large as their probabilities
                       allow, 1 - f / (n + 1) of the n-th (where all but one are sure enough, that one too).
        fast_dream     blocks as for llada; a step decides a block's first token alone, then alg=
                       "confidence_threshold" (as fast_dllm, of what is drawn from; threshold=0.9) or "entropy"
                       (dream's, along t in each block of `steps` / blocks steps). With shift=1 and a cache,
                       Fast-dLLM's loops for Dream.
        sdar           blocks count from the start of the prompt, so the first may hold some of it; the last is
                       generated to its end, and what lies beyond `length` is kept in the rollout, unscored;
                       `steps` per block. remasking="low_confidence_dynamic" (all above threshold=0.85, at
                       least what the schedule says), "low_confidence_static", "sequential" or
                       "entropy_bounded" (as entropy_bound, with bound=0.1 and no steps); probabilities of the
                       distribution that is drawn from. (The published loop overwrites decided tokens
                       where a schedule asks for more than are left; here it takes those that are left.)
        llada2         blocks as for sdar; a step commits every token of probability above threshold=0.95, at
                       least one (LLaDA2.0). With editing_threshold (LLaDA2.1: 0.9) it also replaces decided
                       tokens of the active block by others of a probability above it, and a block ends when
                       no mask is left and nothing was edited, or after max_post_steps=16 steps without a mask.
        entropy_bound  blocks as for llada; of the surest tokens as many as keep their cumulated entropy, less
                       the largest, within bound=0.1 nats, at least one.
        rcr            blocks as for llada, with `steps`; a step draws all masks, then hides the least trusted of
                       all tokens so far again, as many as the (linear) schedule leaves. alg="maskgit_plus",
                       "topk_margin" or "entropy": trust, when a token was last drawn (MDPO).
        wino           blocks as for llada; a step commits every token of probability above threshold=0.6 (0.7
                       of the masks at most, but 5 to 20; one at least) and takes back decided tokens of the
                       block that a copy of it made of masks gives less than threshold_back=0.9, fewer than the
                       step before committed. Needs a model that takes 4-d masks and position_ids.
        remdm          no blocks; `steps` along t from 1 to eps=1e-5, at which tokens are decided and taken back by
                       chance, then one for what is left, greedily. strategy="cap" (taken back with probability
                       eta=0.02, as far as alpha allows), "rescale" (eta times what alpha allows), "conf" (what
                       alpha allows, shared out by softmax of minus the confidence) or "loop" (eta between t_on=0.55
                       and t_off=0.05, at level alpha_on=0.9).

    The last three take tokens back: `Rollout.events` tells, states are replayed from them, and a taken-back
    token is scored nowhere. Noise depends on (seed, sequence id, step, position) only. `llada`, `roar` and
    `dream` by rank, with equal lengths and without eos_id, never synchronise with a GPU; other samplers do
    before each step, eos_id after each block.
    Sequences with hidden states that are not finite are marked in `failed_B` and do not affect the others
    (except packed without flash-attn, where attention spans the row and the whole row is marked).

    Raises ValueError or TypeError naming the argument.

    Example:
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> rollout = generate(model, torch.tensor([[1, 2, 3]]), length=4, steps=2, block_length=4,
        ...                    mask_id=10)
        >>> rollout.completion_BL.shape, sorted(rollout.commit_step_BL[0].tolist())
        (torch.Size([1, 4]), [0, 0, 1, 1])
    """
    prompts, holes = canvas.check(prompt_ids, attention_mask, mask_id, width, length)
    B = len(prompts.ids_BP)
    resolved = resolve(sampler, options)
    longest = int(holes.lengths_B.max()) if holes is not None else checks.count("length", length)
    asked = steps
    if holes is not None:
        steps = canvas.all_steps(resolved, longest, steps, block_length)
    steps, block_length = check_steps(resolved, longest, steps, block_length, whole=holes is None)
    if holes is not None:
        canvas.check_options(prompts, holes, resolved, shift=shift, eos_id=eos_id, cache=cache)
    checks.count("shift", shift, 0)
    checks.number("temperature", temperature, least=0)
    checks.number("guidance", guidance, least=0)
    noise.check_seed(seed)
    if shift and checks.may_read(prompts.ids_BP) and (shortest := int(prompts.lengths_B.min())) < shift:
        raise ValueError(f"prompt_ids must have at least {shift} token(s) when shift={shift}, got {shortest}")
    sequence_ids = _check_sequence_ids(sequence_ids, prompts.ids_BP, drawn=temperature > 0 or resolved.stochastic)
    if active := dropout_names(model):
        raise ValueError(
            f"model must be deterministic in a rollout, but dropout is active: {', '.join(active[:3])}; call model.eval()"
        )
    if commit_last and resolved.rank in ("random", "position"):
        kind = next((resolved.options[name] for name in ("remasking", "alg") if name in resolved.options), sampler)
        raise ValueError(f"commit_last must be empty with {kind!r} order, which looks at no token, got {list(commit_last)}")
    if eos_id is not None and resolved.take_back is not None:
        raise ValueError(f"eos_id must be None for sampler={sampler!r}, which may take an EOS back, got {eos_id}")
    if resolved.take_back == "verified" and (shift or guidance or packed):
        raise ValueError(
            f"shift, guidance and packed must be left out for sampler={sampler!r}, whose copies of a block have none"
        )
    if packed and (guidance or cache or deterministic):
        raise ValueError("packed must be False with guidance, cache or deterministic, whose rows are padded")
    if packed and not prompts.ragged:
        raise ValueError("packed takes ragged prompts: give prompt_ids as a sequence of int64 [P_b]")
    kept = _check_cache(cache, refresh, resolved, model, greedy=greedy)
    if cache is True and (resolved.blocks != "sequence" or greedy):
        raise ValueError("cache takes a sampler whose blocks are those of the prompt, such as 'sdar', with greedy=False")
    if resolved.blocks == "sequence" and causal_block(model) not in (None, block_length):
        raise ValueError(f"block_length must be the model's {causal_block(model)} for sampler={sampler!r}, got {block_length}")
    micro_batch = B if micro_batch is None else checks.count("micro_batch", micro_batch)
    of_blocks = block_length if resolved.blocks == "sequence" else None
    lengths = lengths_of(prompts, longest, of_blocks, fixed=deterministic) if holes is None else holes
    # sequences that are in step and end together need no queue
    in_rounds = kept or cache is True
    in_step = not lengths.ragged and (resolved.blocks is None or longest % block_length == 0)
    static = resolved.static and in_step and (eos_id is None or (resolved.blocks is not None and micro_batch >= B))
    blocks = -(-longest // block_length) if resolved.blocks == "completion" else 1

    with headless(model) as body:
        _check_model(body, lengths.columns, mask_id, guidance, eos_id=eos_id, commit_last=commit_last, cache=cache is True)
        if kept:
            check_kept(body, "cache")
        if resolved.take_back == "verified" and not takes(body, "position_ids"):
            raise ValueError(
                f"sampler must be another than {sampler!r} for {type(body.model).__name__}, which takes no position_ids"
            )
        if body.shards is not None and not _alike(body.shards, static, longest):
            static = False  # such ranks ask no other before a call or at the end, and queues would wait for them
        per_round = micro_batch if static or in_rounds else B
        rounds = -(-B // per_round)
        idle, uneven = 0, False
        if body.shards is not None:  # ranks that share the model must call it equally often
            idle = body.shards.most(rounds) - rounds
            uneven = bool(body.shards.most(idle))
        decoding = Decoding(
            sampler=resolved,
            length=longest,
            steps=steps,
            block_length=block_length,
            mask_id=mask_id,
            seed=seed,
            temperature=float(temperature),
            top_k=top_k,
            top_p=top_p,
            suppress=(*suppress, mask_id) if suppress_mask else tuple(suppress),
            commit_last=tuple(commit_last),
            eos_id=eos_id,
            deterministic=deterministic,
            greedy=greedy,
            uneven=uneven,
            static=static,
            slots=micro_batch,
            steps_of_block=None if steps is None else steps // blocks,
        )
        parts = []
        for b in range(0, (rounds + idle) * per_round, per_round):
            span = torch.arange(min(b, B), min(b + per_round, B), device=sequence_ids.device)
            # filled up with copies that are dropped
            if deterministic and (static or in_rounds) and 0 < len(span) < micro_batch:
                span = torch.nn.functional.pad(span, (0, micro_batch - len(span)), value=b)
            part, of_part = prompts.part(span), lengths.part(span)
            layout: Padded | Packed | Cached
            if kept:
                layout = Kept(
                    body,
                    part,
                    of_part,
                    mask_id,
                    block_length,
                    str(cache),
                    refresh,
                    shift=shift,
                    guidance=guidance,
                    opening=resolved.opening,
                )
            elif cache is True:
                layout = Cached(body, part, of_part, mask_id, block_length, shift=shift, guidance=guidance)
            elif resolved.take_back == "verified":
                layout = Shadowed(body, part, of_part, mask_id, block_length)
            elif packed:
                layout = Packed(body, part, of_part, mask_id, shift)
            else:
                layout = Padded(body, part, of_part, mask_id, shift, guidance=guidance)
            denoiser = Denoiser(layout, sequence_ids[span], part.lengths_B, of_part, decoding)
            running.run(denoiser, on_step)
            parts.append(denoiser)
    settings = {
        "sampler": sampler,
        "length": longest,
        "steps": steps if asked is None else asked,
        "block_length": block_length,
        "temperature": temperature,
        **resolved.options,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "suppress": list(suppress),
        "suppress_mask": suppress_mask,
        "commit_last": list(commit_last),
        "guidance": guidance,
        "shift": shift,
        "eos_id": eos_id,
        "cache": cache,
        "refresh": refresh,
        "causal_block": block_length if cache is True else causal_block(model),
    }
    return _assemble(parts, prompts, lengths, sequence_ids, mask_id, settings)


def _alike(shards: Shards, static: bool, longest: int) -> bool:
    """Whether all ranks that share the model take the same steps, known beforehand."""
    return shards.most(int(not static)) == 0 and shards.most(longest) == -shards.most(-longest)


def _check_cache(cache: bool | str, refresh: int | None, sampler: Sampler, model: nn.Module, *, greedy: bool) -> bool:
    """Whether keys and values are kept around the active block: not where everything is computed in each step."""
    if isinstance(cache, bool):
        if refresh is not None:
            raise ValueError(f"refresh must be None with cache={cache}, got {refresh}")
        return False
    checks.choice("cache", cache, KINDS)
    if refresh is not None:
        checks.count("refresh", refresh)
    if sampler.blocks != "completion" or sampler.take_back is not None or greedy:
        raise ValueError(
            f"cache={cache!r} takes a sampler whose blocks are the completion's and final, such as 'llada', with greedy=False"
        )
    if causal_block(model) is not None:
        raise ValueError(f"cache must be True or False for a block-causal model, whose finished blocks are final, got {cache!r}")
    return refresh != 1


def _check_sequence_ids(sequence_ids: Tensor | None, ids_BP: Tensor, *, drawn: bool) -> Tensor:
    B = len(ids_BP)
    if sequence_ids is None:
        if drawn:
            raise ValueError(
                "sequence_ids must be given where noise is drawn (temperature > 0, or the order of tokens by chance)"
            )
        return torch.arange(B, device=ids_BP.device)
    checks.dtype("sequence_ids", sequence_ids, [torch.int64])
    checks.shape("sequence_ids", sequence_ids, [B])
    checks.same_device("sequence_ids", sequence_ids, "prompt_ids", ids_BP)
    if checks.may_read(sequence_ids) and len(torch.unique(sequence_ids)) != B:
        raise ValueError("sequence_ids must be distinct: equal ids would share their noise")
    return sequence_ids


def _check_model(
    body: Body, columns: int, mask_id: int, guidance: float, *, eos_id: int | None, commit_last: Sequence[int], cache: bool
) -> None:
    for name, token in (("mask_id", mask_id), ("eos_id", eos_id), *(("commit_last", token) for token in commit_last)):
        if token is not None and not 0 <= token < len(body.parameter):
            raise ValueError(f"{name} must be in 0..{len(body.parameter) - 1}, got {token}")
    context = context_length(body.model)
    if context is not None and columns > context:
        raise ValueError(f"prompt_ids and length must fit the model's context of {context} tokens, got {columns}")
    if guidance and body.softcap is not None:
        raise ValueError(f"guidance must be 0 for a model whose logits are capped (softcap={body.softcap}), got {guidance}")
    if cache and not takes_cache(body):
        raise ValueError(f"cache must be False for {type(body.model).__name__}, which takes no past_key_values")


def _assemble(
    parts: list[Denoiser], prompts: Prompts, lengths: Lengths, sequence_ids: Tensor, mask_id: int, settings: dict[str, Any]
) -> Rollout:
    """Join the micro-batches into one rollout, in the layout of the prompts."""
    B, L, width = len(prompts.ids_BP), settings["length"], lengths.widest
    most = max(part.masked_entropy_BT.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[:B]

    written_BW, step_BW = joined("completion_BL"), joined("commit_step_BL")
    place_W = torch.arange(width, device=written_BW.device)
    column_BW = lengths.column_BL(prompts)
    there_BW = place_W < lengths.lengths_B[:, None]
    ids_BS = torch.nn.functional.pad(prompts.ids_BP, (0, width)).scatter(1, column_BW, torch.where(there_BW, written_BW, 0))
    mask_BS = torch.zeros_like(ids_BS, dtype=torch.bool).scatter(1, column_BW, there_BW & (place_W < L))
    keep_BS = overhang_step_BS = None
    if prompts.keep_BP is not None or lengths.ragged:
        keep_BP = torch.ones_like(prompts.ids_BP, dtype=torch.bool) if prompts.keep_BP is None else prompts.keep_BP
        keep_BS = torch.nn.functional.pad(keep_BP, (0, width)).scatter(1, column_BW, there_BW)
    if width > L:
        # tokens filled up after the end have no step of their own
        step_BW = torch.where(step_BW < 0, joined("steps_B")[:, None] - 1, step_BW.long())
        beyond_BW = there_BW & (place_W >= L)
        overhang_step_BS = torch.full_like(ids_BS, -1).scatter(1, column_BW, torch.where(beyond_BW, step_BW, -1))
    entropy_BT = torch.cat([_padded(part.masked_entropy_BT, most, torch.nan) for part in parts])[:B]
    greedy_BTL = None
    if all(part.greedy_BTL is not None for part in parts):
        greedy_BTL = torch.cat([_padded(part.greedy_BTL, most, mask_id) for part in parts if part.greedy_BTL is not None])[:B]
        greedy_BTL = greedy_BTL[:, :, :L]
    kept_age_BT = None
    if all(part.kept_age_BT is not None for part in parts):
        kept_age_BT = torch.cat([_padded(part.kept_age_BT, most, -1) for part in parts if part.kept_age_BT is not None])[:B]
    columns = lengths.columns
    # the events of a rollout without edits follow from its commits, without a look at a GPU
    simple = width == L and not any(part.superseded for part in parts)
    return Rollout(
        ids_BS=ids_BS[:, :columns],
        completion_mask_BS=mask_BS[:, :columns],
        commit_step_BL=joined("commit_step_BL")[:, :L],
        commit_logp_BL=joined("commit_logp_BL")[:, :L],
        commit_entropy_BL=joined("commit_entropy_BL")[:, :L],
        masked_entropy_BT=entropy_BT,
        steps_B=joined("steps_B"),
        failed_B=joined("failed_B"),
        sequence_ids_B=sequence_ids,
        mask_id=mask_id,
        attention_mask_BS=None if keep_BS is None else keep_BS[:, :columns],
        overhang_step_BS=None if overhang_step_BS is None else overhang_step_BS[:, :columns],
        recorded=None if simple else _events(parts, column_BW, joined).ordered(columns),
        greedy_BTL=greedy_BTL,
        kept_age_BT=kept_age_BT,
        settings=settings,
    )


def _events(parts: list[Denoiser], column_BW: Tensor, joined: Callable[[str], Tensor]) -> Events:
    """The last event of each token that a step wrote, and those that edits superseded."""
    step_BW = joined("commit_step_BL").long()
    sequence_E, place_E = (step_BW >= 0).nonzero(as_tuple=True)
    at = sequence_E, place_E
    last = [joined(name)[at] for name in ("old_BL", "completion_BL", "commit_logp_BL", "commit_entropy_BL")]
    found: list[tuple[Tensor, ...]] = [(sequence_E, step_BW[at], place_E, *last)]
    first = 0
    for part in parts:
        for who_E, *rest in part.superseded:
            found.append((who_E + first, *rest))
        first += len(part.steps_B)
    sequence_E, step_E, place_E, *values = (torch.cat(column) for column in zip(*found, strict=True))
    here_E = (sequence_E < len(column_BW)) & ~joined("failed_B")[sequence_E.clamp(max=len(column_BW) - 1)]
    events = Events(sequence_E, step_E, place_E, *values).at(here_E)
    return replace(events, position_E=column_BW[events.sequence_E, events.position_E])


def _padded(values: Tensor, steps: int, fill: float) -> Tensor:
    """`[B, T, ...]` padded to `steps` steps."""
    more = values.new_full((len(values), steps - values.shape[1], *values.shape[2:]), fill)
    return torch.cat([values, more], dim=1)
