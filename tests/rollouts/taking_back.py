"""The published samplers that take tokens back, one sequence at a time, from full logits in float64: see `published`.

    RCR    autonomousvision/mdpo mdlm_generation_utils.py: every mask is filled; then the least trusted of all decided tokens,
           earlier blocks' too, become masks again, as many as the schedule leaves; trust is that of the last time it was drawn
    WINO   Feng-Hong/WINO-DLLM LLaDA/decoding.py: all above a threshold, 0.7 of the masks at most but 5 to 20, one at least; then
           decided tokens of the block whose copy is below another threshold, fewer than the step before had decided
    ReMDM  kuleshov-group/remdm diffusion.py `_ddpm_caching_update`: what is masked is decided, and what is decided masked, with
           probabilities of the time; what is left in the end is decided by argmax. alpha_t = 1 - t

The nucleus is Dream's, and confidences of ReMDM are not rounded to bf16.
"""

from __future__ import annotations

import math

import torch

from dllm_kernels import noise


def rcr(canvas, *, steps, block_length, alg="maskgit_plus"):
    ranks = {
        "maskgit_plus": lambda seen: seen.drawn_logp,
        "topk_margin": lambda seen: seen.margin,
        "entropy": lambda seen: -seen.drawn_entropy,
    }
    trust = {}
    blocks = [range(first, min(first + block_length, canvas.length)) for first in range(0, canvas.length, block_length)]
    per_block = steps // len(blocks)
    for b, block in enumerate(blocks):
        for i in range(per_block):
            so_far = range(block.stop)
            if not canvas.masked(so_far):
                continue
            seen = canvas.call(so_far, b * per_block + i)
            trust |= {s.place: torch.tensor(ranks[alg](s)).float().item() for s in seen}
            left = int(torch.floor(len(block) * torch.tensor(1 - (i + 1) / per_block)))
            again = sorted(trust, key=lambda place: (trust[place], place))[:left]
            canvas.take_back([place for place in again if canvas.step[place] >= 0])
            canvas.commit([s for s in seen if s.place not in again])


def wino(canvas, *, block_length, verify, threshold=0.6, threshold_back=0.9):
    for first in range(0, canvas.length, block_length):
        block, accepted, number = range(first, min(first + block_length, canvas.length)), 30, first
        while masked := canvas.masked(block):
            decided = [place for place in block if canvas.step[place] >= 0]
            z = verify(canvas.ids, block)
            seen = sorted(canvas.call(block, number), key=lambda s: (-s.logp, s.place))
            sure = [s for s in seen if math.exp(s.logp) > threshold][: min(max(int(len(masked) * 0.7), 5), 20)] or seen[:1]
            doubted = {}
            if len(sure) > 1:
                kept = {place: float(z[place - first].softmax(-1)[canvas.ids[place]]) for place in decided}
                doubted = {place: p for place, p in kept.items() if p < threshold_back}
            again = sorted(doubted, key=lambda place: (doubted[place], place))[: max(0, accepted - 1)]
            canvas.take_back(again)
            canvas.commit(sure)
            accepted, number = len(sure), number + 1


def remdm(canvas, *, steps, strategy="cap", eta=0.02, eps=1e-5, t_on=0.55, t_off=0.05, alpha_on=0.9):
    places, dt, trust = range(canvas.length), (1 - eps) / steps, {}
    for i, t in enumerate(torch.linspace(1, eps, steps + 1)[:-1].tolist()):
        before, after = 1 - t, 1 - (t - dt)  # alpha_t, alpha_s
        decided = [place for place in places if canvas.step[place] >= 0]
        most = min(1.0, (1 - after) / before) if before > 0 else 1.0
        of_all = {"cap": min(eta, most), "rescale": eta * most}.get(strategy, 0.0)
        reveal = (after - (1 - of_all) * before) / (1 - before)
        sigma = dict.fromkeys(decided, of_all)
        if strategy == "conf" and decided:
            doubt = torch.tensor([-trust[place] for place in decided]).double().softmax(-1)
            sigma = dict(zip(decided, (most * doubt).tolist(), strict=True))
        if strategy == "loop":
            middle = t_off < t <= t_on
            sigma = dict.fromkeys(decided, eta if middle else 0.0)
            if middle:
                reveal = (alpha_on - (1 - eta) * alpha_on) / (1 - alpha_on)
            elif t > t_on:
                hidden, later = (1 - (1 - u) * alpha_on / (1 - t_on) for u in (t, t - dt))
                reveal = (hidden - later) / hidden
            else:
                reveal = dt / t
        chance = {place: _chance(canvas.order[place], i) for place in places}
        drawn = [place for place in canvas.masked(places) if chance[place] < reveal]
        again = [place for place in decided if chance[place] < sigma[place]]
        if drawn or again:
            seen = canvas.call(drawn, i) if drawn else canvas.call([], i)
            canvas.take_back(again)
            canvas.commit(seen)
            trust |= {s.place: math.exp(s.drawn_logp) for s in seen}
    if canvas.masked(places):
        canvas.temperature = 0.0
        canvas.commit(canvas.call(places, steps))


def _chance(key, step):
    high, low = (int(noise.element_bits(key[None], 1, step=step, tag=tag)) for tag in (0, 1))
    return ((high << 32 | low) + 0.5) * 2.0**-64


SAMPLERS = {"rcr": rcr, "wino": wino, "remdm": remdm}
