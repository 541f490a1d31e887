"""Exact gradients of any objective, one Monte-Carlo sample at a time: memory does not grow with their number.

What an objective's coefficients `d loss / d logp_row` depend on decides the passes over the model:

    none                    data only: one pass, coefficients known before the head runs
    token, sample           rows of one sample of one sequence: one pass, coefficients arrive in backward
    sequence                its K samples: one pass if a cut holds them all, else two, a block of sequences at a time
    batch                   everything, on all ranks: two passes

Two passes score all rows without a gradient, take the coefficients by autograd on these small vectors, then
go through the model again sample by sample. They need a deterministic forward, so active dropout is refused.
What is known to have no gradient never reaches the model: sequences whose `scale` is 0, samples without a
scored token, rows whose coefficient is 0.
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
        model: a Hugging Face masked language model, or one under `headless` already.
        plan: the masks, shared by every policy. batch: advantages, old scores and so on, see `Batch`.
        objective: what to minimise, for example `objectives.BGPO`.
        denominator: what the sum of contributions is divided by; give the count of the whole optimizer step
            and all ranks when this call sees only a part. Default: what the plan and the batch hold of the
            objective's "sequences", "tokens" (those that may be scored), "groups" (different "group_ids",
            which must be given), "pairs" or "steps" (states with a token), at least 1; of all ranks where
            `group` is given.
        samples_per_pass, sequences_per_pass: the cut that one forward and backward holds; memory grows with
            it, the result does not depend on it.
        suppress: ids with probability 0, such as the mask id.
        model_kwargs: `[B, S]` tensors for every model call, such as `attention_mask`; cut along B.
        group: ranks whose batches make up the optimizer step; default: those that share a sharded model.
            Objectives of `batch` coupling then share their scores with them; each rank adds the gradient of
            its own sequences, and its loss is an equal share of the total. A rank may hold no sequence (cut a
            plan to none).
        reduce_last: with FSDP2, keep gradients whole until this call's last backward, instead of reducing
            them after each: less communication, and the memory of all gradients unsharded.

    A model under FSDP2 (`fully_shard`) is called equally often by all ranks, whatever they hold, its
    gradients are summed over ranks (FSDP's average is switched off, and stays so), and its head is gathered
    and its head's gradient reduced once. Within an outer `headless(model)`, several calls share that: the
    head's part is in `.grad` when the context ends.

    Raises ValueError naming the argument: a batch that does not fit the plan, a missing denominator, dropout
    where two passes must agree, a sequence that two ranks hold.

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
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    cuts = make_cuts(plan, batch, model_kwargs, samples_per_pass, sequences_per_pass)
    coupling = objective.on_policy_coupling if objective.is_on_policy(batch) else objective.coupling

    with headless(model) as body:
        shards = body.shards
        if shards is not None:
            group = group or shards.group
            K = shards.most(K)  # of a trace's states, ranks may hold different numbers
        if K == 0 or (B == 0 and group is None):
            raise ValueError(f"plan must hold at least one sample and one sequence, got K={K}, B={B}")
        two_passes = coupling == "batch" or (coupling == "sequence" and samples_per_pass < K)
        if two_passes or (objective.old_scores is not None and not objective.is_on_policy(batch)):
            refuse_dropout(model)
        if coupling == "batch" and group is not None and objective.couple is None:
            raise ValueError(f"group must be None for {objective.name}, which does not say what its ranks would share")
        if denominator is None:
            denominator = ranks.denominator(objective, plan, batch, group)
        passes = Passes(body, objective, denominator, replace(body.options, suppress=suppress))
        elbo_BK = torch.zeros(B, len(plan.sample_K), dtype=passes.dtype, device=plan.input_ids_BS.device)
        loss = elbo_BK.new_zeros(())
        places = _places(cuts, objective, coupling, elbo_BK)
        blocks = max(len(places), coupling == "batch")  # to which a rank without sequences has something to say
        if shards is not None:
            blocks = shards.most(blocks)
            shards.sum_gradients()
            shards.reduce_gradients(now=not reduce_last)
        with passes.meter.running():
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
            if shards is not None and shards.unreduced:  # the last pass found nothing to learn
                shards.reduce_gradients(now=True)
                body.idle(1, {}, backward=True)
    meter = passes.meter
    counts = meter.forwards, meter.backwards, meter.rows, meter.seconds, meter.flops
    return Report(loss, elbo_BK, 2 if two_passes else 1, *counts)


def _places(cuts: Cuts, objective: Objective, coupling: str, elbo_BK: Tensor) -> list[slice] | list[Tensor]:
    """Which sequences are done together, block after block; those of no weight are left out.

    A block of an objective that couples a sequence's samples has `sequences_per_pass` sequences, so that what
    lies between two passes does not grow with the batch.
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
