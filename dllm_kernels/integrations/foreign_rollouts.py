"""Rollouts of another engine (SGLang, LMDeploy, dInfer, vLLM ...) beside the model that is trained.

`Rollout.from_steps` and `Rollout.from_jsonl` take what the engine told. `score_rollout` scores every token in the state that
the engine's step map says it was drawn in: that fills what was not told, and shows how far the engine's policy is from ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks
from dllm_kernels.accumulation.scores import token_scores
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import rollout_logp, trajectory_rows

_LOOKED_AT = 4  # sequences, in which the cause of a gap is looked for


@dataclass(frozen=True)
class Gap:
    """|log-prob told - log-prob scored| of an engine's tokens, in nats: 0 where both are the same policy."""

    mean: float  # over all tokens; nan where none was told
    worst: float  # the largest mean of a sequence
    sequence: int  # which; -1 where none was told
    tokens: int  # that were told


def score_rollout(
    model: nn.Module,
    rollout: Rollout,
    *,
    bound: float | None = 0.05,
    keep: bool = True,
    suppress: Sequence[int] | None = None,
    model_kwargs: dict[str, Tensor] | None = None,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
) -> tuple[Rollout, Gap]:
    """The rollout with the model's log-probs and entropies where none were told, and its gap where they were.

    Args:
        rollout: of `Rollout.from_steps` or `from_jsonl`; a rollout of `generate` will do, as a check.
        bound: nats; a sequence whose mean gap is larger is an error that names its likely cause. None: no bound.
        keep: whether told log-probs stay; False puts the model's in their place (an exact rollout, though the engine's
            was approximate).
        suppress: ids that were not drawn; None: mask_id alone.
        model_kwargs, samples_per_pass, sequences_per_pass: as in `score_samples`; by default the model gets the attention
            mask of a rollout that has padding.

    Raises ValueError naming the argument, or the cause of a gap above `bound`: told at the temperature of sampling; with
    other ids suppressed; another shift; a step map or a cache that shows other states; other weights or prompts.

    Example:
        >>> from dllm_kernels import generate
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)).eval()
        >>> rollout = Rollout.from_steps([[3, 4]], [[5, 6, 7]], [[0, 1, 0]], mask_id=9)
        >>> rollout, gap = score_rollout(model, rollout)
        >>> bool((rollout.commit_logp_BL < 0).all()), gap.tokens
        (True, 0)
    """
    if bound is not None:
        checks.number("bound", bound, above=0)
    suppress = (rollout.mask_id,) if suppress is None else tuple(suppress)
    options: dict[str, Any] = {
        "samples_per_pass": samples_per_pass,
        "sequences_per_pass": sequences_per_pass,
        "model_kwargs": model_kwargs,
    }
    plan, scored = _scores(model, rollout, suppress=suppress, want=("logp", "entropy"), **options)
    told_KBS, logp_KBS = rollout_logp(rollout, plan), scored["logp"].transpose(0, 1)
    difference_KBS = (told_KBS - logp_KBS).abs().double()
    there_KBS = plan.scored & ~told_KBS.isnan() & _written(rollout)
    gap_B, count_B = _mean(difference_KBS, there_KBS)
    tokens = int(count_B.sum())
    gap = Gap(math.nan, math.nan, -1, 0)
    if tokens:
        worst = int(gap_B.argmax())
        gap = Gap(float((gap_B * count_B).sum() / tokens), float(gap_B[worst]), worst, tokens)
        if bound is not None and not gap.worst <= bound:
            which_N = gap_B.argsort(descending=True)[:_LOOKED_AT]
            near = {name: None if value is None else value[which_N] for name, value in (model_kwargs or {}).items()}
            cause = _cause(model, rollout.kept(which_N), suppress, bound, {**options, "model_kwargs": near or None})
            raise ValueError(
                f"the rollout's log-probs are off by {gap.worst:.3g} nats a token in sequence {worst} (bound {bound:g}; "
                f"{gap.mean:.3g} over all {tokens} tokens): {cause}"
            )
    return _filled(rollout, plan, scored, keep=keep), gap


def _scores(
    model: nn.Module, rollout: Rollout, *, suppress: Sequence[int], shift: int | None = None, **options: Any
) -> tuple[MaskPlan, dict[str, Tensor]]:
    """The plan of all that steps wrote, also after an EOS, and its scores `[B, K, S]`."""
    if options["model_kwargs"] is None and rollout.attention_mask_BS is not None:
        options["model_kwargs"] = {"attention_mask": rollout.attention_mask_BS.long()}
    whole = replace(rollout, settings={**rollout.settings, "eos_id": None})
    plan = trajectory_rows(whole, score="last" if rollout.recorded is None else "all_events", shift=shift)
    return plan, token_scores(model, plan, suppress=tuple(suppress), **options)


def _mean(value_KBS: Tensor, there_KBS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each sequence `[B]`, 0 where there is none, and the numbers of its tokens."""
    count_B = there_KBS.sum((0, 2))
    return torch.where(there_KBS, value_KBS, 0.0).sum((0, 2)) / count_B.clamp(min=1), count_B


def _cause(model: nn.Module, rollout: Rollout, suppress: Sequence[int], bound: float, options: dict[str, Any]) -> str:
    """Which other reading of the log-probs brings them within the bound, or, if none does, where the gap begins."""
    settings = rollout.settings
    temperature, shift = float(settings.get("temperature", 1.0)), int(settings.get("shift", 0))

    def off(**other: Any) -> Tensor:
        plan, scored = _scores(model, rollout, **{"suppress": suppress, **options, **other})
        told_KBS = rollout_logp(rollout, plan)
        difference_KBS = (told_KBS - scored["logp"].transpose(0, 1)).abs().double()
        return torch.where(plan.scored & ~told_KBS.isnan() & _written(rollout), difference_KBS, torch.nan)

    def fits(**other: Any) -> bool:
        return bool(off(**other).nanmean((0, 2)).nan_to_num().max() <= bound)

    if temperature not in (0.0, 1.0) and fits(temperature=temperature):
        return f"they were told at temperature {temperature:g}, at which was sampled; ask the engine for those at 1"
    if suppress and fits(suppress=()):
        return f"the engine draws from all ids, and here {list(suppress)} have probability 0; give suppress=() if that is meant"
    if fits(shift=1 - min(shift, 1)):
        return f"they fit shift={1 - min(shift, 1)}, and the rollout says shift={shift}"
    if rollout.approximate:
        return "they are those of a cache of earlier states; keep=False scores them anew, and a larger bound allows the gap"
    gap_KBS = off()
    step_KBS = rollout.step_map_BS.expand(gap_KBS.shape)
    first = gap_KBS[step_KBS == 0].nanmean()
    if first <= bound:
        return (
            f"those of the first step fit ({float(first):.2g}), later ones do not, so the engine saw other states than its step "
            "map tells: a step map of another order or of single blocks, or a cache of earlier states (approximate=True)"
        )
    return (
        f"those of the first step are off too ({float(first):.2g}), which saw the prompt alone: the engine has other weights (of "
        "another update, or quantised), another dtype, or another prompt (chat template)"
    )


def _written(rollout: Rollout) -> Tensor:
    """bool `[B, S]`: tokens of a completion that a step set, not those filled up after its end."""
    return rollout.spread(rollout.commit_step_BL >= 0, torch.zeros_like(rollout.completion_mask_BS))


def _filled(rollout: Rollout, plan: MaskPlan, scores: dict[str, Tensor], *, keep: bool) -> Rollout:
    """The rollout with these scores `[B, K, S]` where it knew none, or, if not `keep`, everywhere."""
    found: dict[str, Any] = {"unscored": False}
    if not keep:
        found |= {"settings": {**rollout.settings, "approximate": False}, "kept_age_BT": None}
    scored_BKS, events = plan.scored.transpose(0, 1), rollout.recorded
    if events is not None and plan.step_BKS is not None:  # each event has its own sample
        at = events.sequence_E, slice(None), events.position_E
        own_EK = scored_BKS[at] & (plan.step_BKS[at] == events.step_E[:, None])
        new = {}
        for name in ("logp_E", "entropy_E"):
            told_E, value_E = getattr(events, name), torch.where(own_EK, scores[name[:-2]][at], 0.0).sum(-1)
            new[name] = torch.where(own_EK.any(-1) & (told_E.isnan() | (not keep)), value_E.to(told_E.dtype), told_E)
        events = replace(events, **new)
        found["recorded"] = events
    last = None if events is None else events.at(events.last(rollout.ids_BS.shape))
    for name in ("logp", "entropy"):
        told_BL = getattr(rollout, f"commit_{name}_BL")
        if last is None:
            value_BS = torch.where(scored_BKS, scores[name], 0.0).sum(1).to(told_BL.dtype)
        else:
            value_BS = torch.zeros_like(rollout.ids_BS, dtype=told_BL.dtype)
            value_BS[last.sequence_E, last.position_E] = getattr(last, f"{name}_E")
        wanted_BL = (rollout.commit_step_BL >= 0) & (told_BL.isnan() | (not keep))
        found[f"commit_{name}_BL"] = torch.where(wanted_BL, value_BS.gather(1, rollout.column_BL), told_BL)
    return replace(rollout, **found)
