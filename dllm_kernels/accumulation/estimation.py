"""ELBOs of given sequences under a model, without gradients: for evaluation, reward models, filtering."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks, noise
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.masks.make import make_mask_plan
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.noise import Stream

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """The result of `estimate_elbo`, in nats: float64, left on the device."""

    elbo_B: Tensor
    standard_error_B: Tensor  # NaN where samples do not vary, see `MaskPlan.standard_error`
    sample_elbo_BK: Tensor  # each sample's weighted sum; `elbo_B` is their sum under the law's shares
    rows: int  # rows through the head
    forwards: int  # calls of the model


def estimate_elbo(
    model: nn.Module,
    input_ids_BS: Tensor,
    completion_mask_BS: Tensor,
    *,
    law: str = "exact",
    samples: int | None = 128,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    mask_id: int,
    shift: int = 0,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
    suppress: tuple[int, ...] = (),
    model_kwargs: dict[str, Tensor] | None = None,
    progress: bool | Progress = False,
    **options: Any,
) -> Estimate:
    """Estimate the any-order lower bound of `log p(completion | prompt)` with the masks of a law.

    `ELBO = sum_{n=1..L} (1/n) E_{|m|=n} sum_{l in m} log p(y_l | y^m)`, the right side of LLaDA's eq. 6
    (arXiv 2502.09992). A law that is not `unbiased` (see `make_mask_plan`) estimates the quantity that it
    documents instead.

    Args:
        model: a Hugging Face masked language model; its mode is left as it is, and active dropout is refused.
        input_ids_BS: int64 `[B, S]`, prompts and clean completions. completion_mask_BS: bool `[B, S]`, the
            scored tokens.
        law, samples, seed, mask_id, shift, options: as in `make_mask_plan` (options of the law, and
            `iteration`, `eos_id`, `prompt_noise`, `attention_mask_BS`). Equal values and sequences give equal
            masks for every model, so policy, old policy and reference are compared under the same masks.
        sequence_ids: int64 `[B]`, distinct; default: a 64-bit hash of each row's tokens without padding
            (tokens outside the completion that an `attention_mask` in `model_kwargs` hides), so a sequence
            gets the same masks in any batch. Equal rows are numbered to keep their ids distinct.
        samples_per_pass, sequences_per_pass: the micro-batch of one forward; memory grows with it, not with
            `samples`.
        suppress: ids with probability 0, such as the mask id.
        model_kwargs: `[B, ...]` tensors for every model call, such as `attention_mask`; sliced along B.
        progress: True for a line on stderr, or a function of (done, total) masked sequences, called after
            every micro-batch.

    Raises ValueError or TypeError naming the argument.

    Example:
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> ids = torch.randint(10, (2, 6))
        >>> estimate = estimate_elbo(model, ids, torch.arange(6).expand(2, 6) >= 2, samples=8, mask_id=10)
        >>> estimate.elbo_B.shape, estimate.standard_error_B.shape, estimate.forwards
        (torch.Size([2]), torch.Size([2]), 8)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress must be True, False or a function of (done, total), got {type(progress).__name__}")
    model_kwargs = model_kwargs or {}
    if sequence_ids is None:
        attention_mask_BS = options.get("attention_mask_BS", model_kwargs.get("attention_mask"))
        sequence_ids = content_ids(input_ids_BS, completion_mask_BS, attention_mask_BS)
    plan = make_mask_plan(
        input_ids_BS,
        completion_mask_BS,
        law=law,
        samples=samples,  # type: ignore[arg-type]
        seed=seed,
        sequence_ids=sequence_ids,
        mask_id=mask_id,
        shift=shift,
        **options,
    )
    report = progress if callable(progress) else _line_on_stderr if progress else None
    K, B, _ = plan.shape
    forwards = rows = done = 0

    def after_cut(cut: MaskPlan) -> None:
        nonlocal forwards, rows, done
        size = cut.shape[0] * cut.shape[1]
        forwards, rows, done = forwards + (len(cut.rows) > 0), rows + len(cut.rows), done + size
        if report is not None:
            report(done, K * B)

    sample_elbo_BK = score_samples(
        model,
        plan,
        samples_per_pass=samples_per_pass,
        sequences_per_pass=sequences_per_pass,
        suppress=suppress,
        model_kwargs=model_kwargs,
        after_cut=after_cut,
    )
    elbo_B = (sample_elbo_BK * plan.share_K).sum(-1)
    return Estimate(elbo_B, plan.standard_error(sample_elbo_BK), sample_elbo_BK, rows, forwards)


def content_ids(input_ids_BS: Tensor, completion_mask_BS: Tensor, attention_mask_BS: Tensor | None = None) -> Tensor:
    """int64 `[B]`: a hash of each row's real tokens and of which are scored; equal rows get distinct ids.

    The hash is a sum of one keyed 64-bit word per (token, scored or not, ordinal): vectorised, and padding
    adds nothing.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 6, 7]])
        >>> completion = torch.tensor([[False, True, True]] * 3)
        >>> len(set(content_ids(ids, completion).tolist()))
        3
    """
    checks.dtype("input_ids_BS", input_ids_BS, (torch.int64, torch.int32))
    checks.shape("input_ids_BS", input_ids_BS, [None, None])
    checks.dtype("completion_mask_BS", completion_mask_BS, [torch.bool])
    checks.shape("completion_mask_BS", completion_mask_BS, list(input_ids_BS.shape))
    real_BS = torch.ones_like(completion_mask_BS)
    if attention_mask_BS is not None and attention_mask_BS.shape == real_BS.shape:
        real_BS = attention_mask_BS.bool() | completion_mask_BS
    ordinal_BS = real_BS.cumsum(-1)
    words_BS = noise.row_bits(0, Stream.DATA, input_ids_BS.long(), completion_mask_BS.long(), ordinal_BS)
    hash_B = words_BS.masked_fill(~real_BS, 0).sum(-1)  # wraps around, as intended
    order_B = torch.argsort(hash_B, stable=True)
    sorted_B, index_B = hash_B[order_B], torch.arange(len(hash_B), device=hash_B.device)
    first_B = torch.ones_like(sorted_B, dtype=torch.bool)
    first_B[1:] = sorted_B[1:] != sorted_B[:-1]
    start_B = torch.cummax(torch.where(first_B, index_B, 0), dim=0).values
    earlier_B = torch.empty_like(index_B).scatter_(0, order_B, index_B - start_B)
    return noise.row_bits(0, Stream.DATA, hash_B, earlier_B, torch.zeros_like(hash_B))


def _line_on_stderr(done: int, total: int) -> None:
    print(f"\restimate_elbo: {done} of {total} masked sequences", end="\n" * (done == total), file=sys.stderr)
