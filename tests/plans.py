"""Mask plans that the tests share: one per preset, ragged."""

from __future__ import annotations

import torch

from dllm_kernels import MaskPlan, make_mask_plan

# name: (law, samples, options); a trace's step map is made by `plan_of`
PRESETS = {
    "bernoulli": ("bernoulli", 6, {}),
    "bernoulli, counted": ("bernoulli", 6, {"weight": "L/count", "t_min": 0.1}),
    "exact": ("exact", 6, {}),
    "exact, independent": ("exact", 6, {"pairing": "independent"}),
    "exact_zero": ("exact_zero", 6, {}),
    "antithetic": ("antithetic", 6, {}),
    "antithetic, independent": ("antithetic", 6, {"pairing": "independent"}),
    "dmpo": ("antithetic", 6, {"weight": "dmpo"}),
    "coupled": ("coupled", 7, {}),
    "quadrature": ("quadrature", 6, {}),
    "quadrature, rounded": ("quadrature", 6, {"nodes": 2, "counts": "round", "weight": "wL/count"}),
    "full": ("full", 6, {}),
    "block": ("block", 6, {"block_length": 3}),
    "trace": ("trace", None, {}),
    "trace, shrunk": ("trace", None, {"shrink": 2}),
    "segments": ("segments", 3, {"segments": 3}),
}
MASK, PROMPT = 99, 2


def plan_of(
    lengths,
    *,
    law="exact",
    samples=4,
    S=None,
    seed=0,
    ids=None,
    prompt=PROMPT,
    left_padding=0,
    steps=5,
    attention=False,
    **options,
) -> MaskPlan:
    """Sequences of `prompt` clean tokens, `lengths[b]` scored ones, and padding up to S; a trace of `steps` steps."""
    B, S = len(lengths), S or left_padding + prompt + max(lengths)
    tokens = torch.arange(B * S).reshape(B, S) % 90
    completion = torch.zeros(B, S, dtype=torch.bool)
    real = torch.zeros(B, S, dtype=torch.bool)
    step_map = torch.full((B, S), -1)
    for b, length in enumerate(lengths):
        inside = slice(left_padding + prompt, left_padding + prompt + length)
        completion[b, inside] = True
        real[b, left_padding : inside.stop] = True
        step_map[b, inside] = torch.arange(length) * 7 % steps
    if law in ("trace", "segments"):
        options.setdefault("step_map_BS", step_map)
        samples = options.get("segments") if law == "segments" else samples
    return make_mask_plan(
        tokens,
        completion,
        law=law,
        samples=samples,
        seed=seed,
        sequence_ids=torch.arange(100, 100 + B) if ids is None else ids,
        mask_id=MASK,
        attention_mask_BS=real if attention else None,
        **options,
    )


def preset(name, lengths, **changes) -> MaskPlan:
    law, samples, options = PRESETS[name]
    return plan_of(lengths, **{"law": law, "samples": samples, **options, **changes})
