"""`generate` beside the published loops: one call that runs both and says that they agree."""

from __future__ import annotations

import torch

from dllm_kernels import generate
from tests.rollouts import published

MASK, V = 10, 11
IDS = torch.tensor([7, -(2**40), 12])
RAGGED = [torch.tensor(ids) for ids in ([3, 9, 4, 7, 8], [5, 6], [8, 3, 3, 6])]


def left_padded(prompts):
    """The same prompts as a tensor with its mask; the padding is an id of the vocabulary like any other."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=3) for p in prompts])
    return ids, torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()


def both(model, prompts=RAGGED, *, layout="ragged", see=None, sequence_ids=IDS, dtype=torch.float64, **options):
    """Rollout by the library, checked token for token, and in all it tells, against the published loops."""
    options = {
        "length": 8,
        "mask_id": MASK,
        "sequence_ids": sequence_ids,
        "greedy": not (options.get("cache") or options.get("sampler") in ("rcr", "wino", "remdm")),
        **options,
    }
    ours = dict(options)
    if layout == "left":
        given, ours["attention_mask"] = left_padded(prompts)
    else:
        given, ours["packed"] = prompts, layout == "packed"
    rollout = generate(model, given, **ours)
    theirs = {k: v for k, v in options.items() if k not in ("greedy", "cache", "deterministic", "micro_batch", "width")}
    with torch.no_grad():
        canvases = published.generate(model, prompts, see=see, **theirs)
    agree(rollout, canvases, dtype=dtype)
    return rollout, canvases


def agree(rollout, canvases, *, dtype=torch.float64):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    L = rollout.completion_BL.shape[1]  # a canvas of SDAR's goes on to the end of its block
    assert torch.equal(rollout.completion_BL, torch.stack([c.ids[:L] for c in canvases]))
    assert torch.equal(rollout.commit_step_BL.long(), torch.stack([c.step[:L] for c in canvases]))
    assert rollout.steps_B.tolist() == [len(c.states) for c in canvases]
    torch.testing.assert_close(rollout.commit_logp_BL.double(), torch.stack([c.logp[:L] for c in canvases]), **tolerance)
    torch.testing.assert_close(rollout.commit_entropy_BL.double(), torch.stack([c.entropy[:L] for c in canvases]), **tolerance)
    for b, canvas in enumerate(canvases):
        steps = len(canvas.states)
        told = rollout.masked_entropy_BT[b]
        want = torch.tensor(canvas.masked_entropy, dtype=torch.float64)
        torch.testing.assert_close(told[:steps].double(), want, equal_nan=True, **tolerance)
        assert told[steps:].isnan().all()
        for step, state in enumerate(canvas.states):
            written_S = rollout.step_map_BS[b] >= 0
            assert torch.equal(rollout.state_at(step)[b][written_S], state)
        if rollout.greedy_BTL is not None:
            assert rollout.greedy_BTL[b, :steps].tolist() == [ids[:L] for ids in canvas.greedy]
