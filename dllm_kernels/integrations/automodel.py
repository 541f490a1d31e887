"""NeMo Automodel: a `DLLMStrategy` for LLaDA-like models with the loss from hidden states.

    from dllm_kernels.integrations import automodel      # before the recipe; then `dllm.mode: mdlm_headless`

Importing it registers the strategy. Everything but a microbatch's forward and backward is `MDLMStrategy`'s.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks, score_tokens
from dllm_kernels.integrations import needs, with_body
from dllm_kernels.model.headless import Body, headless

with needs("nemo_automodel", "pip install nemo-automodel"):
    from nemo_automodel.components.distributed.utils import get_sync_ctx
    from nemo_automodel.components.utils.model_utils import filter_forward_kwargs
    from nemo_automodel.recipes.dllm.strategy import DLLM_STRATEGIES, MDLMStrategy

MODE = "mdlm_headless"


class HeadlessMDLMStrategy(MDLMStrategy):
    """`MDLMStrategy`, and `sum over hidden tokens of -logp / p_mask / num_diffusion_tokens` without logits.

    Raises ValueError for context parallelism and fp8, which its own path has.
    """

    def setup_extra(self, recipe: Any) -> None:
        super().setup_extra(recipe)
        if getattr(recipe.distributed_config, "cp_size", 1) > 1:
            raise ValueError(f"cp_size must be 1 with dllm.mode={MODE}, got {recipe.distributed_config.cp_size}")
        if getattr(recipe, "te_fp8", None) is not None:
            raise ValueError(f"te_fp8 must not be set with dllm.mode={MODE}, whose head runs in the model's dtype")

    def forward_backward(
        self,
        recipe: Any,
        idx: int,
        batch: dict[str, Any],
        *,
        loss_buffer: list[Tensor],
        num_diffusion_tokens: int,
        num_ar_tokens: int | None = None,
        num_batches: int,
        is_train: bool = True,
    ) -> None:
        device = recipe.dist_env.device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        scored_BS = batch.pop("loss_mask").bool()
        if "_noise_mask" in batch:
            noisy_BS, masked_BS, p_mask_BS, ids_BS = (
                batch.pop(name) for name in ("_noisy_input_ids", "_noise_mask", "_p_mask", "_clean_input_ids")
            )
        else:  # a validation batch that no step has prepared
            ids_BS = batch["input_ids"]
            noisy_BS, masked_BS, p_mask_BS = recipe._apply_corruption(ids_BS, scored_BS, microbatch_idx=idx)
        batch = self.prepare_batch(batch, noisy_BS, masked_BS, ids_BS)
        model = recipe.model_parts[0]
        last, defer = idx == num_batches - 1, getattr(recipe.distributed_config, "defer_fsdp_grad_sync", True)
        dtype = getattr(recipe.distributed_config, "autocast_dtype", None)
        with (
            get_sync_ctx(model, last, defer_fsdp_grad_sync=defer) if is_train else nullcontext(),
            torch.autocast(device_type=device.type, dtype=dtype) if dtype is not None else nullcontext(),
            headless(model),
        ):
            given = filter_forward_kwargs(model, batch)
            input_ids = given.pop("input_ids")
            flat_N = (masked_BS & scored_BS).reshape(-1).nonzero()[:, 0]
            share_N = p_mask_BS.reshape(-1)[flat_N]
            if checks.may_read(share_N) and not bool((share_N > 0).all()):
                raise ValueError(f"p_mask must be above 0 where a token is hidden, got {float(share_N.min()):g}")
            coef_N = -1.0 / share_N.float() / max(num_diffusion_tokens, 1)

            def score(body: Body) -> Tensor:
                scores = score_tokens(
                    body(input_ids, **given),
                    body.weight,
                    ids_BS.reshape(-1)[flat_N],
                    rows=flat_N,
                    coef=coef_N,
                    take_dweight=body.take_dweight,
                    **body.options,
                )
                assert scores.weighted_sum is not None
                return scores.weighted_sum

            loss = with_body(model, score)
            loss_buffer.append(loss.detach().clone())
            recipe._dllm_loss_buffer.append(loss.detach().clone())
            if is_train:  # gradients are averaged over the data-parallel group, the loss is of all of it
                (loss * recipe._get_dp_group_size(include_cp=True)).backward()


DLLM_STRATEGIES[MODE] = HeadlessMDLMStrategy
