"""Each line of the README's table of what replaces what: their lines, written out on full logits, and ours."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dllm_kernels import (
    accumulate,
    bgpo_loss,
    elbo_loss,
    estimate_elbo,
    generate,
    headless,
    make_mask_plan,
    score_tokens,
    select_steps,
    step_entropy,
    trajectory_rows,
)
from dllm_kernels.objectives import BGPO, Batch
from tests.rollouts import published
from tests.rollouts.compare import IDS, MASK, RAGGED, both
from tests.rollouts.test_layouts import causal
from tests.tiny import eurobert, gradients, worst_gradient_error

README = (Path(__file__).parent.parent / "README.md").read_text()
TABLE = re.search(r"## Who uses what\n.*?\|---\|---\|---\|\n(.*?)\n\n", README, flags=re.DOTALL).group(1).splitlines()
B, K, S = 3, 4, 9
KEYS = {"seed": 0, "sequence_ids": torch.arange(B), "mask_id": MASK}


def texts():
    """Ids `[B, S]`, the scored ones, and their number."""
    ids = torch.randint(3, 10, (B, S), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(S) >= torch.tensor([[2], [3], [4]])
    return ids, scored, scored.sum(-1)


def masked_diffusion_loss():
    ids, scored, _ = texts()
    model = eurobert()
    plan = make_mask_plan(ids, scored, law="bernoulli", t_min=1e-3, samples=1, **KEYS)
    noisy, masked, p_mask = plan.noisy_ids[0], plan.masked[0], plan.p_mask_KB[0][:, None].expand(B, S)
    logits = model(input_ids=noisy).logits
    theirs = (F.cross_entropy(logits[masked], ids[masked], reduction="none") / p_mask[masked]).sum() / (B * S)
    theirs.backward()
    want = gradients(model)
    model.zero_grad()
    with headless(model) as body:
        ours = elbo_loss(body(noisy), body.weight, ids, masked, p_mask, **body.options)
    ours.backward()
    assert_close(ours, theirs, rtol=1e-6, atol=0, check_dtype=False)
    assert worst_gradient_error(gradients(model), want) < 1e-6


def likelihood():
    ids, scored, lengths = texts()
    model = eurobert()
    options = {"law": "exact", "samples": 8, "mask_id": MASK, "sequence_ids": KEYS["sequence_ids"]}
    estimate = estimate_elbo(model, ids, scored, **options)
    plan = make_mask_plan(ids, scored, law="exact", samples=8, **KEYS)
    assert all(len(set(plan.counts[:, b].tolist())) == min(8, int(lengths[b])) for b in range(B)), "each count in turn"
    total = torch.zeros(B, dtype=torch.float64)
    for k in range(8):
        logits = model(input_ids=plan.noisy_ids[k]).logits.detach()
        loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * plan.masked[k]
        total -= loss.sum(-1) / (plan.counts[k] / lengths) / 8
    assert_close(estimate.elbo_B, total, rtol=1e-6, atol=1e-6)


def rollout(**options):
    return lambda: both(eurobert(layers=1, hidden=16), sequence_ids=IDS, **options)


def thresholds_and_the_cache():
    rollout(sampler="fast_dllm", block_length=4, threshold=0.3)()
    rollout(sampler="sdar", block_length=3, steps=2, threshold=0.3)()
    model = causal("Qwen3")
    see = {"see": lambda prompt: published.block_causal(model, prompt, block_length=4)}
    both(model, sampler="sdar", block_length=4, steps=3, length=7, threshold=0.4, sequence_ids=IDS, cache=True, **see)


def entropies_of_a_rollout():
    model = eurobert(layers=1, hidden=16)
    options = {"length": 6, "steps": 3, "block_length": 6, "mask_id": MASK, "temperature": 1.0, "sequence_ids": IDS}
    found = generate(model, [prompt[:2] for prompt in RAGGED], **options)
    rows = torch.zeros(3, 3)  # mean entropy of what a step reveals, from whole rows of probabilities
    for step in range(3):
        logits = model(input_ids=found.state_at(step)).logits.detach()
        logits[..., MASK] = -torch.inf
        p = logits.softmax(-1)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
        revealed = found.step_map_BS == step
        rows[step] = (entropy * revealed).sum(-1) / revealed.sum(-1)
    ours = step_entropy(found.commit_entropy_BL, found.commit_step_BL)
    assert_close(ours, rows, rtol=1e-5, atol=1e-5)
    chosen = select_steps(ours, 2)
    assert torch.equal(chosen, rows.t().topk(2).indices)
    plan = trajectory_rows(found, chosen)
    for j in range(2):
        for b in range(3):
            assert torch.equal(plan.noisy_ids[j, b], found.state_at(int(chosen[b, j]))[b])
            assert torch.equal(plan.scored[j, b], found.step_map_BS[b] == chosen[b, j])


def bgpo_of_an_actor():
    ids, scored, lengths = texts()
    model, advantages = eurobert(), torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    plan = make_mask_plan(ids, scored, law="exact", samples=K, **KEYS)
    old = estimate_elbo(model, ids, scored, law="exact", samples=K, mask_id=MASK, sequence_ids=KEYS["sequence_ids"])
    old_BK = old.sample_elbo_BK + torch.linspace(-0.1, 0.1, B * K, dtype=torch.float64).view(B, K)
    for k in range(K):
        logits = model(input_ids=plan.noisy_ids[k]).logits
        loss = torch.zeros((), dtype=torch.float64)
        for b in range(B):
            mask = plan.masked[k, b]
            p_mask = plan.counts[k, b] / lengths[b]
            elbo = -(F.cross_entropy(logits[b][mask], ids[b][mask], reduction="none") / p_mask).sum()
            d = elbo - old_BK[b, k]
            ratio = torch.exp(torch.log(1 + d)) if advantages[b] > 0 else torch.exp(d)
            loss = loss - advantages[b] * ratio / (B * K)
        loss.backward()
    want = gradients(model)
    for way in ("bgpo_loss", "accumulate"):
        model.zero_grad()
        if way == "accumulate":
            accumulate(model, plan, BGPO, Batch({"advantages": advantages}, {"old_sample_elbo": old_BK}))
        else:
            for k in range(K):
                with headless(model) as body:
                    hidden = body(plan.noisy_ids[k])
                    weight = plan.weight_KB[k, :, None]
                    common = {"old_elbo": old_BK[:, k], "advantages": advantages, "samples": K, **body.options}
                    bgpo_loss(hidden, body.weight, ids, plan.masked[k], weight, **common).backward()
        assert worst_gradient_error(gradients(model), want) < 1e-5, way


def per_token_log_probs():
    ids, _, _ = texts()
    model, keep = eurobert(), 5
    noisy = ids.masked_fill(torch.arange(S) >= S - keep, MASK)
    logits = model(input_ids=noisy).logits[:, -keep:]
    theirs = -F.cross_entropy(logits.reshape(B * keep, -1), ids[:, -keep:].reshape(-1), reduction="none")
    rows = (torch.arange(B * S).view(B, S))[:, -keep:].reshape(-1)
    with headless(model) as body:
        ours = score_tokens(body(noisy), body.weight, ids.reshape(-1)[rows], rows=rows, **body.options).logp
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)


LINES = {
    "ML-GSAI/LLaDA `GUIDELINES.md`": masked_diffusion_loss,
    "ML-GSAI/LLaDA `get_log_likelihood.py`": likelihood,
    "ML-GSAI/LLaDA, d1 lineage `generate.py`": rollout(block_length=4, steps=6, temperature=0.7, seed=3),
    "Dream `generation_utils.py`": lambda: [
        rollout(sampler="dream", steps=5, alg=alg, shift=1, temperature=0.7)()
        for alg in ("origin", "maskgit_plus", "topk_margin", "entropy")
    ],
    "Fast-dLLM, SDAR `generate.py`": thresholds_and_the_cache,
    "EGSPO `egspo_trainer.py`": entropies_of_a_rollout,
    "yjyddq/DARE `llada_dp_actor_bgpo.py`": bgpo_of_an_actor,
    "d1 lineage `_get_per_token_logps`": per_token_log_probs,
}


def test_the_table_has_these_lines():
    assert [line.split(" | ")[0].removeprefix("| ") for line in TABLE] == list(LINES)


LONG = ("Dream `generation_utils.py`", "Fast-dLLM, SDAR `generate.py`")  # tests/rollouts tries them at length


@pytest.mark.parametrize("line", [pytest.param(line, marks=[pytest.mark.slow] * (line in LONG)) for line in LINES])
def test_what_replaces_what_gives_the_same(line):
    LINES[line]()
