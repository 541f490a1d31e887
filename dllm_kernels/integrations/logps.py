"""Log-probs without logits for trainers of GRPO's kind that keep their own loss: TRL's, and those of d1's lineage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import make_mask_plan, score_tokens
from dllm_kernels.accumulation.estimation import content_ids
from dllm_kernels.integrations import with_body
from dllm_kernels.model.headless import Body


class DiffusionLogps:
    """Mixin for trainers of GRPO's kind, before them among the bases: their log-probs, without logits.

    Gives `_get_per_token_logps(model, input_ids, logits_to_keep, mask_seeds)` of d1's lineage, with the host's own
    `forward_process` for the masks, and TRL's `_get_per_token_logps_and_entropies`. Both score the completion in one
    call of the model that hides all of it (d1's mean-field estimate, arXiv 2504.12216, no ELBO). Takes from the
    host's `args` `mask_id`, and `shift` where there is one.
    """

    args: Any
    temperature: float

    def _get_per_token_logps(self, model: nn.Module, input_ids: Tensor, logits_to_keep: int, mask_seeds: Sequence[int]) -> Tensor:
        """float32 `[iterations, B, L]` of ids `[iterations, B, S]`; iteration i is hidden with `mask_seeds[i]`."""
        iterations, B, S = input_ids.shape
        if len(mask_seeds) != iterations:
            raise ValueError(f"mask_seeds must hold one seed for each of {iterations} iterations, got {len(mask_seeds)}")
        if getattr(self.args, "cfg_scale", 0.0):
            raise ValueError(f"cfg_scale must be 0, got {self.args.cfg_scale}: guided logits are not scored here")
        prompt_S = torch.arange(S, device=input_ids.device) < S - logits_to_keep
        noisy = [
            self.forward_process(ids_BS, prompt_S, self.args.mask_id, seed=seed)[0]  # type: ignore[attr-defined]
            for ids_BS, seed in zip(input_ids, mask_seeds)
        ]
        scored = (~prompt_S).expand(iterations * B, S)
        found = self._scored(model, torch.cat(noisy), input_ids.flatten(0, 1), scored, {}, 1.0, ("logp",))
        return found["logp"].view(iterations, B, S)[:, :, -logits_to_keep:].float()

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probs and, on request, entropies `[B, L]`, 0 at padding; masks depend on `args.seed` and content alone."""
        if given := sorted(name for name, value in inputs.items() if value is not None):
            raise ValueError(f"{given[0]} must be None: only texts are scored here")
        if compute_aux_loss:
            raise ValueError("router_aux_loss_coef must be 0: there is no auxiliary loss of a masked diffusion model's experts")
        want = ("logp", "entropy") if compute_entropy else ("logp",)
        parts = []
        for first in range(0, len(input_ids), batch_size or len(input_ids)):
            ids_BS, real_BS = (part[first : first + (batch_size or len(part))] for part in (input_ids, attention_mask.bool()))
            scored_BS = real_BS & (torch.arange(ids_BS.shape[1], device=ids_BS.device) >= ids_BS.shape[1] - logits_to_keep)
            plan = make_mask_plan(
                ids_BS,
                scored_BS,
                law="full",
                samples=1,
                seed=self.args.seed,
                sequence_ids=content_ids(ids_BS, scored_BS, real_BS),
                mask_id=self.args.mask_id,
                attention_mask_BS=real_BS,
            )
            kwargs = {"attention_mask": real_BS.long()}
            parts.append(self._scored(model, plan.noisy_ids[0], ids_BS, scored_BS, kwargs, self.temperature, want))
        joined = {name: torch.cat([part[name] for part in parts])[:, -logits_to_keep:] for name in want}
        return joined["logp"], joined.get("entropy"), None

    def _scored(
        self,
        model: nn.Module,
        noisy_BS: Tensor,
        ids_BS: Tensor,
        scored_BS: Tensor,
        kwargs: dict[str, Tensor],
        temperature: float,
        want: Sequence[str],
    ) -> dict[str, Tensor]:
        """Statistics `[B, S]` of the scored tokens, 0 elsewhere."""
        flat_N, shift = scored_BS.reshape(-1).nonzero()[:, 0], getattr(self.args, "shift", 0)
        if bool(scored_BS[:, :shift].any()):
            raise ValueError(f"input_ids must begin with {shift} token(s) of a prompt (shift={shift}): no row predicts them")
        target_N = ids_BS.reshape(-1)[flat_N]

        def score(body: Body) -> list[Tensor]:
            hidden = body(noisy_BS, **kwargs)
            options = replace(body.options, temperature=body.options.temperature * temperature)
            scores = score_tokens(
                hidden, body.weight, target_N, rows=flat_N - shift, want=want, take_dweight=body.take_dweight, **options
            )
            return [getattr(scores, name) for name in want]

        return {
            name: vector.new_zeros(scored_BS.numel()).index_copy(0, flat_N, vector).view(scored_BS.shape)
            for name, vector in zip(want, with_body(model, score))
        }
