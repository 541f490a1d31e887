"""Exact gradients of any objective, one Monte-Carlo sample at a time, at memory independent of their number.

The number of passes over the model follows from what the coefficients `d loss / d logp_row` depend on:

    none                    data only: one pass, coefficients known before the head runs
    token, sample           rows of one sample of one sequence: one pass, coefficients arrive in backward
    sequence                its K samples: one pass if a micro-batch holds them all, else two, block by block
    batch                   everything, on all ranks: two passes, one where a single micro-batch holds it

With two passes, the first scores all rows without a gradient, autograd on these small vectors gives the
coefficients, and the second runs forward and backward sample by sample. Where nothing of the head trains, the
first keeps the vectors that the coefficients multiply, up to 256 MiB of them, and the second does without the
head. Both must agree, so active dropout is refused. Whatever has no gradient skips the model: sequences whose
`scale` is 0, samples without a scored token, and rows whose coefficient is 0. Loss and gradient do not change;
the ELBOs of skipped samples are NaN.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels.accumulation import ranks
from dllm_kernels.accumulation.micro_batches import Cuts, make_cuts
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.accumulation.passes import Passes
from dllm_kernels.accumulation.report import Report
from dllm_kernels.accumulation.scores import refuse_dropout
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.model.headless import headless
from dllm_kernels.model.layouts import check_blocks
from dllm_kernels.model.sharding import accumulation_hooks


def accumulate(
    model: nn.Module,
    plan: MaskPlan,
    objective: Objective,
    batch: Batch,
    *,
    denominator: float | None = None,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
    suppress: tuple[int, ...] = (),
    model_kwargs: dict[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_last: bool = False,
) -> Report:
    """Add the objective's exact gradient to the `.grad` of the model's parameters.

    Args:
        model: a Hugging Face masked language model as `headless` takes it, wrapper included; possibly inside `headless`
            already.
        plan: the masks, shared by all policies. batch: advantages, old scores and so on, see `Batch`.
        objective: for example `objectives.BGPO`; minimised.
        denominator: divides the sum of contributions; pass the count of the whole optimizer step over all
            ranks where this call sees a part of it. Default: the number of the objective's units in plan and
            batch, over all ranks if `group` is given, at least 1: "sequences", "tokens" (that may be scored),
            "groups" (distinct "group_ids", required then), "pairs" or "steps" (states with a scored token).
        samples_per_pass, sequences_per_pass: the micro-batch of one forward and backward; it sets the memory
            and does not change the result. With blocks, the samples of a pass share one clean copy.
        suppress: ids with probability 0, such as the mask id.
        model_kwargs: `[B, S]` tensors for every model call, such as `attention_mask`; sliced along B.
        group: the ranks of the optimizer step; default: those of a model in DDP or FSDP2. Objectives of `batch`
            coupling exchange their scores over it; each rank adds the gradient of its own sequences, and its
            loss is an equal share of the total. A rank may hold no sequences (an empty cut of a plan).
        reduce_last: with FSDP2, reduce gradients in this call's last backward only: less communication, but
            all unsharded gradients in memory.

    dW of a head that nothing wraps and no hook looks at is added up in its `.grad`, or for one of 16 bits in one fp32 buffer that
    is rounded into `.grad` at the end; other parameters get theirs as autograd delivers it. A hook on autograd's own node
    (`grad_fn.next_functions[0][0]` of a view of the weight) cannot be seen, and does not see this dW. After an error the `.grad`
    of a model that nothing wraps hold a part of the gradient: clear them.
    Gradients are summed over the ranks of a wrapper, not averaged: the denominator counts them all. Nothing else divides: not
    accelerate's `gradient_accumulation_steps`; under a GradScaler pass `denominator / scaler.get_scale()`.
    Under DistributedDataParallel backwards run without its hooks, however many each rank needs, and what they added to `.grad`
    is summed once at the end. Under FSDP2 (`fully_shard`) all ranks call the model equally often, and the head is gathered and
    its gradient reduced once. Either way the wrapper is left as it was found, after an error too (with `.grad` as before the
    call under DDP).
    Calls inside an outer `headless(model)` share one gather and one reduction: the head's gradient is in
    `.grad` when the context ends.

    Raises ValueError naming the argument: a batch that does not fit the plan, a missing denominator, dropout
    where two passes must agree, a sequence held by two ranks.

    Example:
        >>> from dllm_kernels import make_mask_plan
        >>> from dllm_kernels.objectives import BGPO
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> ids = torch.randint(10, (2, 6))
        >>> plan = make_mask_plan(ids, torch.ones_like(ids, dtype=torch.bool), law="exact", samples=4, seed=0,
        ...                       sequence_ids=torch.tensor([1, 2]), mask_id=10)
        >>> report = accumulate(model, plan, BGPO, Batch({"advantages": torch.tensor([1.0, -1.0])}))
        >>> report.passes, report.backwards
        (1, 4)
    """
    if not isinstance(plan, MaskPlan) or not isinstance(batch, Batch):
        raise TypeError(f"plan must be a MaskPlan and batch a Batch, got {type(plan).__name__} and {type(batch).__name__}")
    objective.check(batch, plan)
    K, B, _ = plan.shape
    if not torch.is_grad_enabled():
        raise ValueError("accumulate computes gradients: call it outside torch.no_grad()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got a fully frozen one")
    if any(accumulation_hooks(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model must not have an optimizer in backward (register_post_accumulate_grad_hook) for accumulate, which runs "
            "several backwards for one step: step after it"
        )
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    check_blocks(model, plan, model_kwargs or {})
    cuts = make_cuts(plan, batch, model_kwargs, samples_per_pass, sequences_per_pass)
    coupling = objective.on_policy_coupling if objective.is_on_policy(batch) else objective.coupling

    with headless(model) as body:
        shards, group = body.shards, group or body.wrapper.group
        if shards is not None:
            K = shards.most(K)  # ranks may hold different numbers of trace states
        if K == 0 or (B == 0 and group is None):
            raise ValueError(f"plan must hold at least one sample and one sequence, got K={K}, B={B}")
        whole = samples_per_pass >= K and cuts.sequences_per_pass >= B and group is None  # one cut holds everything
        two_passes = (coupling == "batch" and not whole) or (coupling == "sequence" and samples_per_pass < K)
        if two_passes or (objective.old_scores is not None and not objective.is_on_policy(batch)):
            refuse_dropout(model)
        if coupling == "batch" and group is not None and objective.couple is None:
            raise ValueError(f"group must be None for {objective.name}, which does not say what its ranks would share")
        if denominator is None:
            denominator = ranks.denominator(objective, plan, batch, group)
        passes = Passes(body, objective, denominator, replace(body.options, suppress=suppress))
        elbo_BK = torch.zeros(B, len(plan.sample_K), dtype=torch.float64, device=plan.input_ids_BS.device)
        loss = elbo_BK.new_zeros(())
        places = _places(cuts, objective, coupling, elbo_BK)
        # with `batch` coupling a rank without sequences takes part in the exchange too
        blocks = max(len(places), coupling == "batch")
        if shards is not None:
            blocks = shards.most(blocks)
        with passes.meter.running(), body.accumulating(reduce_last=reduce_last):
            for number in range(blocks):
                place = places[number] if number < len(places) else slice(0, 0)
                block = cuts if isinstance(place, slice) and place == slice(None) else cuts.of(place)
                passes.last = reduce_last and number == blocks - 1
                if two_passes and coupling == "batch" and objective.couple is not None:
                    block_loss, block_elbo_BK = passes.by_numbers(block, group)
                elif two_passes:
                    block_loss, block_elbo_BK = passes.twice(block)
                else:
                    block_loss, block_elbo_BK = passes.once(block, coupling)
                loss = loss + block_loss
                elbo_BK[place] = block_elbo_BK
            if passes.weight_sum is not None:
                passes.weight_sum.finish()
            if shards is not None and shards.unreduced:  # no cut of the last pass had a gradient
                shards.reduce_gradients(now=True)
                body.idle(1, {}, backward=True)
    meter = passes.meter
    counts = meter.forwards, meter.backwards, meter.rows, meter.seconds, meter.flops
    return Report(loss, elbo_BK, 2 if two_passes else 1, *counts)


def _places(cuts: Cuts, objective: Objective, coupling: str, elbo_BK: Tensor) -> list[slice] | list[Tensor]:
    """The blocks of sequences that are processed together; sequences of zero weight are left out.

    Where an objective couples the samples of a sequence, a block has `sequences_per_pass` sequences, so the
    scores kept between two passes do not grow with the batch.
    """
    B = cuts.plan.shape[1]
    live_B: Tensor | None = None
    if objective.scale is not None and coupling != "batch":
        scale = {**cuts.batch.per_sequence, **cuts.batch.per_sample}[objective.scale]
        live_B = (scale != 0).unsqueeze(-1).flatten(1).any(1)
        elbo_BK[~live_B & (cuts.plan.lengths_B > 0)] = torch.nan
    places = torch.arange(B, device=elbo_BK.device) if live_B is None else live_B.nonzero()[:, 0]
    step = cuts.sequences_per_pass if objective.coupling == "sequence" and coupling in ("sequence", "none") else max(1, B)
    if len(places) == B <= step:
        return [slice(None)] if B else []
    return list(places.split(step))
