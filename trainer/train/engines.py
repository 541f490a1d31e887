"""Who samples completions: this process, or a server (`rollout.engine`); everything that draws goes through here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dllm_kernels import Rollout, generate
from dllm_kernels.integrations.foreign_rollouts import score_rollout

from ..config import RolloutConfig
from ..errors import GuardError
from ..tasks import Example
from .guards import on_policy_gap
from .setup import Setup

_ERRORS = 4.0  # standard errors


class Engine(Protocol):
    def generate(
        self, examples: Sequence[Example], sequence_ids: Tensor, *, decoding: RolloutConfig | None = None, greedy: bool = False
    ) -> Rollout:
        """A completion of each example's prompt by the model as it is; `decoding` in place of the run's. A collective."""

    def check(self, sampled: Rollout, *, due: bool, replayed: bool) -> tuple[Rollout, dict[str, float]]:
        """The rollout with the log-probs that an algorithm needs which replays its states, and, where it is `due`, how far its
        policy is from the one that is trained. Raises GuardError beyond `rl.gap_bound`.
        """


def engine_of(setup: Setup) -> Engine:
    return OwnEngine(setup) if setup.served is None else ServedEngine(setup)


class OwnEngine:
    """`dllm_kernels.generate`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def generate(
        self, examples: Sequence[Example], sequence_ids: Tensor, *, decoding: RolloutConfig | None = None, greedy: bool = False
    ) -> Rollout:
        setup, device = self.setup, self.setup.ranks.device
        with setup.ranks.together():
            prompts = setup.codec.asked(examples)
        options = setup.generate_options(greedy=greedy, rollout=decoding)
        ids = [prompt.to(device) for prompt in prompts]
        return generate(setup.model, ids, sequence_ids=sequence_ids.to(device), seed=setup.config.seed, **options)

    def check(self, sampled: Rollout, *, due: bool, replayed: bool) -> tuple[Rollout, dict[str, float]]:
        return sampled, {"on_policy_gap": on_policy_gap(self.setup, sampled)} if due else {}


class ServedEngine:
    """An SGLang server with the model's weights."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def generate(
        self, examples: Sequence[Example], sequence_ids: Tensor, *, decoding: RolloutConfig | None = None, greedy: bool = False
    ) -> Rollout:
        setup, rollout = self.setup, decoding or self.setup.config.rollout
        assert setup.served is not None
        assert not greedy, "refused with the config"
        setup.served.publish(setup.trained, setup.loaded.tokenizer)
        with setup.ranks.together():
            prompts = setup.codec.prompts(examples)
        sampled = setup.served.generate(
            prompts,
            sequence_ids=sequence_ids,
            length=setup.length,
            mask_id=setup.facts.mask_id,
            vocabulary=setup.facts.valid_vocab or int(setup.model.config.get_text_config().vocab_size),
            causal_block=setup.facts.block_length,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            step_maps=rollout.step_maps,
            logp=rollout.logp,
            stop_id=setup.facts.eos_id if rollout.stop_at_eos else None,
            suppress=setup.loaded.suppressed,
            shift=setup.facts.shift,
        )
        return sampled.to(setup.ranks.device)

    def check(self, sampled: Rollout, *, due: bool, replayed: bool) -> tuple[Rollout, dict[str, float]]:
        setup, ranks, config = self.setup, self.setup.ranks, self.setup.config.rl
        assert setup.served is not None
        figures: dict[str, float] = {"server_reloads": ranks.total(setup.served.reloads)}
        if sampled.stepless or not (due or replayed):
            return sampled, figures
        options = setup.scoring_options(sampled.attention_mask_BS, config, as_rolled_out=True)
        # the cause of a gap is looked for by further passes, which ranks that share a model must make together
        bound = config.gap_bound if ranks.size == 1 else None
        try:
            scored, gap = score_rollout(setup.model, sampled, bound=bound, **options)
        except ValueError as error:
            raise GuardError(f"{error} (bound rl.gap_bound)") from error
        if gap.tokens:
            figures["on_policy_gap"] = worst = float(torch.tensor(ranks.tell(gap.worst)).max())  # nan of any rank is nan
            if not worst <= config.gap_bound:
                raise GuardError(
                    f"the server's log-probs differ from the model's by {worst:.3g} nats a token (bound rl.gap_bound="
                    f"{config.gap_bound:g}); other weights, another dtype, a temperature or other states make such gaps"
                )
        figures["surprise"] = _surprise(setup, scored)
        return scored, figures


def _surprise(setup: Setup, scored: Rollout) -> float:
    """Nats a token by which the server's tokens are less likely to the model than it expects of tokens of its own.

    Of tokens drawn from the policy the expectation of -log p is the entropy; a temperature below 1, top-k, top-p and a choice of
    confident tokens make it less. More than that, beyond chance, is another policy. Raises GuardError.
    """
    ranks, rollout = setup.ranks, setup.config.rollout
    there_BL = scored.commit_step_BL >= 0
    gap_N = -(scored.commit_logp_BL + scored.commit_entropy_BL)[there_BL].double()
    # given the state, each token's expectation is 0, so that tokens count as independent
    number, total, squares = (ranks.total(float(value)) for value in (len(gap_N), gap_N.sum(), gap_N.square().sum()))
    mean, error = total / number, math.sqrt(squares) / number
    bound = setup.config.rl.gap_bound
    if not math.isfinite(mean) or (rollout.temperature <= 1 and not mean <= bound + _ERRORS * error):
        raise GuardError(
            f"the server's tokens are {mean:.3g} nats a token less likely to the model than it expects of its own (standard "
            f"error {error:.2g}, bound rl.gap_bound={bound:g}): they come of other weights, another prompt or other states than "
            "their step maps tell"
        )
    return mean
