"""Attention in the parts that exist equals attention under the whole mask, whatever surrounds the model."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dllm_kernels import headless, make_mask_plan
from dllm_kernels.model import block_attention, layouts
from tests.accumulation.test_block_diffusion import plan_of
from tests.rollouts.test_layouts import causal
from tests.tiny import gradients, worst_gradient_error


@pytest.fixture(scope="module")
def model():
    return causal("Qwen3")  # two query heads share a key


@pytest.fixture
def parts(monkeypatch):
    """How often attention was computed in parts."""
    calls, real = [], block_attention._noisy
    monkeypatch.setattr(block_attention, "_noisy", lambda *args: calls.append(args) or real(*args))
    return calls


def both(model, layout):
    """Hidden states of columns that are no padding, in parts and under the whole mask, and gradients of them."""
    weight = torch.randn(layout.ids_RT.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.where(layout.block_RT >= 0, weight, 0.0)
    found = []
    for whole in (False, True):
        model.zero_grad()
        with headless(model) as body:
            if whole:
                mask = layouts._additive(layout.sees, body.model)[:, None]
                hidden = body(layout.ids_RT, attention_mask=mask, position_ids=layout.position_RT)
            else:
                hidden = layouts.block_diffusion(body, layout, {})
            (hidden.square().sum(-1) * weight).sum().backward()
        found.append((hidden.detach()[layout.block_RT >= 0], gradients(model)))
    model.zero_grad()
    (got, got_gradients), (want, want_gradients) = found
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert worst_gradient_error(got_gradients, want_gradients) < 1e-6  # Qwen3 normalises in fp32


@pytest.mark.parametrize("span", [4, 6, 64])
@pytest.mark.parametrize("origin", ["sequence", "completion"])
@pytest.mark.parametrize("left", [False, True])
def test_parts_are_exact(model, parts, monkeypatch, span, origin, left):
    """Ragged prompts and completions, copies that some sequences do not have, parts of one block or of all."""
    monkeypatch.setattr("dllm_kernels.masks.layout.SPAN", span)
    both(model, plan_of(model, "trace", left=left, block_origin=origin).layout())
    assert len(parts) == 2


def test_parts_survive_checkpointing(parts):
    """The recomputation in backward is outside of any patch; the mask itself is what knows."""
    model = causal("Llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    both(model, plan_of(model, "exact").layout(3))
    assert len(parts) == 4  # two layers, each twice


def test_flex_attention_gets_the_tiles_that_see_something_and_gives_the_same_states(model, monkeypatch):
    """Forward alone: compiled for a CPU it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as of_transformers

    # uncompiled it is the same function, in minutes less
    monkeypatch.setattr(
        of_transformers, "compile_friendly_flex_attention", lambda *args, training, **kw: flex_attention(*args, **kw)
    )
    flexible = causal("Qwen3")
    flexible.set_attn_implementation("flex_attention")
    for left, origin in ((False, "sequence"), (True, "completion")):
        layout = plan_of(model, "exact", left=left, block_origin=origin).layout(3)
        mask = block_attention.flex_mask(layout)
        R, T = layout.ids_RT.shape
        assert torch.equal(mask.mask_mod(*torch.meshgrid(*map(torch.arange, (R, 1, T, T)), indexing="ij"))[:, 0], layout.sees)
        found = []
        for one in (model, flexible):
            with headless(one) as body, torch.no_grad():
                found.append(layouts.block_diffusion(body, layout, {})[layout.block_RT >= 0])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)  # Qwen3 normalises in fp32


def test_flex_attention_s_tiles_grow_with_k_and_not_with_its_square():
    tiles = []
    for k in (2, 8):
        ids = torch.zeros(1, 1024, dtype=torch.int64)
        plan = make_mask_plan(
            ids, torch.arange(1024)[None] >= 512, law="exact", samples=k, seed=0, sequence_ids=torch.tensor([1]), mask_id=9,
            causal_block=4,
        )  # fmt: skip
        layout = plan.layout()
        T = layout.ids_RT.shape[1]
        mask = block_attention.flex_mask(layout)
        seen = layout.sees.view(1, T // 128, 128, T // 128, 128).any(-1).any(2)
        assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == int(seen.sum())
        tiles.append(int(seen.sum()))
    clean, copy = 8 * 9 // 2, (tiles[1] - tiles[0]) // 6
    assert tiles == [clean + 2 * copy, clean + 8 * copy]
    assert copy == 4 * 4 + 4 * 5 // 2 + 4, "the prompt, clean blocks up to the tile's own, the copy's own tile"


def test_heads_that_share_keys_meet_them_in_parts_too(model, parts):
    """Two queries a key, as a model hands them over that leaves the repetition to the attention."""
    layout = plan_of(model, "exact").layout(2)
    (R, T), mask, generator = layout.ids_RT.shape, layout.sees[:, None], torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(R, heads, T, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    masks = block_attention.BlockMask.of(mask, layout), mask
    got, want = (attend(attn_mask=one).transpose(1, 2)[layout.block_RT >= 0] for one in masks)
    assert len(parts) == 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_any_other_attention_sees_an_ordinary_mask(parts):
    model = causal("Llama")
    model.set_attn_implementation("eager")
    both(model, plan_of(model, "exact").layout(3))
    assert not parts


def test_a_model_needs_to_name_what_a_layout_says_or_to_take_any_keyword(model):
    layout = plan_of(model, "exact").layout(2)

    class Named(torch.nn.Linear):
        config = model.config

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            raise NotImplementedError

    assert layouts.block_inputs(Named(1, 1), layout, {})["position_ids"] is layout.position_RT
    Named.forward = lambda self, input_ids, attention_mask=None: None
    with pytest.raises(ValueError, match="model must take position_ids, which the copies repeat"):
        layouts.block_inputs(Named(1, 1), layout, {})
    Named.forward = lambda self, input_ids, **more: None
    assert layouts.block_inputs(Named(1, 1), layout, {})["position_ids"] is layout.position_RT


def test_the_mask_keeps_its_structure_through_what_keeps_its_values_and_loses_it_otherwise(model):
    layout = plan_of(model, "exact").layout(2)
    mask = block_attention.BlockMask.of(layout.sees[:, None], layout)
    for kept in (mask.contiguous(), mask[:, :, :, : mask.shape[-1]], mask.to(torch.bool), mask.detach()):
        assert isinstance(kept, block_attention.BlockMask)
        assert kept.of_layout is layout
    for lost in (~mask, mask[:1], mask & mask, torch.where(mask, 0.0, 1.0)):
        assert type(lost) is torch.Tensor
