"""Denoising at a LLaDA-shaped head: seconds, memory and tokens, beside samplers that build every logit.

A step ("argmax", "drawn") is one of sequences whose last block of R tokens is undecided and committed; the
body is EuroBERT. In `--full`, 8 sequences of 320 tokens with a block of 32, the bound's sizes:

    ours          `generate`: the head on the B R undecided rows, no logits kept
    fp32 logits   logits of all B (P + R) rows in fp32; our noise on the undecided ones; what ours must equal
    published     as LLaDA's generate.py, which d1 copies: logits of all rows, float64 Gumbel noise on all, a
                  float64 softmax for the confidence, at temperature 0 too

At temperature 0 all must commit the same tokens, at 0.9 ours and "fp32 logits" must; a token off fails the
run, and so does a log-probability off the float64 one. "completion" is one of 4 blocks in 4 steps at 0.9:
ours, without and with the likeliest completion at every step (EGSPO-SA, which needs the head on all masked
rows), and d1's sampler with the logits of all rows, in its favour with our noise on the undecided rows alone,
so that its tokens are what ours are judged by. "old_scores" is what EGSPO needs of its behaviour policy, for
some steps of a rollout: read from the rollout, by a scoring pass, or by a pass with full logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plots, registry
from benchmarks.registry import EUROBERT, Case, Contestant, Oracle, Result, Settings, Sizes, Suite, Work
from benchmarks.suites import step_published
from dllm_kernels import MaskPlan, Rollout, generate, noise, select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.noise import Stream

SHARPEN = 5.0  # a trained head is not flat: the entropy is a few nats


@dataclass(frozen=True)
class Policy:
    """A model and the prompts that are completed."""

    model: nn.Module
    prompts_BP: Tensor
    sizes: Mapping[str, int]
    temperature: float = 0.0

    @property
    def mask_id(self) -> int:
        return self.sizes["V"] - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_parameter("lm_head.weight").dtype

    def rollout(self, **options: Any) -> Rollout:
        ids_B = torch.arange(len(self.prompts_BP), device=self.prompts_BP.device)
        return generate(self.model, self.prompts_BP, mask_id=self.mask_id, sequence_ids=ids_B, **options)

    def operations(self, tokens: float, rows: float) -> float:
        return registry.operations(registry.multiplied_parameters(self.model), tokens, rows, self.sizes)


def make_policy(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str, temperature: float = 0.0) -> Policy:
    B, V = sizes["B"], sizes["V"]
    model = registry.small_model(V=V, H=sizes["H"], layers=sizes["layers"], dtype=dtype, device=device, sharpen=SHARPEN)
    prompts_BP = torch.randint(3, V - 1, (B, sizes["P"]), generator=torch.Generator().manual_seed(1))
    return Policy(model, prompts_BP.to(device), sizes, temperature)


# --- a step -------------------------------------------------------------------------------------------------

# P: prompt and what is decided already; R: the block
SIZES = Sizes(
    {"B": 2, "P": 16, "R": 4, "H": 32, "V": 64, "layers": 1},
    {"B": 4, "P": 112, "R": 16, "H": 128, "V": 8192, "layers": 2},
    {"B": 8, "P": 288, "R": 32, "H": 512, "V": 126464, "layers": 4},
)
STEPS, CHOSEN, BLOCKS = 8, 2, 4


def _operations_of_step(x: Policy, rows: int) -> float:
    """The body on every token, the head on `rows` of each sequence."""
    B, P, R = (x.sizes[key] for key in ("B", "P", "R"))
    return x.operations(B * (P + R), B * rows)


def _ours(x: Policy) -> Work:
    R = x.sizes["R"]

    def run() -> Result:
        rollout = x.rollout(length=R, block_length=R, steps=1, temperature=x.temperature)
        return {"tokens": rollout.completion_BL, "logp": rollout.commit_logp_BL}

    return Work(run, _operations_of_step(x, R), "the block's rows")


def _whole(x: Policy) -> Tensor:
    return F.pad(x.prompts_BP, (0, x.sizes["R"]), value=x.mask_id)


def _fp32_logits(x: Policy) -> Work:
    ids_BS, R = _whole(x), x.sizes["R"]
    ids, places = (torch.arange(n, device=ids_BS.device) for n in (len(ids_BS), R))
    key_N = noise.row_bits(0, Stream.TOKEN, ids[:, None], torch.zeros_like(places[0]), places).flatten()

    @torch.no_grad()
    def run() -> Result:
        logits_BSV = x.model(ids_BS).logits.float()
        logits_BSV[..., x.mask_id] = -math.inf
        z_NV = logits_BSV[:, -R:].flatten(0, 1)
        if x.temperature:
            perturbed_NV = z_NV + x.temperature * noise.gumbel(key_N, z_NV.shape[1])
        token_N = (perturbed_NV if x.temperature else z_NV).argmax(-1)
        logp_N = z_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0]
        return {"tokens": token_N.view(-1, R), "logp": logp_N.view(-1, R)}

    return Work(run, _operations_of_step(x, ids_BS.shape[1]), "all rows, our noise")


def _published(x: Policy) -> Work:
    ids_BS, R = _whole(x), x.sizes["R"]
    generator = torch.Generator(ids_BS.device)

    @torch.no_grad()
    def run() -> Result:
        logits_BSV = x.model(ids_BS).logits
        logits_BSV[..., x.mask_id] = -math.inf  # not theirs; without it the argmax may be another
        uniform_BSV = torch.rand(logits_BSV.shape, dtype=torch.float64, generator=generator, device=logits_BSV.device)
        noisy_BSV = logits_BSV.double().exp() / (-uniform_BSV.log()) ** x.temperature
        del uniform_BSV
        token_BS = noisy_BSV.argmax(-1)
        del noisy_BSV
        chosen_BS = logits_BSV.double().softmax(-1).gather(-1, token_BS[..., None])[..., 0]
        name = "drawn" if x.temperature else "tokens"  # by other noise than ours, which no token is judged by
        return {name: token_BS[:, -R:], "logp": chosen_BS[:, -R:].log()}

    return Work(run, _operations_of_step(x, ids_BS.shape[1]), "all rows, float64 noise")


class _StepErrors:
    """Share of tokens unlike fp32 logits with our noise; log-probs against float64 logits, in nats."""

    def __init__(self, x: Policy) -> None:
        self.x = x

    @functools.cached_property
    def _true(self) -> tuple[Tensor, Tensor]:
        """(tokens `[B, R]`, float64 log-probs `[N, V]` from the model's own hidden states)."""
        x = self.x
        with torch.no_grad():
            hidden = x.model.get_submodule("model")(_whole(x)).last_hidden_state[:, -x.sizes["R"] :].flatten(0, 1)
            z_NV = hidden.double() @ x.model.get_parameter("lm_head.weight").double().t()
            z_NV[:, x.mask_id] = -math.inf
            return _fp32_logits(x).run()["tokens"], z_NV.log_softmax(-1)

    def __call__(self, result: Result) -> dict[str, float]:
        tokens, logp_NV = self._true
        own = result["tokens"] if "tokens" in result else result["drawn"]
        true = logp_NV.gather(1, own.reshape(-1, 1))[:, 0]
        errors = {"logp": float((result["logp"].reshape(-1).double() - true).abs().max())}
        return errors | ({"tokens": float((own != tokens).float().mean())} if "tokens" in result else {})


# --- a completion -------------------------------------------------------------------------------------------


def _longer(sizes: Mapping[str, int], **on: Any) -> Policy:
    """As many tokens in all, of which `BLOCKS` blocks are undecided."""
    return make_policy({**sizes, "P": max(1, sizes["P"] + sizes["R"] - BLOCKS * sizes["R"])}, **on)


def _completed(x: Policy, *, greedy: bool) -> Work:
    R, options = x.sizes["R"], {"greedy": greedy, "temperature": step_published.TEMPERATURE}

    def run() -> Result:
        rollout = x.rollout(length=BLOCKS * R, block_length=R, steps=BLOCKS, **options)
        return {"tokens": rollout.completion_BL, "logp": rollout.commit_logp_BL}

    blocks, masked = BLOCKS * R, sum((BLOCKS - step) * R for step in range(BLOCKS))
    note = "and all masked rows" if greedy else "rows of the active block"
    return Work(run, _operations_of_completion(x, blocks + masked * greedy), note)


def _operations_of_completion(x: Policy, rows: int) -> float:
    B, S = len(x.prompts_BP), x.prompts_BP.shape[1] + BLOCKS * x.sizes["R"]
    return x.operations(BLOCKS * B * S, B * rows)


def _completed_as_published(x: Policy) -> Work:
    R, S = x.sizes["R"], x.prompts_BP.shape[1] + BLOCKS * x.sizes["R"]

    def run() -> Result:
        rollout = step_published.sample(x.model, x.prompts_BP, length=BLOCKS * R, block=R, steps=BLOCKS, mask_id=x.mask_id)
        return {"tokens": rollout.completion_BL, "logp": rollout.commit_logp_BL}

    return Work(run, _operations_of_completion(x, BLOCKS * S), "all rows, our noise")


def _against_published(x: Policy) -> Oracle:
    true = functools.cache(_completed_as_published(x).run)

    def errors(result: Result) -> dict[str, float]:
        found = {"logp": float((result["logp"] - true()["logp"]).abs().max())}
        return found | {"tokens": float((result["tokens"] != true()["tokens"]).float().mean())}

    return errors


# --- the behaviour policy's scores --------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """A rollout, and the chosen steps of it that are scored."""

    policy: Policy
    rollout: Rollout
    chosen_BJ: Tensor
    plan: MaskPlan

    def scored(self) -> Result:
        return {"logp": score_samples(self.policy.model, self.plan, suppress=(self.policy.mask_id,))}


def _behaviour(sizes: Mapping[str, int], **on: Any) -> Behaviour:
    policy, R = make_policy(sizes, **on), sizes["R"]
    rollout = policy.rollout(length=R, block_length=R, steps=min(STEPS, R), temperature=0.9)
    chosen_BJ = select_steps(step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL), min(CHOSEN, STEPS, R))
    return Behaviour(policy, rollout, chosen_BJ, trajectory_rows(rollout, chosen_BJ))


def _kept_scores(x: Behaviour) -> Work:
    return Work(lambda: {"logp": trajectory_logp(x.rollout, x.plan)}, note="kept by the rollout")


def _scoring_pass(x: Behaviour) -> Work:
    flops = x.policy.operations(x.plan.noisy_ids.numel(), len(x.plan.rows.index))
    return Work(x.scored, flops, "score_samples, rows of the steps")


def _full_pass(x: Behaviour) -> Work:
    """EGSPO's pass over each state: logits of all rows, cross-entropy summed over the step's tokens."""
    model, rollout, places_BS, every = x.policy.model, x.rollout, x.rollout.step_map_BS, x.plan.noisy_ids.numel()

    @torch.no_grad()
    def run() -> Result:
        found = []
        for step_B in x.chosen_BJ.unbind(1):
            logits_BSV = model(rollout.state_at(step_B)).logits.float()
            logits_BSV[..., rollout.mask_id] = -math.inf
            logp_BS = -F.cross_entropy(logits_BSV.transpose(1, 2), rollout.ids_BS, reduction="none")
            found.append(torch.where(places_BS == step_B[:, None], logp_BS, 0.0).sum(-1))
        return {"logp": torch.stack(found, 1)}

    return Work(run, x.policy.operations(every, every), "logits of all rows")


def _against_scores(x: Behaviour) -> Oracle:
    true = x.scored()["logp"].double()
    return lambda result: {"logp": float((result["logp"].double() - true).abs().max())}


STEP = (
    Contestant("ours", "ours", _ours),
    Contestant("fp32 logits", "peer", _fp32_logits),
    Contestant("published", "peer", _published),
)
COMPLETION = (
    Contestant("ours", "ours", functools.partial(_completed, greedy=False)),
    Contestant("ours (greedy kept)", "ours", functools.partial(_completed, greedy=True)),
    Contestant("published", "peer", _completed_as_published),
)
OLD_SCORES = (
    Contestant("ours", "ours", _kept_scores),
    Contestant("ours (scoring pass)", "ours", _scoring_pass),
    Contestant("published", "peer", _full_pass),
)
# by case: what all are given, who takes part, the oracle, and how many steps' arithmetic is the least
CASES: dict[str, tuple[Any, tuple[Contestant, ...], Any, int]] = {
    "argmax": (make_policy, STEP, _StepErrors, 1),
    "drawn": (functools.partial(make_policy, temperature=0.9), STEP, _StepErrors, 1),
    "completion": (_longer, COMPLETION, _against_published, BLOCKS),
    "old_scores": (_behaviour, OLD_SCORES, _against_scores, 0),  # the rollout has them: nothing to do
}


def cases(settings: Settings) -> list[Case]:
    sizes = SIZES.of(settings)
    B, P, R = (sizes[key] for key in ("B", "P", "R"))
    step = registry.operations(registry.body_parameters(sizes), B * (P + R), B * R, sizes)
    tolerance = {"tokens": 0.0, "logp": 2e-4} if settings.dtype == "float32" else {"logp": 0.1}
    on = {"dtype": settings.torch_dtype, "device": settings.device}
    return [
        Case(name, sizes, SIZES.tiny, functools.partial(inputs, **on), contestants, oracle, tolerance, steps * step)
        for name, (inputs, contestants, oracle, steps) in CASES.items()
    ]


SUITES = {
    "rollout": Suite(
        name="rollout",
        title="rollouts: one denoising step, a completion, and the scores of the policy that generated",
        cases=cases,
        baseline="published",
        error_columns=("tokens", "logp"),
        shape_keys=tuple(SIZES.usual),
        plot=plots.seconds_and_memory,
        preload=(EUROBERT,),
    ),
}
