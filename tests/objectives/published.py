"""One inner iteration of any recipe on given rollouts that end early, as the trainer makes it, in float64.

Everything is made by formulas, so that the authors' own functions could be run on the same numbers: see `test_published.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dllm_trainer.config import load_config
from dllm_trainer.facts import Facts
from dllm_trainer.train.algorithms import Scores, choose_algorithm, make_batches
from dllm_trainer.train.window import window_of

from dllm_kernels import MaskPlan, Rollout, accumulate, make_mask_plan
from dllm_kernels.masks import steps
from dllm_kernels.objectives import Batch, Objective, Update
from tests.tiny import eurobert, gradients

F64 = torch.float64
B, PROMPT, L, STEPS = 4, 5, 12, 6
V, MASK, EOS = 24, 23, 22
ENDS = [3, 12, 7, 1]  # tokens up to and with the first EOS; other tokens and further EOS lie behind it
REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.25, 0.75], dtype=F64), torch.tensor([0, 0, 1, 1])
ONE_GROUP = ("mdpo",)  # of two, the advantages are the same but for the sign, and so are the steps that MDPO chooses by them
# beside the recipe's own, what fits so few tokens, and the forms that the code has
KEYS = {
    "bgpo": (
        "samples=4",
        "options.window=12",
        "options.clip_low=0.2",
        "options.clip_high=0.2",
        "options.dual_clip=3",
        "options.aggregate=tokens",
    ),
    "d2": ("options.segments=4",),
    "ebpo": ("samples=4",),
    "egspo": ("options.selected_steps=3",),
    "egspo_sa": ("options.selected_steps=3",),
    "mdpo": ("options.selected_steps=3",),
    "gdsd": ("options.epsilon_low=0.3", "options.epsilon_high=0.3"),
    "trace_rl": ("options.shrink=2",),
}
# and of their laws; the code of coupled-GRPO draws one t for the batch, for models that predict the next token
LAWS = {"spg": {"block_length": 4}, "coupled_grpo": {"t": 0.4, "shift": 1}}
ON_POLICY = ("justgrpo",)  # whose code has no old scores


def model(seed: float):
    """A layer of attention whose parameters are sines; seeds that are near make models that are."""
    made = eurobert(vocab=V, hidden=16, layers=1)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(made.named_parameters()):
            place = torch.arange(parameter.numel(), dtype=F64).view(parameter.shape)
            wave = torch.sin(0.7 * place + number + seed * torch.cos(1.3 * place))
            parameter.copy_(1 + 0.2 * wave if "norm" in name else 0.6 * wave)
    return made


def rollout(name: str) -> Rollout:
    ids_BS = (7 * torch.arange(B * (PROMPT + L)).view(B, -1) + torch.arange(B)[:, None] ** 2) % EOS
    completion_BS = (torch.arange(PROMPT + L) >= PROMPT).expand(B, -1)
    for ids_S, end in zip(ids_BS, ENDS, strict=True):
        # of TraceRL's padding, which is the EOS, the first is kept; all that follows an EOS is padding there
        ids_S[PROMPT + end - 1 :: 1 if name == "trace_rl" else 2] = EOS
    step_BL = (5 * torch.arange(L) + torch.arange(B)[:, None]) % L // (L // STEPS)
    entropy_BL = 1.5 + torch.sin(1.0 + step_BL + 2.0 * torch.arange(B)[:, None])
    zeros_BL = torch.zeros(B, L)
    return Rollout(
        ids_BS=ids_BS,
        completion_mask_BS=completion_BS,
        commit_step_BL=step_BL.int(),
        commit_logp_BL=zeros_BL,
        commit_entropy_BL=entropy_BL,
        masked_entropy_BT=torch.ones(B, STEPS),
        steps_B=torch.full((B,), STEPS),
        failed_B=torch.zeros(B, dtype=torch.bool),
        sequence_ids_B=torch.arange(B) + 10,
        mask_id=MASK,
        greedy_BTL=(3 * torch.arange(STEPS)[:, None] + torch.arange(L) * (1 + torch.arange(B)[:, None, None])) % EOS,
    )


@dataclass
class Case:
    """What an inner iteration was made of, and what it gave."""

    rollout: Rollout
    plan: MaskPlan
    fresh: MaskPlan | None  # masks beside those of the loss
    batch: Batch
    objective: Objective
    denominator: float
    attention_BS: torch.Tensor | None
    kept_N: torch.Tensor
    steps_BJ: torch.Tensor | None  # the states that were chosen
    policy: torch.nn.Module
    old: torch.nn.Module
    ref: torch.nn.Module
    loss: float
    gradients: dict[str, torch.Tensor]

    @property
    def figures(self) -> tuple[float, float, float]:
        return figures(self.loss, self.gradients)


def figures(loss: float, grads: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """The loss, the gradient's norm, and its product with a wave: three numbers that tell gradients apart."""
    flat = torch.cat([grads[name].reshape(-1) for name in sorted(grads)])
    return loss, float(flat.norm()), float(flat @ torch.sin(torch.arange(len(flat), dtype=F64)))


def greedy_reward(completion_BJL: torch.Tensor) -> torch.Tensor:
    return completion_BJL.double().mean(-1) / V


def case(name: str, *keys: str) -> Case:
    """`keys` are of `rl`, such as "window=eos"."""
    overrides = [f"rl.algorithm={name}", "rl.prompts=2", "rl.group=2", *(f"rl.{key}" for key in (*KEYS.get(name, ()), *keys))]
    config = load_config(overrides=overrides).rl
    algorithm, window = choose_algorithm(config, L, STEPS), window_of(config, Facts("tiny", mask_id=MASK, eos_id=EOS))
    sampled, (policy, old, ref) = rollout(name), (model(seed) for seed in (0.0, 0.03, -0.05))
    groups = torch.zeros_like(GROUPS) if name in ONE_GROUP else GROUPS
    rewards = algorithm.rewards(REWARDS, groups, window.lengths(sampled.ids_BS, sampled.completion_mask_BS))
    found = algorithm.signal(rewards)
    kept_N, states = found.kept_N, algorithm.states(window.of_trajectory(sampled), found.kept_N, 0)

    def plan_of(iteration: int) -> MaskPlan:
        if states is not None:
            return states.plan
        return make_mask_plan(
            sampled.ids_BS,
            sampled.completion_mask_BS,
            law=config.law,
            samples=config.samples,
            seed=0,
            sequence_ids=sampled.sequence_ids_B,
            mask_id=MASK,
            iteration=iteration,
            **window.plan_options,
            **{**config.law_options(), **LAWS.get(name, {})},
        ).cut(sequences=kept_N)

    plan, entries = plan_of(0), found.of(slice(0, B))[0]
    attention_BS = window.attention(sampled.ids_BS, sampled.completion_mask_BS, None)
    options = {} if attention_BS is None else {"model_kwargs": {"attention_mask": attention_BS[kept_N].long()}}
    scores, fresh = Scores(old, ref, options), []

    def fresh_plan() -> MaskPlan:
        fresh.append(plan_of(1))
        return fresh[0]

    update = Update(rewards, kept_N, states, scores.old, scores.ref, fresh_plan, greedy_reward, lambda x: (x, slice(0, B)))
    entries |= algorithm.entries(update)
    off_policy = name not in ON_POLICY
    (batch,) = make_batches(algorithm.objective, [plan], entries, scores.old, scores.ref, off_policy=off_policy)
    denominator = found.denominator or float(steps.number(plan))
    report = accumulate(policy, plan, algorithm.objective, batch, denominator=denominator, **options)
    made = sampled, plan, fresh[0] if fresh else None, batch, algorithm.objective, denominator, attention_BS, kept_N
    chosen_BJ = None if states is None else states.steps_BJ
    return Case(*made, chosen_BJ, policy, old, ref, float(report.loss), gradients(policy))
