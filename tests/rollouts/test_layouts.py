"""Batches, padding, packing, caches: what surrounds a prompt changes none of its tokens, and what leaves the
batch is gone.
"""

from __future__ import annotations

import pytest
import torch

from dllm_kernels import generate, noise
from tests.rollouts import published
from tests.rollouts.compare import IDS, MASK, RAGGED, V, agree, left_padded
from tests.rollouts.test_samplers import RECIPES, each_recipe
from tests.tiny import eurobert

FIELDS = ("completion_BL", "commit_step_BL", "steps_B", "failed_B")
EOS = {"eos_id": 3, "temperature": 1.0, "length": 12}
ENDS = ("llada", "fast_dllm", "sdar dynamic", "entropy_bound")  # those that finish blocks


def beyond(recipe, prompt, length):
    """Tokens that a sequence generates: SDAR's to the end of the last block."""
    return length + (-(len(prompt) + length) % recipe["block_length"] if recipe.get("sampler") == "sdar" else 0)


class Calls:
    """Shapes of the ids of every call of a model."""

    def __init__(self, model):
        self.shapes = []
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *_):
        self._hook.remove()


def equal(a, b, index=slice(None)):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)[index]), name
    torch.testing.assert_close(a.commit_logp_BL, b.commit_logp_BL[index])
    torch.testing.assert_close(a.commit_entropy_BL, b.commit_entropy_BL[index])


# --- one prompt, any batch ----------------------------------------------------------------------------------


@each_recipe
def test_a_sequence_s_rollout_does_not_depend_on_the_micro_batch_the_order_or_its_company(model, recipe):
    options = {"length": 8, "mask_id": MASK, "temperature": 0.7, "seed": 5, **recipe}
    whole = generate(model, RAGGED, sequence_ids=IDS, **options)
    for micro_batch in (1, 2, 100):
        equal(generate(model, RAGGED, sequence_ids=IDS, micro_batch=micro_batch, **options), whole)
    order = torch.tensor([2, 0, 1])
    equal(generate(model, [RAGGED[b] for b in order], sequence_ids=IDS[order], **options), whole, order)
    equal(generate(model, RAGGED[1:2], sequence_ids=IDS[1:2], **options), whole, slice(1, 2))


@pytest.mark.parametrize("layout", ["left", "packed"])
@each_recipe
def test_left_padded_and_packed_prompts_have_the_rollouts_of_ragged_ones(model, recipe, layout):
    options = {"length": 8, "mask_id": MASK, "temperature": 1.0, "sequence_ids": IDS, **recipe}
    ragged = generate(model, RAGGED, **options)
    if layout == "packed":
        other = generate(model, RAGGED, packed=True, **options)
    else:
        ids, attention_mask = left_padded(RAGGED)
        other = generate(model, ids, attention_mask=attention_mask, **options)
        assert torch.equal(other.ids_BS[:, :5], ids)
        assert torch.equal(other.completion_mask_BS.nonzero()[:, 1].view(3, 8), torch.arange(5, 13).expand(3, 8))
    equal(other, ragged)
    for b, prompt in enumerate(RAGGED):
        assert torch.equal(ragged.ids_BS[b, : len(prompt)], prompt)
        assert torch.equal(ragged.ids_BS[b][ragged.text_mask_BS[b]], torch.cat([prompt, ragged.completion_BL[b]]))


def test_members_of_a_group_differ_and_so_do_seeds(model):
    prompts = [RAGGED[0]] * 16
    ids = noise.sequence_ids(["puzzle"] * 16, members=list(range(16)))
    for recipe in ("llada", "dream origin", "fast_dllm", "sdar dynamic", "entropy_bound"):
        options = {"length": 8, "mask_id": MASK, "temperature": 1.0, "sequence_ids": ids, **RECIPES[recipe]}
        rollout = generate(model, prompts, **options)
        assert len(rollout.completion_BL.unique(dim=0)) > 12
        assert not torch.equal(generate(model, prompts, seed=1, **options).completion_BL, rollout.completion_BL)
        equal(generate(model, prompts, **options), rollout)


# --- calls of the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@each_recipe
def test_a_step_is_one_call_of_the_model(model, recipe, packed):
    with Calls(model) as shapes:
        rollout = generate(
            model, RAGGED, length=8, mask_id=MASK, temperature=0.7, sequence_ids=IDS, packed=packed, greedy=True, **recipe
        )
    if recipe.get("alg", "origin") == "origin" and recipe.get("sampler") == "dream":
        assert int(rollout.steps_B.max()) <= len(shapes) <= recipe["steps"]  # a step may pass over some sequences
    elif "sdar" in str(recipe):
        assert int(rollout.steps_B.max()) <= len(shapes) <= int(rollout.steps_B.sum())
    elif rollout.steps_B.unique().numel() == 1:
        assert len(shapes) >= int(rollout.steps_B[0])
    live = torch.stack([torch.arange(20) < steps for steps in rollout.steps_B.tolist()]).sum().item()
    tokens = sum(rows * columns for rows, columns in shapes)
    if packed:
        assert {rows for rows, _ in shapes} == {1}
        assert tokens == sum((len(p) + beyond(recipe, p, 8)) * n for p, n in zip(RAGGED, rollout.steps_B.tolist(), strict=True))
    else:
        assert sum(rows for rows, _ in shapes) == live, "a call holds the sequences that take part in the step, and no others"


def test_static_samplers_call_once_a_step_and_guidance_doubles_the_rows_of_that_call(model):
    options = {"length": 8, "mask_id": MASK, "block_length": 4, "steps": 6}
    with Calls(model) as shapes:
        generate(model, RAGGED, **options)
    assert shapes == [(3, 13)] * 6
    with Calls(model) as shapes:
        generate(model, RAGGED, guidance=1.0, **options)
    assert shapes == [(6, 13)] * 6
    with Calls(model) as shapes:
        generate(model, RAGGED, micro_batch=2, width=7, deterministic=True, **options)
    assert shapes == [(2, 15)] * 12


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recipe", ENDS)
def test_finished_sequences_leave_the_batch(model, recipe, packed):
    ids = torch.arange(8) + 16
    prompts = [RAGGED[b % 3] for b in range(8)]
    with Calls(model) as shapes:
        rollout = generate(model, prompts, mask_id=MASK, sequence_ids=ids, packed=packed, **{**EOS, **RECIPES[recipe]})
    ended_B = (rollout.commit_step_BL < 0).any(-1)
    assert ended_B.any()
    assert not ended_B.all()
    taken = rollout.steps_B.tolist()
    columns = max(len(p) + beyond(RECIPES[recipe], p, 12) for p in prompts)
    assert sum(r * c for r, c in shapes) == sum(
        steps * (len(p) + beyond(RECIPES[recipe], p, 12) if packed else columns) for steps, p in zip(taken, prompts, strict=True)
    )
    with Calls(model) as shapes:
        stayed = generate(model, prompts, mask_id=MASK, sequence_ids=ids, deterministic=True, **{**EOS, **RECIPES[recipe]})
    assert set(shapes) == {(8, columns)}
    equal(stayed, rollout)


def test_a_batch_that_has_finished_calls_no_more(model):
    options = {"length": 12, "mask_id": MASK, "block_length": 4, "steps": 12}
    eos_id = int(generate(model, RAGGED[:1], **options).completion_BL[0, 0])  # what its first block decides anyway
    for deterministic in (False, True):
        with Calls(model) as shapes:
            rollout = generate(model, RAGGED[:1], deterministic=deterministic, eos_id=eos_id, **options)
        assert len(shapes) == int(rollout.steps_B) == 4
        assert rollout.masked_entropy_BT.isfinite().sum() == len(shapes)


@pytest.mark.parametrize("recipe", ENDS)
def test_deterministic_completions_in_fp32_are_bit_identical_whatever_the_batch(recipe):
    model = eurobert(layers=1, hidden=64, vocab=97, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (n,), generator=generator) for n in (9, 4, 13, 7, 11, 2, 5)]
    ids = torch.arange(7)
    options = {"mask_id": 96, "width": 16, "micro_batch": 4, "deterministic": True, **EOS, **RECIPES[recipe]}
    whole = generate(model, prompts, sequence_ids=ids, **options)
    for order in ([3, 0], [6, 2, 5, 1, 0]):
        index = torch.tensor(order)
        part = generate(model, [prompts[b] for b in order], sequence_ids=ids[index], **options)
        for name in (*FIELDS, "commit_logp_BL", "commit_entropy_BL"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[index]), name


def test_the_step_callback_sees_the_text_being_unmasked(model):
    seen = []
    rollout = generate(
        model, RAGGED, length=8, mask_id=MASK, block_length=4, steps=6, on_step=lambda n, ids: seen.append((n, ids.clone()))
    )
    assert [number for number, _ in seen] == list(range(6))
    for number, ids in seen:
        state = rollout.state_at(number + 1)[rollout.completion_mask_BS].view(3, 8)
        assert torch.equal(ids, state)
        assert int((ids == MASK).sum()) == 3 * [6, 5, 4, 2, 1, 0][number]


# --- block-causal models with a cache -----------------------------------------------------------------------


def causal(kind, dtype=torch.float64):
    import transformers

    state = torch.get_rng_state()
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    torch.set_rng_state(state)
    return model


@pytest.fixture(scope="module", params=["Qwen3", "Llama"])
def cached_model(request):
    return causal(request.param)


LENGTHS = [torch.randint(3, 10, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 2, 4, 5, 12, 3)]


@pytest.mark.parametrize("remasking", ["low_confidence_dynamic", "sequential"])
@pytest.mark.parametrize(("block_length", "steps", "length"), [(4, 3, 7), (3, 2, 6), (8, 5, 8), (1, 1, 3)])
def test_the_cache_changes_nothing_of_a_block_causal_rollout(cached_model, block_length, steps, length, remasking):
    """Prompts of every length modulo the block, against one call per step on the whole text with a 4-d mask,
    uncached.
    """
    options = {
        "sampler": "sdar",
        "block_length": block_length,
        "steps": steps,
        "length": length,
        "mask_id": MASK,
        "remasking": remasking,
        "threshold": 0.4,
        "temperature": 0.7,
        "sequence_ids": torch.arange(6),
    }
    with Calls(cached_model) as shapes:
        rollout = generate(cached_model, LENGTHS, cache=True, **options)
    with torch.no_grad():
        canvases = published.generate(
            cached_model,
            LENGTHS,
            see=lambda prompt: published.block_causal(cached_model, prompt, block_length=block_length),
            **options,
        )
    agree(rollout, canvases)
    # a call works on the block and, once, on the one before it; the first on the prompts too
    longest = max(len(p) // block_length for p in LENGTHS)
    assert shapes[0] == (6, (longest + 1) * block_length)
    assert {columns for _, columns in shapes[1:]} <= {block_length, 2 * block_length}
    blocks = len({(len(p) + i) // block_length - len(p) // block_length for p in LENGTHS for i in range(length)})
    assert sum(columns == 2 * block_length for _, columns in shapes[1:]) == blocks - 1
    assert len(shapes) <= blocks * steps
    assert len(shapes) >= int(rollout.steps_B.max())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_completion_that_ends_inside_its_first_block_is_written_where_it_belongs(cached_model, length):
    """Beside others that go on, whose places it lacks: they once overwrote its last token with the mask."""
    options = {"sampler": "sdar", "block_length": 4, "steps": 3, "threshold": 0.4, "length": length, "temperature": 0.7}
    ids = torch.arange(len(LENGTHS))
    together = generate(cached_model, LENGTHS, cache=True, mask_id=MASK, sequence_ids=ids, **options)
    for b, prompt in enumerate(LENGTHS):
        alone = generate(cached_model, [prompt], cache=True, mask_id=MASK, sequence_ids=ids[b : b + 1], **options)
        assert torch.equal(alone.completion_BL[0], together.completion_BL[b])
        assert torch.equal(alone.commit_step_BL[0], together.commit_step_BL[b])
        torch.testing.assert_close(alone.commit_logp_BL[0], together.commit_logp_BL[b], rtol=0, atol=1e-5)


def test_the_cache_takes_left_padded_prompts_and_ends_early(cached_model):
    options = {
        "sampler": "sdar",
        "block_length": 4,
        "steps": 4,
        "length": 12,
        "mask_id": MASK,
        "temperature": 1.0,
        "sequence_ids": torch.arange(6),
        "eos_id": 7,
        "top_k": 6,
    }
    see = {"see": lambda prompt: published.block_causal(cached_model, prompt, block_length=4)}
    with torch.no_grad():
        canvases = published.generate(cached_model, LENGTHS, **see, **options)
    assert {bool((canvas.step < 0).any()) for canvas in canvases} == {False, True}
    ids, attention_mask = left_padded(LENGTHS)
    agree(generate(cached_model, ids, attention_mask=attention_mask, cache=True, **options), canvases)
    agree(generate(cached_model, LENGTHS, cache=True, micro_batch=4, **options), canvases)


@pytest.mark.parametrize(("shift", "guidance"), [(1, 0.0), (0, 0.7), (1, 0.7)])
def test_the_cache_goes_with_shift_and_guidance(cached_model, shift, guidance):
    """Against the whole text under a 4-d mask in every step: a block's first token is read from the row before it."""
    options = {
        "sampler": "sdar",
        "block_length": 4,
        "steps": 3,
        "length": 7,
        "mask_id": MASK,
        "temperature": 0.7,
        "sequence_ids": torch.arange(6),
    }
    rollout = generate(cached_model, LENGTHS, cache=True, shift=shift, guidance=guidance, **options)
    see = {
        "see": lambda prompt: published.block_causal(
            cached_model, prompt, block_length=4, shift=shift, guidance=guidance, mask_id=MASK
        )
    }
    with torch.no_grad():
        canvases = published.generate(cached_model, LENGTHS, **see, **options)
    agree(rollout, canvases)
