"""Rollouts by LLaDA's block-wise remasking, without logits: the head sees only rows that may be committed in this step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks, noise
from dllm_kernels.heads import Body, dropout_names, headless
from dllm_kernels.noise import Stream
from dllm_kernels.sampling import sample_tokens

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class Rollout:
    """Completions and their history. `L` is the completion length, `P` the prompt length."""

    ids_BS: Tensor  # int64, prompt and completion
    commit_step_BL: Tensor  # int32, the denoising step at which each token was committed
    commit_logp_BL: Tensor  # its log-probability then, at temperature 1, nats
    commit_entropy_BL: Tensor  # entropy of its row then, nats
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def completion_BL(self) -> Tensor:
        return self.ids_BS[:, -self.commit_step_BL.shape[1] :]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor,
    *,
    length: int,
    steps: int,
    block_length: int,
    mask_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    suppress: Sequence[int] = (),
    suppress_mask: bool = True,
    remasking: str = "low_confidence",
    shift: int = 0,
    micro_batch: int | None = None,
) -> Rollout:
    """LLaDA's sampler (arXiv 2502.09992, semi-autoregressive remasking; github ML-GSAI/LLaDA generate.py, semantics only).

    The completion is cut into blocks; each block has `steps / blocks` steps and commits a fixed number of its masked
    tokens per step, remainders in the earliest steps. In a step one call of the model predicts every masked token of the
    block; those of highest confidence (probability at temperature 1 of the token drawn) or in random order are committed.

    Args:
        model: a Hugging Face masked language model. prompt_ids: int64 `[B, P]`; left-pad ragged prompts and pass
            attention_mask `[B, P]`.
        length: L, tokens to generate. block_length: divides length. steps: a multiple of the number of blocks, at most L.
        mask_id: written at undecided positions; never drawn unless suppress_mask=False (parity with LLaDA's own code).
        temperature: 0 greedy, else Gumbel-max. seed, sequence_ids: int64 `[B]`, the noise key of each sequence; ids are
            required at temperature > 0 or random remasking, since members of a group must differ.
        suppress: more ids with probability 0. remasking: "low_confidence" or "random".
        shift: 1 where position i is predicted by row i - 1 (Dream), else 0. micro_batch: sequences per model call.

    A sequence's noise does not depend on its batch. Raises ValueError or TypeError naming the argument.

    Example:
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> rollout = generate(model, torch.tensor([[1, 2, 3]]), length=4, steps=2, block_length=4, mask_id=10)
        >>> rollout.completion_BL.shape, sorted(rollout.commit_step_BL[0].tolist())
        (torch.Size([1, 4]), [0, 0, 1, 1])
    """
    checks.dtype("prompt_ids", prompt_ids, [torch.int64])
    checks.shape("prompt_ids", prompt_ids, [None, None])
    B, P = prompt_ids.shape
    if B == 0:
        raise ValueError("prompt_ids must hold at least one sequence, got an empty batch")
    checks.count("length", length)
    checks.count("block_length", block_length)
    checks.count("steps", steps)
    checks.choice("remasking", remasking, REMASKING)
    checks.count("shift", shift, 0)
    if length % block_length:
        raise ValueError(f"block_length must divide length={length}, got {block_length}")
    blocks = length // block_length
    if steps % blocks or steps > length:
        raise ValueError(f"steps must be a multiple of the {blocks} blocks and at most length={length}, got {steps}")
    checks.number("temperature", temperature, least=0)
    if shift > P:
        raise ValueError(f"prompt_ids must have at least {shift} token(s) when shift={shift}, got {P}")
    if checks.may_read(prompt_ids) and bool((prompt_ids == mask_id).any()):
        raise ValueError(f"prompt_ids must not hold mask_id={mask_id}")
    if sequence_ids is None:
        if temperature > 0 or remasking == "random":
            raise ValueError("sequence_ids must be given where noise is drawn (temperature > 0 or remasking='random')")
        sequence_ids = torch.arange(B, device=prompt_ids.device)
    checks.dtype("sequence_ids", sequence_ids, [torch.int64])
    checks.shape("sequence_ids", sequence_ids, [B])
    checks.same_device("sequence_ids", sequence_ids, "prompt_ids", prompt_ids)
    if checks.may_read(sequence_ids) and len(torch.unique(sequence_ids)) != B:
        raise ValueError("sequence_ids must be distinct: equal ids would share their noise")
    if active := dropout_names(model):
        raise ValueError(
            f"model must be deterministic in a rollout, but dropout is active: {', '.join(active[:3])}; call model.eval()"
        )
    if attention_mask is not None:
        checks.shape("attention_mask", attention_mask, [B, P])
        checks.same_device("attention_mask", attention_mask, "prompt_ids", prompt_ids)
    micro_batch = B if micro_batch is None else checks.count("micro_batch", micro_batch)
    noise.check_seed(seed)

    schedule = _Schedule(length, steps, block_length, remasking)
    draw = {"temperature": temperature, "suppress": (*suppress, mask_id) if suppress_mask else tuple(suppress)}
    parts = []
    with headless(model) as body:
        if not 0 <= mask_id < len(body.parameter):
            raise ValueError(f"mask_id must be in 0..{len(body.parameter) - 1}, got {mask_id}")
        calls = -(-B // micro_batch)
        idle = 0 if body.shards is None else body.shards.most(calls) - calls  # ranks that share the model call it equally often
        for b in range(0, B, micro_batch):
            span = slice(b, b + micro_batch)
            attention = None if attention_mask is None else attention_mask[span]
            parts.append(_denoise(body, prompt_ids[span], sequence_ids[span], attention, schedule, mask_id, seed, shift, draw))
        for _ in range(idle * steps):
            body.idle(P + length, {})
    ids, step, logp, entropy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    settings = {
        "sampler": "llada",
        "length": length,
        "steps": steps,
        "block_length": block_length,
        "temperature": temperature,
        "remasking": remasking,
        "seed": seed,
        "suppress": list(suppress),
        "suppress_mask": suppress_mask,
        "shift": shift,
    }
    return Rollout(ids, step, logp, entropy, settings)


@dataclass(frozen=True)
class _Schedule:
    length: int
    steps: int
    block_length: int
    remasking: str

    def commits(self) -> list[tuple[int, int, int]]:
        """(block, tokens still masked in it, tokens to commit) of every step."""
        blocks = self.length // self.block_length
        per_block = self.steps // blocks
        base, extra = divmod(self.block_length, per_block)
        plan = []
        for block in range(blocks):
            remaining = self.block_length
            for step in range(per_block):
                commit = base + (step < extra)
                plan.append((block, remaining, commit))
                remaining -= commit
        return plan


def _denoise(
    body: Body,
    prompt_ids: Tensor,
    sequence_ids: Tensor,
    attention_mask: Tensor | None,
    schedule: _Schedule,
    mask_id: int,
    seed: int,
    shift: int,
    draw: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, P), L, device = prompt_ids.shape, schedule.length, prompt_ids.device
    S = P + L
    ids = torch.cat([prompt_ids, prompt_ids.new_full((B, L), mask_id)], dim=1)
    kwargs = {}
    if attention_mask is not None:
        kwargs["attention_mask"] = torch.cat([attention_mask, attention_mask.new_ones(B, L)], dim=1)
    masked_BL = torch.ones(B, L, dtype=torch.bool, device=device)
    commit_step = torch.empty(B, L, dtype=torch.int32, device=device)
    commit_logp = torch.empty(B, L, dtype=torch.float32, device=device)
    commit_entropy = torch.empty_like(commit_logp)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key_BL = noise.row_bits(seed, Stream.TOKEN, sequence_ids[:, None], zero, torch.arange(L, device=device))
    order_BL = noise.row_bits(seed, Stream.REMASK, sequence_ids[:, None], zero, torch.arange(L, device=device))
    options = dict(body.options)
    logit_temperature = options.pop("temperature")
    batch_B1 = torch.arange(B, device=device)[:, None]
    for step, (block, remaining, commit) in enumerate(schedule.commits()):
        start = block * schedule.block_length
        # every sequence has the same number of masked tokens left, so their places need no host sync
        place_BR = masked_BL[:, start : start + schedule.block_length].to(torch.int8).argsort(dim=1, descending=True, stable=True)
        place_BR = place_BR[:, :remaining] + start
        row_N = (batch_B1 * S + P + place_BR - shift).reshape(-1)
        hidden = body(ids, **kwargs)
        drawn = sample_tokens(
            hidden,
            body.weight,
            key_BL.gather(1, place_BR).reshape(-1),
            step=step,
            rows=row_N,
            logit_temperature=logit_temperature,
            **options,
            **draw,
        )
        if schedule.remasking == "random":
            rank_BR = order_BL.gather(1, place_BR)
        else:
            rank_BR = drawn.confidence.view(B, remaining)
        chosen_BC = rank_BR.argsort(dim=1, descending=True, stable=True)[:, :commit]
        commit_BC = place_BR.gather(1, chosen_BC)
        ids.scatter_(1, commit_BC + P, drawn.token.view(B, remaining).gather(1, chosen_BC))
        masked_BL.scatter_(1, commit_BC, False)
        commit_step.scatter_(1, commit_BC, step)
        commit_logp.scatter_(1, commit_BC, drawn.logp.float().view(B, remaining).gather(1, chosen_BC))
        commit_entropy.scatter_(1, commit_BC, drawn.entropy.float().view(B, remaining).gather(1, chosen_BC))
    return ids, commit_step, commit_logp, commit_entropy
