"""An RL step as the published trainers of d1's lineage do it, in pure PyTorch: full logits everywhere.

Rollouts call the model and its head on all positions in every denoising step. Scores are of the logits `[B,
S, V]`, the slice of the completion and `F.cross_entropy`; in the update the graphs of all K samples live
until one backward. The losses of `WRITTEN` are written here from the papers and their code, independent of
the library's; the others call its objective on these scores.

In its favour: noise, softmax and confidence on the block's undecided rows alone, where d1 has float64 noise
on all rows; entropies only where an algorithm wants them; the old and reference passes one sample at a time,
where d1 stacks all; sums over log-probs in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from dllm_trainer.train.algorithms import Scores
from torch import Tensor, nn

from benchmarks.registry import Result, Runner
from benchmarks.suites.step_inputs import TEMPERATURE, Clock, Inputs, Lesson, make_lesson
from dllm_kernels import Rollout, noise
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.noise import Stream
from dllm_kernels.objectives import RECIPES
from dllm_kernels.rollouts.schedules import commits_per_step

NOISE_ROWS = 32  # at once: our noise in PyTorch takes a dozen int64 tensors of its size


def complete(x: Inputs) -> Rollout:
    """The step's rollout."""
    algorithm = x.config.algorithm
    return sample(
        x.behaviour,
        x.prompts_BP,
        length=x.sizes["L"],
        block=x.sizes["R"],
        steps=x.sizes["T"],
        mask_id=x.mask_id,
        entropy=algorithm.startswith("egspo"),
        greedy=RECIPES[algorithm].greedy,
    )


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts_BP: Tensor,
    *,
    length: int,
    block: int,
    steps: int,
    mask_id: int,
    entropy: bool = False,
    greedy: bool = False,
) -> Rollout:
    """LLaDA's generate.py with our noise, so that it draws what `generate` draws for sequences 0, 1, 2 ..."""
    (B, P), L, device = prompts_BP.shape, length, prompts_BP.device
    ids_BS = F.pad(prompts_BP, (0, L), value=mask_id)
    place_L, sequence_ids_B = torch.arange(L, device=device), torch.arange(B, device=device)
    key_BL = noise.row_bits(0, Stream.TOKEN, sequence_ids_B[:, None], torch.zeros_like(place_L[0]), place_L)
    step_BL = torch.full((B, L), -1, dtype=torch.int32, device=device)
    logp_BL, entropy_BL = torch.zeros(2, B, L, device=device)
    likeliest: list[Tensor] = []
    per_block = steps * block // L
    for step, count in enumerate(commits_per_step(block, per_block) * (L // block)):
        first = step // per_block * block
        span = slice(first, first + block)
        logits_BSV = model(input_ids=ids_BS).logits
        logits_BSV[..., mask_id] = -torch.inf  # not theirs; without it the mask may be drawn
        if greedy:
            tail_BL = ids_BS[:, P:]
            likeliest.append(torch.where(tail_BL == mask_id, logits_BSV[:, P:].argmax(-1), tail_BL))
        undecided_BR = ids_BS[:, P:][:, span] == mask_id
        z_NV = logits_BSV[:, P:][:, span][undecided_BR].float()
        del logits_BSV
        key_N = key_BL[:, span][undecided_BR]
        token_N = torch.cat(
            [
                (z + TEMPERATURE * noise.gumbel(key, z.shape[1], step=step)).argmax(-1)
                for z, key in zip(z_NV.split(NOISE_ROWS), key_N.split(NOISE_ROWS), strict=True)
            ]
        )
        all_logp_NV = z_NV.log_softmax(-1)
        found_N = all_logp_NV.gather(1, token_N[:, None])[:, 0]
        confidence_BR = torch.full(undecided_BR.shape, -1.0, device=device)
        chosen_BC = confidence_BR.masked_scatter(undecided_BR, found_N.exp()).argsort(dim=-1, descending=True, stable=True)[
            :, :count
        ]
        _commit(ids_BS[:, P:][:, span], undecided_BR, token_N, chosen_BC)
        _commit(logp_BL[:, span], undecided_BR, found_N, chosen_BC)
        _commit(step_BL[:, span], undecided_BR, torch.full_like(token_N, step, dtype=torch.int32), chosen_BC)
        if entropy:
            entropy_N = -(all_logp_NV.exp() * all_logp_NV).nan_to_num().sum(-1)
            _commit(entropy_BL[:, span], undecided_BR, entropy_N, chosen_BC)
    return Rollout(
        ids_BS=ids_BS,
        completion_mask_BS=(torch.arange(P + L, device=device) >= P).expand(B, -1),
        commit_step_BL=step_BL,
        commit_logp_BL=logp_BL,
        commit_entropy_BL=entropy_BL,
        masked_entropy_BT=torch.zeros(B, steps, device=device),
        steps_B=torch.full((B,), steps, device=device),
        failed_B=torch.zeros(B, dtype=torch.bool, device=device),
        sequence_ids_B=sequence_ids_B,
        mask_id=mask_id,
        greedy_BTL=torch.stack(likeliest, 1).int() if greedy else None,
    )


def _commit(into_BR: Tensor, undecided_BR: Tensor, values_N: Tensor, chosen_BC: Tensor) -> None:
    """Write, in place, the values of the chosen among the undecided."""
    into_BR.scatter_(1, chosen_BC, into_BR.masked_scatter(undecided_BR, values_N).gather(1, chosen_BC))


def token_logps(model: nn.Module, plan: MaskPlan, sample: int, prompt: int) -> Tensor:
    """Log-probs `[B, L]` of the completion, or of a scored draft, under one sample's masks, as d1's `_get_per_token_logps`.

    In float64 from there on, unlike d1: fp32 sums of a thousand nats would lose 1e-4 of a ratio, and the peer
    is judge at the largest sizes.
    """
    logits_BLV = model(input_ids=plan.noisy_ids[sample]).logits[:, prompt:]
    ids_KBS = plan.input_ids_BS.repeat(len(plan.sample_K), 1, 1)
    ids_KBS.view(-1)[plan.rows.index] = plan.rows.target  # of drafts, where those are scored
    target_N = ids_KBS[sample, :, prompt:].reshape(-1)
    logits_NV = logits_BLV.reshape(-1, logits_BLV.shape[-1])
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    return -F.cross_entropy(logits_NV, target_N, reduction="none").view(logits_BLV.shape[:2]).double()


class FullScores(Scores):
    """Old and reference scores from full logits."""

    @torch.no_grad()
    def _scores(self, model: nn.Module, plan: MaskPlan, kind: str) -> Tensor:
        prompt = int((~plan.completion_mask_BS[0]).sum())
        logp_KBL = torch.stack([token_logps(model, plan, k, prompt) for k in range(len(plan.sample_K))])
        logp_KBL = torch.where(plan.scored[:, :, prompt:], logp_KBL, 0.0)
        if kind == "logp":
            return F.pad(logp_KBL, (prompt, 0)).transpose(0, 1)
        elbo_BK = sample_elbos(logp_KBL, plan)
        return elbo_BK if kind == "sample_elbo" else sequence_elbos(elbo_BK, plan)


def sample_elbos(logp_KBL: Tensor, plan: MaskPlan) -> Tensor:
    """`[B, K]`: the weighted sums over what each sample scores, 0 elsewhere already."""
    return (logp_KBL.sum(-1) * plan.weight_KB).t()


def sequence_elbos(elbo_BK: Tensor, plan: MaskPlan) -> Tensor:
    return (elbo_BK * plan.share_K).sum(-1)


def ppo(delta: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """`-min(rho A, clip(rho) A)` with `rho = e^delta`."""
    ratio = delta.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def k3(delta: Tensor) -> Tensor:
    """`delta = logp - ref`."""
    return (-delta).exp() + delta - 1


def bgpo(logp_KBL: Tensor, lesson: Lesson) -> Tensor:
    """arXiv 2510.11683: the bound that is a sum over samples."""
    A_B1 = lesson.batch.per_sequence["advantages"][:, None]
    d_BK = sample_elbos(logp_KBL, lesson.plan) - lesson.batch.per_sample["old_sample_elbo"]
    ratio_BK = torch.where(A_B1 >= 0, 1 + d_BK, torch.exp(torch.where(A_B1 >= 0, 0.0, d_BK)))
    return -(A_B1 * ratio_BK).mean(1).sum() / lesson.denominator


def gdpo(logp_KBL: Tensor, lesson: Lesson) -> Tensor:
    """arXiv 2510.08554, the form of its code: 1/L inside the ratio."""
    return ppo(_gdpo_delta(logp_KBL, lesson) / logp_KBL.shape[-1], _advantages(lesson), 0.5, 0.5).sum() / lesson.denominator


def _gdpo_delta(logp_KBL: Tensor, lesson: Lesson) -> Tensor:
    return sequence_elbos(sample_elbos(logp_KBL, lesson.plan), lesson.plan) - lesson.batch.per_sequence["old_elbo"]


def _advantages(lesson: Lesson) -> Tensor:
    return lesson.batch.per_sequence["advantages"]


def espo(logp_KBL: Tensor, lesson: Lesson) -> Tensor:
    """arXiv 2512.03759: 1/L inside the ratio, and a quadratic distance to the reference."""
    entries, L = lesson.batch.per_sequence, logp_KBL.shape[-1]
    elbo_B = sequence_elbos(sample_elbos(logp_KBL, lesson.plan), lesson.plan)
    loss_B = ppo((elbo_B - entries["old_elbo"]) / L, entries["advantages"], 0.2, 0.2)
    return (loss_B + 0.01 * (elbo_B - entries["ref_elbo"]).square() / 2 / L).sum() / lesson.denominator


def diffu_grpo(logp_KBL: Tensor, lesson: Lesson) -> Tensor:
    """arXiv 2504.12216: a clipped ratio and a distance per token, the mean over all tokens."""
    L = logp_KBL.shape[-1]
    old_KBL, ref_KBL = (lesson.batch.per_sample[name].transpose(0, 1)[..., -L:] for name in ("old_logp", "ref_logp"))
    terms_KBL = ppo(logp_KBL - old_KBL, lesson.batch.per_sequence["advantages"][:, None], 0.5, 0.5)
    return (terms_KBL + 0.04 * k3(logp_KBL - ref_KBL)).mean(0).sum() / lesson.denominator


def egspo(logp_KBL: Tensor, lesson: Lesson) -> Tensor:
    """arXiv 2603.12554: the joint log-prob of a step's tokens, divided by their number."""
    step_BK, entries = logp_KBL.sum(-1).t(), lesson.batch.per_sample
    terms_BK = ppo(step_BK - entries["old_sample_elbo"], lesson.batch.per_sequence["advantages"][:, None], 0.2, 0.5)
    terms_BK = terms_BK + 0.04 * k3(step_BK - entries["ref_sample_elbo"])
    tokens = float(lesson.plan.counts.max())
    return terms_BK.sum() / tokens / lesson.denominator


WRITTEN: dict[str, Callable[[Tensor, Lesson], Tensor]] = {
    "bgpo": bgpo,
    "gdpo": gdpo,
    "espo": espo,
    "diffu_grpo": diffu_grpo,
    "egspo": egspo,
}


def published_step(x: Inputs, clock: Clock) -> Runner:
    L, prompt = x.sizes["L"], x.sizes["P"]

    def run() -> Result:
        clock.start()
        with clock("rollout"):
            rollout = complete(x)
        scores = FullScores(x.behaviour, x.reference, {})
        lesson = make_lesson(x, rollout, scores, clock)
        plan = lesson.plan
        with clock("update"):
            x.optimizer.zero_grad(set_to_none=False)
            scored_KBL = plan.scored[:, :, -L:]
            logp_KBL = torch.stack([token_logps(x.model, plan, k, prompt) for k in range(len(plan.sample_K))])
            logp_KBL = torch.where(scored_KBL, logp_KBL, 0.0)
            if x.config.algorithm in WRITTEN:
                loss = WRITTEN[x.config.algorithm](logp_KBL, lesson)
            else:
                loss = x.objective.contributions(logp_KBL[scored_KBL], plan, lesson.batch) / lesson.denominator
            loss.backward()
            x.optimizer.step()
        once = plan.noisy_ids.numel()  # a pass over all samples
        rows = x.sizes["T"] * rollout.ids_BS.numel() + (scores.passes + 3) * once
        clock.flops = x.forward_flops(rows, rows)
        return x.result(loss, rollout)

    return run
