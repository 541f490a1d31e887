"""TRL's `GRPOTrainer` for masked diffusion models: its rewards, datasets, arguments and processes, our rollouts and gradients.

    trainer = DiffusionGRPOTrainer(model, reward_funcs=[correct, short], processing_class=tokenizer, train_dataset=data,
                                   args=DiffusionGRPOConfig("out", algorithm="bgpo", mask_id=126336))

`DiffusionLogps` (`logps.py`, which needs no TRL) is the other way in: a trainer keeps its own loss.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels import MaskPlan, Rollout, accumulate, generate, make_mask_plan, noise
from dllm_kernels.accumulation.scores import adapters_off, score_samples
from dllm_kernels.integrations import needs
from dllm_kernels.integrations.logps import DiffusionLogps
from dllm_kernels.integrations.transformers import check_parallelism, find_mask_id
from dllm_kernels.masks import steps
from dllm_kernels.masks.tails import eos_tail
from dllm_kernels.model.layouts import check_block_length
from dllm_kernels.objectives import RECIPES, Batch, Rewards, Signal, Update, advantage_signal

with needs("trl"):
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import create_model_from_path

with needs("transformers", "pip install 'dllm-kernels[train]'"):
    from transformers import GenerationConfig


@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """`GRPOConfig`, and what masked diffusion adds. `per_device_train_batch_size` is the number of completions of a
    process and optimizer step; memory is set by `samples_per_pass` and `sequences_per_pass` instead.
    """

    mask_id: int | None = None  # None: the tokenizer's mask token, or that of the model's config
    shift: int = 0  # 1 where position i is predicted by row i - 1 (Dream)
    algorithm: str = "bgpo"  # of `dllm_kernels.objectives.RECIPES`
    algorithm_options: dict[str, Any] = field(default_factory=dict)  # over the published ones: beta, epsilon ...
    law: str | None = None  # of `make_mask_plan`; None: the algorithm's
    law_options: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None  # masks per completion; None: the algorithm's
    causal_block: int | None = None  # of a block-causal model: tokens per block, in which masks are drawn
    rollout: dict[str, Any] = field(default_factory=dict)  # of `generate`: sampler, steps, block_length, eos_id ...
    suppress: list[int] = field(default_factory=list)  # ids that are never predicted, beside the mask id
    samples_per_pass: int = 1
    sequences_per_pass: int | None = None


# arguments of TRL's that would change nothing here, and what does instead
_ELSEWHERE = {
    **dict.fromkeys(("use_vllm", "use_transformers_continuous_batching", "generation_kwargs"), "rollout has generate's options"),
    **dict.fromkeys(("min_p", "repetition_penalty", "cache_implementation"), "rollout has generate's options"),
    **dict.fromkeys(("beta", "epsilon", "epsilon_high", "delta"), "algorithm_options has the algorithm's own"),
    **dict.fromkeys(("loss_type", "importance_sampling_level", "off_policy_mask_threshold"), "algorithm says what is minimised"),
    **dict.fromkeys(("entropy_coef", "use_adaptive_entropy", "top_entropy_quantile"), "algorithm says what is minimised"),
    **dict.fromkeys(("router_aux_loss_coef", "cast_lm_head_to_fp32", "use_liger_kernel"), "the head's statistics are fp32"),
    "fp16": "gradients have no scaler; bf16 needs none",
    "mask_truncated_completions": "every completion has max_completion_length tokens",
    "sync_ref_model": "the reference is the model as it was at the start",
}


class DiffusionGRPOTrainer(DiffusionLogps, GRPOTrainer):
    """`GRPOTrainer` with rollouts by `generate` and the exact gradient of one of our algorithms by `accumulate`.

    Arguments are TRL's; `args` is a `DiffusionGRPOConfig`. An algorithm that learns from advantages gets TRL's
    (`scale_rewards`, `reward_weights`, completions without a reward); others get the weighted rewards.
    `num_iterations` is the number of optimizer steps per rollout. Rollouts, masks and gradients do not depend on the
    number of processes. A reference policy, where the algorithm wants one, is the model with its adapters off, or a
    frozen copy of it as it came.

    Raises ValueError or TypeError naming the argument, for those of TRL's too that would have no effect.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DiffusionGRPOConfig | None = None, *arguments: Any, **named: Any
    ) -> None:
        if not isinstance(args, DiffusionGRPOConfig):
            raise TypeError(f"args must be a DiffusionGRPOConfig, got {type(args).__name__}")
        published = {entry.name: entry.default for entry in fields(GRPOConfig)}
        for name, instead in _ELSEWHERE.items():
            if name in published and (value := getattr(args, name)) != published[name]:
                raise ValueError(f"{name} must be left at {published[name]!r}, got {value!r}: {instead}")
        for name in ("tools", "rollout_func", "environment_factory"):
            if named.get(name) is not None:
                raise ValueError(f"{name} must be None: completions are generate's, of one turn")
        if (args.gradient_accumulation_steps, args.steps_per_generation) != (1, 1):
            raise ValueError(
                "gradient_accumulation_steps and steps_per_generation must be 1, got "
                f"{args.gradient_accumulation_steps} and {args.steps_per_generation}: an optimizer step is one call of "
                "accumulate; samples_per_pass and sequences_per_pass set its memory"
            )
        if args.algorithm not in RECIPES:
            raise ValueError(f"algorithm must be one of {', '.join(RECIPES)}, got {args.algorithm!r}")
        self.recipe = RECIPES[args.algorithm]
        for name in ("scale_rewards", "multi_objective_aggregation"):
            if self.recipe.signal is not advantage_signal and (value := getattr(args, name)) != published[name]:
                raise ValueError(
                    f"{name} must be left at {published[name]!r} for {args.algorithm}, which makes no use of TRL's advantages, "
                    f"got {value!r}"
                )
        if self.recipe.greedy:
            raise ValueError(f"algorithm must not score intermediate states by the reward, which {args.algorithm} does")
        if isinstance(model, str):
            model = create_model_from_path(model, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        if getattr(model, "generation_config", None) is None:  # TRL writes into it
            model.generation_config = GenerationConfig()
        length = args.max_completion_length
        of_run = {} if self.recipe.from_run is None else self.recipe.from_run(length, args.rollout.get("steps") or length)
        self.options = self.recipe.choose({**of_run, **args.algorithm_options})
        self.objective = self.recipe.make(self.options)
        wants_reference = self.recipe.wants_reference(args.algorithm_options)
        adapted = named.get("peft_config") is not None or hasattr(model, "disable_adapter")
        # before TRL replaces the model's forward
        self.reference = copy.deepcopy(model).eval().requires_grad_(False) if wants_reference and not adapted else None
        super().__init__(model, reward_funcs, args, *arguments, **named)
        if self.is_deepspeed_enabled:
            raise ValueError("args must not use DeepSpeed, which runs its own backward; use FSDP2 (fsdp_version 2) or DDP")
        check_parallelism(self.accelerator)
        args.mask_id = find_mask_id(args.mask_id, self.processing_class, self.model)
        check_block_length(self.model, args.causal_block)
        if args.rollout.get("cache") is True and args.causal_block != args.rollout.get("block_length"):
            raise ValueError(
                "causal_block must be the block_length of rollouts with cache=True, which are those of a block-causal model, "
                f"got {args.causal_block} and {args.rollout.get('block_length')}"
            )
        if self.reference is not None:
            self.reference.to(self.accelerator.device)
        self._rollout: Rollout | None = None
        self._rewards_BF: Tensor | None = None  # of all processes
        self._update: list[tuple[MaskPlan, Batch]] = []  # of each inner iteration; empty where nothing is learnt
        self._denominator: float | None = None
        self._evaluated = 0  # completions of this evaluation, of all processes

    # --- rollouts and rewards, when TRL asks for them -----------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *rest: Any
    ) -> tuple[list[list[int]], None]:
        if images is not None or multimodal_fields:
            raise ValueError("train_dataset must hold texts only, got images")
        device, args = self.accelerator.device, self.args
        place_B = self.accelerator.process_index * len(prompt_ids) + torch.arange(len(prompt_ids))
        training = self.model.training
        if not training:  # an evaluation has several batches, a step has one
            place_B += self._evaluated
            self._evaluated += self.accelerator.num_processes * len(prompt_ids)
        start = f"{'train' if training else 'eval'}/{self.state.global_step}"
        names = [f"{start}/{group}" for group in (place_B // num_generations).tolist()]
        options = {"temperature": self.temperature, "top_k": self.top_k or None, **args.rollout}
        if self.top_p < 1.0:
            options["top_p"] = self.top_p
        self.model.eval()
        with self.accelerator.autocast():
            rollout = generate(
                self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False),
                [torch.tensor(ids, device=device) for ids in prompt_ids],
                length=self.max_completion_length,
                mask_id=args.mask_id,
                shift=args.shift,
                suppress=args.suppress,
                seed=args.seed,
                sequence_ids=noise.sequence_ids(names, members=(place_B % num_generations).tolist(), device=device),
                **options,
            )
        self.model.train(training)
        if bool(rollout.failed_B.any()):
            raise ValueError(f"model must give finite hidden states, but {int(rollout.failed_B.sum())} rollouts failed")
        # states of a rollout are planned in its blocks
        self._rollout = replace(rollout, settings={**rollout.settings, "causal_block": args.causal_block})
        ends = torch.tensor(self.eos_token_ids, device=device)
        ended_BL = torch.isin(rollout.completion_BL, ends).cumsum(-1) - torch.isin(rollout.completion_BL, ends).long() > 0
        return [ids[~ended].tolist() for ids, ended in zip(rollout.completion_BL, ended_BL)], None

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
        self._rewards_BF = super()._calculate_rewards(*arguments, **named)
        return self._rewards_BF

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._learn_from(output["advantages"])
        return output

    # --- what is learnt from them -------------------------------------------------------------------------------------

    def _learn_from(self, advantages_B: Tensor) -> None:
        """Plans and batches of all inner iterations, scored before the first of them."""
        rollout, args, recipe = self._rollout, self.args, self.recipe
        assert rollout is not None
        eos, real_BS = self._eos, rollout.text_mask_BS
        tail_BS = None if eos is None else eos_tail(rollout.ids_BS, rollout.completion_mask_BS, eos)
        scored_BS = rollout.completion_mask_BS if tail_BS is None else rollout.completion_mask_BS & ~tail_BS
        rewards = self._rewards(self.accelerator.gather(scored_BS.sum(-1)))
        mine = slice(start := self.accelerator.process_index * len(advantages_B), start + len(advantages_B))
        if recipe.signal is advantage_signal:
            advantages_A = self.accelerator.gather(advantages_B)
            kept_A = advantages_A.nonzero()[:, 0]
            of_all = recipe.signal(rewards, self.objective, self.options)  # for its denominator
            found = Signal(kept_A, {"advantages": advantages_A[kept_A]}, of_all.denominator)
        else:
            found = recipe.signal(rewards, self.objective, self.options)
        entries, here_N = found.of(mine)
        self._update = []
        if not len(found.kept_N):
            return
        states = None
        if recipe.trajectory is not None:
            # where it ended early, what was filled up was never drawn
            read = rollout if eos is None else replace(rollout, settings={**rollout.settings, "eos_id": eos})
            states = recipe.trajectory.states(read, self.options, args.seed).kept(here_N)
            real_BS = rollout.attention_mask_BS

        def plan_of(iteration: int) -> MaskPlan:
            if states is not None:
                return states.plan if states.plan.prompt_noise == 0 else replace(states.plan, iteration=iteration)
            given = dict(recipe.law_options) if args.law in (None, recipe.law) else {}
            return make_mask_plan(
                rollout.ids_BS,
                rollout.completion_mask_BS,
                law=args.law or recipe.law,
                samples=args.samples or recipe.samples,
                seed=args.seed,
                sequence_ids=rollout.sequence_ids_B,
                mask_id=args.mask_id,
                shift=args.shift,
                attention_mask_BS=rollout.text_mask_BS,
                eos_id=eos,
                tail=None if eos is None else recipe.tail,
                iteration=iteration,
                causal_block=args.causal_block,
                **(given | args.law_options),
            ).cut(sequences=here_N)

        plans = [plan_of(iteration) for iteration in range(self.num_iterations)]
        if tail_BS is not None and recipe.tail == "removed":
            real_BS = ~tail_BS if real_BS is None else (real_BS != 0) & ~tail_BS
        self._scoring = {
            "suppress": (args.mask_id, *args.suppress),
            "model_kwargs": None if real_BS is None else {"attention_mask": real_BS[here_N].long()},
            "samples_per_pass": args.samples_per_pass,
            "sequences_per_pass": args.sequences_per_pass,
        }
        if recipe.entries is not None:
            update = Update(
                rewards=rewards,
                kept_N=here_N + mine.start,
                states=states,
                old=partial(self._scores, False),
                ref=partial(self._scores, True),
                fresh_plan=lambda: plan_of(len(plans)),
                reward=self._no_reward,
                gather=lambda value: (self.accelerator.gather(value), mine),
            )
            entries |= recipe.entries(update, self.options)
        self._denominator = found.denominator
        if self._denominator is None:  # steps: what the plans of all processes hold
            count = torch.tensor(float(steps.number(plans[0])), device=self.accelerator.device)
            self._denominator = max(1.0, float(self.accelerator.reduce(count, "sum")))
        self._update = [(plan, self._batch(plan, entries, states)) for plan in plans]

    @property
    def _eos(self) -> int | None:
        """The token with which a completion ends, where the algorithm scores no more than that."""
        return self._tokenizer.eos_token_id if self.recipe.window == "eos" else None

    def _rewards(self, lengths_B: Tensor) -> Rewards:
        assert self._rewards_BF is not None
        values_B = (self._rewards_BF * self.reward_weights.to(self._rewards_BF.device)).nansum(-1)
        if self.recipe.signal is not advantage_signal and bool(self._rewards_BF.isnan().all(-1).any()):
            raise ValueError(
                f"reward_funcs must give every completion a reward for {self.recipe.name}, got None from all of them"
            )
        group_ids_B = torch.arange(len(values_B), device=values_B.device) // self.num_generations
        return Rewards(values_B, group_ids_B, lengths_B, self.recipe.advantage or "mean")

    def _batch(self, plan: MaskPlan, entries: dict[str, Tensor], states: Any) -> Batch:
        objective, values = self.objective, dict(entries)
        per_sample = (*objective.per_sample, *objective.per_token)
        for name in (*objective.per_sequence, *per_sample):
            if name in values:
                continue
            if name == objective.old_scores and self.num_iterations > 1:
                known = None if states is None else states.old_scores(name)
                values[name] = self._scores(False, plan, name) if known is None else known
            elif name.startswith("ref_"):
                values[name] = self._scores(True, plan, name)
        return Batch(
            {name: value for name, value in values.items() if name not in per_sample},
            {name: value for name, value in values.items() if name in per_sample},
        )

    def _scores(self, reference: bool, plan: MaskPlan, name: str) -> Tensor:
        """Scores of a plan under the policy as it is now, or the reference: `old_elbo`, `ref_logp` and so on."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        kind = name.partition("_")[2]
        with self.accelerator.autocast(), adapters_off(model) if reference and self.reference is None else nullcontext():
            scored = self.reference if reference and self.reference is not None else model
            if kind == "logp":
                return score_samples(scored, plan, per_token=True, **self._scoring)
            if kind == "sample_elbo" and plan.step_KBS is not None:  # one for each step, of which a sample has several
                return steps.sums(plan, score_samples(scored, plan, per_token=True, **self._scoring).transpose(0, 1))
            elbo_BK = score_samples(scored, plan, **self._scoring)
        return elbo_BK if kind == "sample_elbo" else (elbo_BK * plan.share_K).sum(-1)

    def _no_reward(self, completions: Tensor) -> Tensor:
        raise ValueError(f"algorithm must not score other completions by the reward, which {self.recipe.name} does")

    def train(self, *arguments: Any, **named: Any) -> Any:
        """As the Trainer's. A run that is resumed between the steps of a rollout draws a new one for those that are left."""
        self._buffered_inputs, self._update = None, []
        return super().train(*arguments, **named)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Rollouts where they are due, then the exact gradient of one inner iteration."""
        started = time.perf_counter()
        model.train()
        self._step = self.state.global_step  # TRL counts from 0 after a resume, too
        self._prepare_inputs(inputs)
        iteration = self._step % self.num_iterations
        loss = torch.zeros((), device=self.accelerator.device)
        if self._update:
            plan, batch = self._update[iteration]
            several = self.accelerator.num_processes > 1
            with self.compute_loss_context_manager():
                report = accumulate(
                    model,
                    plan,
                    self.objective,
                    batch,
                    denominator=self._denominator,
                    group=dist.group.WORLD if several else None,
                    **self._scoring,
                )
            loss = report.loss.float() * self.accelerator.num_processes  # TRL averages what processes log
            told = self._metrics["train"]
            told["elbo"].append(report.sample_elbo_BK.nanmean().item())
            told["forwards"].append(float(report.forwards))
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - started)
        return loss

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        self._evaluated = 0
        return super().evaluation_loop(*arguments, **named)

    def prediction_step(self, model: nn.Module, inputs: Any, *arguments: Any, **named: Any) -> tuple[None, None, None]:
        """Rollouts and their rewards, which TRL logs."""
        self._prepare_inputs(inputs)
        return None, None, None
