"""Automodel's strategy for LLaDA-like models beside ours: its corruption and its loss on full logits, the same gradient."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import eurobert, gradients, worst_gradient_error

WHY = "nemo-automodel is not installed; its wheel is enough: pip install --no-deps nemo-automodel==0.7.0"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nemo_automodel") is None, reason=WHY),
    pytest.mark.slow,  # eight seconds of import
]
MASK = 10


def test_a_microbatch_s_gradient_is_that_of_its_own_loss():
    from nemo_automodel.components.loss.dllm_loss import MDLMCrossEntropyLoss
    from nemo_automodel.recipes.dllm.strategy import MDLMStrategy, get_dllm_strategy

    from dllm_kernels.integrations import automodel

    strategy = get_dllm_strategy(automodel.MODE)
    assert isinstance(strategy, automodel.HeadlessMDLMStrategy)
    ids = torch.randint(3, 10, (3, 8), generator=torch.Generator().manual_seed(0))
    loss_mask = (torch.arange(8) >= torch.tensor([[1], [3], [4]])).long()
    generator = torch.Generator().manual_seed(1)
    options = {"eps": 1e-3, "block_size": None, "half_life_ratio": None, "generator": generator}
    noisy, masked, p_mask = MDLMStrategy().apply_corruption(ids, loss_mask, MASK, **options)
    model = eurobert()
    logits = model(input_ids=noisy).logits
    theirs = MDLMCrossEntropyLoss()(
        logits=logits, target_ids=ids, noise_mask=masked, p_mask=p_mask, loss_mask=loss_mask, num_diffusion_tokens=14
    ).total_loss
    (theirs * 2).backward()
    want = gradients(model)
    model.zero_grad()
    recipe = SimpleNamespace(  # what a recipe has, by the strategy's contract
        dist_env=SimpleNamespace(device=torch.device("cpu")),
        distributed_config=SimpleNamespace(cp_size=1),
        model_parts=[model],
        _dllm_loss_buffer=[],
        _get_dp_group_size=lambda include_cp: 2,
        _apply_corruption=lambda ids, mask, microbatch_idx: (noisy, masked, p_mask),
    )
    strategy.setup_extra(recipe)
    made = {"_noisy_input_ids": noisy, "_noise_mask": masked, "_p_mask": p_mask, "_clean_input_ids": ids}
    losses: list[torch.Tensor] = []
    common = {"loss_buffer": losses, "num_diffusion_tokens": 14, "num_batches": 1}
    strategy.forward_backward(recipe, 0, {"input_ids": ids, "loss_mask": loss_mask, **made}, **common)
    assert worst_gradient_error(gradients(model), want) < 1e-5
    with torch.no_grad():  # validation: no preparation, no backward
        strategy.forward_backward(recipe, 0, {"input_ids": ids, "loss_mask": loss_mask}, is_train=False, **common)
    assert [float(loss) for loss in losses] == pytest.approx([float(theirs.detach())] * 2, rel=1e-5)
    assert recipe._dllm_loss_buffer == losses
    recipe.distributed_config.cp_size = 2
    with pytest.raises(ValueError, match=r"^cp_size must be 1 with dllm.mode=mdlm_headless, got 2"):
        strategy.setup_extra(recipe)
