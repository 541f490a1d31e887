"""ZHZisZZ/dllm: its `MDLMTrainer` with the loss from hidden states, and a sampler of its interface over `generate`.

trainer = HeadlessMDLMTrainer(model=model, args=MDLMConfig(...), ...)      # in place of MDLMTrainer
sampler = HeadlessMDLMSampler(model=model, tokenizer=tokenizer)            # in place of MDLMSampler
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import Rollout, checks, generate, score_tokens
from dllm_kernels.integrations import needs, with_body
from dllm_kernels.model.headless import Body, headless

with needs("dllm", "pip install git+https://github.com/ZHZisZZ/dllm"):
    from dllm.core.samplers import BaseSampler, BaseSamplerOutput, MDLMSamplerConfig
    from dllm.core.trainers import MDLMTrainer

IGNORED = -100  # as a label: not scored


class HeadlessMDLMTrainer(MDLMTrainer):
    """`MDLMTrainer` without logits: equal draws of torch's generator, schedule, weights, reduction, meters and loss.

    An evaluation that asks for logits gets none. Raises ValueError where labels are not the input ids.
    """

    def training_step(self, model: nn.Module, *arguments: Any, **named: Any) -> Tensor:
        with headless(model):
            return super().training_step(model, *arguments, **named)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.processing_class.padding_side != "right":
            raise ValueError(f"the tokenizer's padding_side must be 'right', got {self.processing_class.padding_side!r}")
        inputs = self._preprocess_inputs(inputs)
        ids_BS, labels_BS = inputs["input_ids"], inputs["labels"]
        scored_BS = labels_BS != IGNORED
        if checks.may_read(ids_BS) and bool((scored_BS & (ids_BS != labels_BS)).any()):
            raise ValueError("labels must be the input_ids, unshifted, or -100 where a token is not scored")
        (B, S), device = ids_BS.shape, ids_BS.device
        t_B = self.time_epsilon + (1 - self.time_epsilon) * torch.rand(B, device=device)
        share_B1 = 1.0 - self.scheduler(t_B)[:, None]
        masked_BS = scored_BS & (torch.rand(B, S, device=device) < share_B1)
        weight_BS = self._compute_loss_weights(t=t_B, inputs=inputs, masked_mask=masked_BS).float()
        flat_N, shift = masked_BS.reshape(-1).nonzero()[:, 0], int(self.right_shift_logits)
        if shift and bool(scored_BS[:, :1].any()):
            raise ValueError("labels must be -100 at the first position where right_shift_logits is set: no row predicts it")
        weight_N = weight_BS.reshape(-1)[flat_N]
        noisy_BS = ids_BS.masked_fill(masked_BS, self.processing_class.mask_token_id)
        coef_N = -weight_N / self._divisor(scored_BS).expand(B, S).reshape(-1)[flat_N]

        def score(body: Body) -> tuple[Tensor, Tensor]:
            scores = score_tokens(
                body(noisy_BS, attention_mask=inputs.get("attention_mask")),
                body.weight,
                ids_BS.reshape(-1)[flat_N],
                rows=flat_N - shift,
                coef=coef_N,
                take_dweight=body.take_dweight,
                **body.options,
            )
            assert scores.logp is not None
            assert scores.weighted_sum is not None
            return scores.weighted_sum, scores.logp

        loss, logp_N = with_body(model, score)
        nll_BS = logp_N.new_zeros(B * S).index_copy(0, flat_N, -logp_N * weight_N).view(B, S)
        self.meter.update(split="train" if model.training else "eval", value=nll_BS, weight=scored_BS.to(nll_BS.dtype))
        return (loss, None) if return_outputs else loss

    def _divisor(self, scored_BS: Tensor) -> Tensor:
        kinds = ("token", "sequence", "batch")
        if self.loss_norm_type not in kinds:
            raise ValueError(f"loss_norm_type must be one of {', '.join(kinds)}, got {self.loss_norm_type!r}")
        batch = torch.full((1, 1), float(len(scored_BS)), device=scored_BS.device)
        if self.loss_norm_type == "batch":
            return batch
        if self.loss_norm_type == "token":
            return scored_BS.sum().clamp(min=1).float().view(1, 1)
        return batch * scored_BS.sum(-1, keepdim=True).clamp(min=1)


@dataclass
class HeadlessMDLMSampler(BaseSampler):
    """`MDLMSampler`'s interface over `generate`, sampler "llada"; takes an `MDLMSamplerConfig`.

    Its tokens at temperature 0, where `steps` is a multiple of the blocks and `block_size` divides the length; the noise of
    other temperatures is keyed by a seed that torch's generator gives. Raises ValueError for what `generate` cannot do.
    """

    def sample(
        self, inputs: Sequence[Tensor | list[int]], config: MDLMSamplerConfig | None = None, **kwargs: Any
    ) -> BaseSamplerOutput | Tensor:
        options = {**vars(config or MDLMSamplerConfig()), **kwargs}
        for name in ("stochastic_transfer", "cfg_keep_tokens", "begin_suppress_tokens"):
            if options[name]:
                raise ValueError(f"{name} must not be set, got {options[name]!r}")
        prompts = [torch.as_tensor(ids, dtype=torch.int64, device=self.model.device) for ids in inputs]
        length = options["max_new_tokens"] or options["max_length"] - max(map(len, prompts))
        rollout = generate(
            self.model,
            prompts,
            length=length,
            steps=options["steps"],
            block_length=min(options["block_size"], length),
            temperature=options["temperature"],
            remasking=options["remasking"],
            guidance=options["cfg_scale"],
            suppress=options["suppress_tokens"] or (),
            suppress_mask=False,  # as MDLMSampler
            shift=int(options["right_shift_logits"]),
            mask_id=self.tokenizer.mask_token_id,
            seed=int(torch.randint(1 << 31, ())),
            sequence_ids=torch.arange(len(prompts), device=self.model.device),
        )
        if not options["return_dict"]:
            return self._canvas(rollout, rollout.ids_BS)
        histories = [self._canvas(rollout, rollout.state_at(step)) for step in range(int(rollout.steps_B.max()) + 1)]
        return BaseSamplerOutput(sequences=histories[-1], histories=histories)

    def infill(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError("generate completes prompts; MDLMSampler fills in")

    def _canvas(self, rollout: Rollout, ids_BS: Tensor) -> Tensor:
        """Ids with EOS as padding."""
        real_BS = rollout.attention_mask_BS
        return ids_BS if real_BS is None else ids_BS.masked_fill(~real_BS, self.tokenizer.eos_token_id)
