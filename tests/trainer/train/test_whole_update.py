"""A whole update as the trainer makes it, against plain loops over sequences, samples and tokens with full logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.distributed import Ranks
from dllm_trainer.tasks import make_task
from dllm_trainer.train import rl
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.run import prepare
from torch import Tensor

from dllm_kernels import MaskPlan, Rollout
from tests.tiny import worst_gradient_error
from tests.trainer.conftest import rollouts_through, tiny_config

ENDS = [16, 3, 1, 7]  # tokens up to and with the first EOS, in turns; none in the first
REWARDS = [0.25, 1.0, -0.5, 2.0, 0.5, 0.5, 0.5, 0.5]  # the second group's are equal


def scores(model: Any, plan: MaskPlan, k: int, b: int) -> list[Tensor]:
    """Log-probs of the hidden tokens that may be scored; what a recipe removes the model does not get."""
    removed_S = torch.zeros_like(plan.completion_mask_BS[b]) if plan.removed_BS is None else plan.removed_BS[b]
    logp_SV = model(input_ids=plan.noisy_ids[k, b][~removed_S][None]).logits[0].log_softmax(-1)
    wanted_S = (plan.masked[k, b] & plan.completion_mask_BS[b])[~removed_S]
    return [logp_SV[s, plan.input_ids_BS[b][~removed_S][s]] for s in wanted_S.nonzero()[:, 0].tolist()]


def clipped(difference: Tensor, advantage: float, epsilon: float) -> Tensor:
    ratio = difference.exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def diffu_grpo(models: dict[str, Any], plan: MaskPlan, rewards: list[float], tokens: list[int]) -> Tensor:
    """Mean over all tokens, by differences to the mean reward, with k3 at 0.04."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(tokens)):
        group = rewards[b // 4 * 4 : b // 4 * 4 + 4]
        rows = zip(*(scores(models[who], plan, 0, b) for who in ("policy", "old", "reference")), strict=True)
        for now, old, ref in rows:
            total = total + clipped(now - old, rewards[b] - sum(group) / 4, 0.5)
            total = total + 0.04 * ((ref - now).exp() - (ref - now) - 1)
    return total / sum(tokens)


def espo(models: dict[str, Any], plan: MaskPlan, rewards: list[float], tokens: list[int]) -> Tensor:
    """Mean over sequences, against the mean of the others, ELBOs over length in the ratio, and k2 at 0.01."""
    total, length = torch.zeros((), dtype=torch.float64), tokens[0]
    for b in range(len(tokens)):
        group = rewards[b // 4 * 4 : b // 4 * 4 + 4]
        elbo = {who: torch.zeros((), dtype=torch.float64) for who in models}
        for who, model in models.items():
            for k in range(4):
                found = scores(model, plan, k, b)
                elbo[who] = elbo[who] + (sum(found) * (length + 1) / len(found) / 4 if found else 0.0)
        advantage = rewards[b] - (sum(group) - rewards[b]) / 3
        total = total + clipped((elbo["policy"] - elbo["old"]) / length, advantage, 0.2)
        total = total + 0.01 * (elbo["policy"] - elbo["reference"]).square() / 2 / length
    return total / len(tokens)


def bgpo(models: dict[str, Any], plan: MaskPlan, rewards: list[float], tokens: list[int]) -> Tensor:
    """Mean over both groups; only the first, whose rewards differ, is in the plan. 1 + d or e^d by the sign of A."""
    total, group = torch.zeros((), dtype=torch.float64), torch.tensor(rewards[:4], dtype=torch.float64)
    for b, advantage in enumerate(((group - group.mean()) / (group.std() + 1e-4)).tolist()):
        for k in range(4):
            now, old = (scores(models[who], plan, k, b) for who in ("policy", "old"))
            d = sum((n - o for n, o in zip(now, old, strict=True)), torch.zeros((), dtype=torch.float64)) * tokens[b] / len(now)
            total = total - advantage * (1 + d if advantage >= 0 else d.exp()) / 4
    return total / 8


@pytest.mark.slow
@pytest.mark.parametrize("micro", ["null", "1", "3"])
@pytest.mark.parametrize(("loss", "window", "samples"), [(diffu_grpo, "eos", 1), (espo, "completion", 4), (bgpo, "eos", 4)])
def test_the_second_inner_iteration_has_the_gradient_of_plain_loops(
    loss: Any, window: str, samples: int, micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = loss.__name__
    keys = [f"rl.algorithm={name}", f"rl.samples={samples}", "rl.prompts=2", "rl.updates=1", "rl.inner_iterations=2"]
    config = tiny_config(tmp_path, *keys, f"rl.micro_batch={micro}", "rl.gap_every=0", "rl.lr=0.01", "rl.max_grad_norm=1e9")
    setup = prepare(config, make_task(config.task, seed=0), Ranks())
    setup.trained.double()
    models = {"old": copy.deepcopy(setup.model).requires_grad_(False)}
    with torch.no_grad():
        for parameter in (reference := copy.deepcopy(setup.model).requires_grad_(False)).parameters():
            parameter.mul_(1.1)
    if name != "bgpo":
        models["reference"] = setup.reference = reference
    eos = setup.facts.eos_id
    assert eos is not None

    def ending_early(rollout: Rollout) -> Rollout:
        completion_BL = torch.where(rollout.completion_BL == eos, 5, rollout.completion_BL)
        for b, end in enumerate(ENDS * 2):
            if end < completion_BL.shape[1]:
                completion_BL[b, end - 1 :: 2] = eos
        rollout.ids_BS.masked_scatter_(rollout.completion_mask_BS, completion_BL)
        return rollout

    seen: dict[str, Any] = {"steps": []}
    made, step = rl.make_batches, rl.guarded_step

    def batches(objective: Any, plans: list[MaskPlan], *args: Any, **kwargs: Any) -> Any:
        seen["plans"] = plans
        return made(objective, plans, *args, **kwargs)

    def guarded(model: Any, *args: Any) -> float:
        seen["steps"].append((copy.deepcopy(model), {n: p.grad.clone() for n, p in model.named_parameters()}))
        return step(model, *args)

    rollouts_through(monkeypatch, ending_early)
    for attribute, replacement in (("make_batches", batches), ("guarded_step", guarded), ("guard_groups", lambda *_: None)):
        monkeypatch.setattr(rl, attribute, replacement)
    setup.__dict__["reward"] = lambda examples, texts: REWARDS
    list(rl.rl_updates(setup, make_optimizer(setup.trained, config.rl)))
    (policy, got), plan = seen["steps"][1], seen["plans"][1]
    assert len(plan.input_ids_BS) == (4 if name == "bgpo" else 8)
    tokens = (ENDS * 2)[: len(plan.input_ids_BS)] if window == "eos" else [16] * 8
    policy.zero_grad()
    loss({"policy": policy, **models}, plan, REWARDS, tokens).backward()
    want = {n: p.grad for n, p in policy.named_parameters()}
    assert worst_gradient_error(got, want) < 2e-6  # row weights and advantages are fp32
