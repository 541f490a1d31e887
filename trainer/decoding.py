"""The section `rollout` of a config: who samples completions, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from .sections import Count, NotNegative, Positive, Section, Share, Text

if TYPE_CHECKING:
    from dllm_kernels.rollouts.samplers import Sampler

SAMPLER_KEYS = ("remasking", "renormalise", "threshold", "factor", "threshold_back", "bound", "editing_threshold",
                "max_post_steps", "alg", "alg_temp", "eps", "strategy", "eta", "t_on", "t_off", "alpha_on")  # fmt: skip
HOW_KEYS = ("deterministic", "cache", "refresh", "micro_batch")
# of `rollout`, for one engine alone
ENGINE_KEYS = {
    "ours": ("sampler", "steps", "block_length", *SAMPLER_KEYS, *HOW_KEYS),
    "sglang": ("url", "timeout", "retries", "step_maps", "logp", "weights"),
}


class RolloutConfig(Section):
    engine: Literal["ours", "sglang"] = "ours"  # who samples: this process, or an SGLang server of a block-causal model
    url: Text | None = None  # of the server, such as http://node7:30000
    timeout: Annotated[float, Field(gt=0.0)] = 600.0  # seconds that the server may take for one batch
    retries: Count = 5  # further tries where it does not answer, after 1, 2, 4 ... seconds
    step_maps: bool = True  # the server tells the step of each token (SGLang's pull request 27943); false: ids alone
    logp: bool = False  # the server tells log-probs; false: they are scored here where they are needed
    weights: Text | None = None  # folder for weights, which the server sees under the same path; null: in the run's
    length: Positive | None = None  # tokens to generate; None: the task's
    sampler: str = "llada"  # llada, roar, dream, fast_dllm, fast_dream, sdar, llada2, entropy_bound, rcr, wino, remdm
    temperature: NotNegative  # of sampling; 0 is greedy
    top_k: Positive | None = None  # only the k likeliest tokens are drawn
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # only the likeliest tokens of this probability together
    steps: Positive | None = None  # denoising steps; null: as many as the sampler takes
    block_length: Positive | None = None  # tokens that are finished before the next ones begin
    remasking: str | None = None  # options of samplers: None is the sampler's own default
    renormalise: bool | None = None  # of llada: confidences are those among the ids not committed last
    threshold: Share | None = None  # of fast_dllm, sdar and others: tokens of at least this confidence are written
    factor: Annotated[float, Field(gt=0.0)] | None = None  # of fast_dllm: n tokens at once need 1 - factor / (n + 1) each
    threshold_back: Share | None = None  # of wino: a token whose copy is less likely is taken back
    bound: NotNegative | None = None  # of entropy_bound: nats that may be lost in a step
    editing_threshold: Share | None = None  # of llada2: a decided token gives way to one of at least this confidence
    max_post_steps: Count | None = None  # of llada2: steps that may only edit
    alg: str | None = None  # of dream, fast_dream and rcr: by which confidence tokens are chosen
    alg_temp: NotNegative | None = None  # of dream: temperature of that choice
    eps: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # of dream, fast_dream and remdm: last noise level
    strategy: str | None = None  # of remdm: cap, rescale, conf or loop
    eta: Share | None = None  # of remdm: the probability with which a token is taken back, or its share of the largest
    t_on: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # of remdm's loop: between t_on and t_off tokens are taken back
    t_off: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # see t_on
    alpha_on: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # of remdm's loop: share of decided tokens meanwhile
    stop_at_eos: bool = False  # finish a completion with the block that holds its first EOS
    deterministic: bool = False  # bits that do not depend on the batch, at some cost
    cache: bool | Literal["prefix", "dual"] = False  # keep keys and values: of finished blocks (sdar), or around the active block
    refresh: Positive | None = None  # with prefix or dual: steps of a block between those that compute everything; null: once
    micro_batch: Positive | None = None  # sequences per model call of a rank; null: all at once

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        others = ENGINE_KEYS["ours" if self.engine == "sglang" else "sglang"]
        if given := [key for key in others if getattr(self, key) != RolloutConfig.model_fields[key].default]:
            why = "whose server decodes as it was launched to" if self.engine == "sglang" else "as it is of engine sglang"
            raise ValueError(f"{given[0]} must be left out with engine {self.engine}, {why}, got {getattr(self, given[0])}")
        if self.engine == "sglang":
            self._check_server()
            return self
        sampler = self.resolved()
        if self.length is not None:
            from dllm_kernels.rollouts.samplers import check_steps

            check_steps(sampler, self.length, self.steps, self.block_length)
        return self

    def _check_server(self) -> None:
        if self.url is None:
            raise ValueError("url must be given with engine sglang, such as http://node7:30000, got None")
        from dllm_kernels.integrations.sglang import check_url

        check_url(self.url)
        if self.stop_at_eos and self.step_maps:
            raise ValueError(
                "stop_at_eos must be false with step_maps, as SGLang leaves out what the last block holds after the EOS, which "
                "that block's steps saw; step_maps=false takes ids alone"
            )
        if self.logp and not self.step_maps:
            raise ValueError("logp must be false without step_maps, which say in which state a token was drawn")

    def resolved(self) -> Sampler:
        from dllm_kernels.rollouts.samplers import resolve

        return resolve(self.sampler, self.sampler_options())

    def sampler_options(self) -> dict[str, Any]:
        return {key: value for key in SAMPLER_KEYS if (value := getattr(self, key)) is not None}

    def generate_options(self, length: int, eos_id: int | None) -> dict[str, Any]:
        """Keywords of `dllm_kernels.generate`."""
        same = ("sampler", "temperature", "top_k", "top_p", "steps", "block_length")
        options = {key: getattr(self, key) for key in (*same, *HOW_KEYS)} | self.sampler_options()
        return {**options, "length": length, "eos_id": eos_id if self.stop_at_eos else None}
