"""Which rows reach the head and what is built of them, the law of what is drawn, and one broken sequence
among others.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_kernels import generate, trajectory_rows
from dllm_kernels.backends import contract
from dllm_kernels.head import ops
from dllm_kernels.rollouts import denoising
from tests import oracle
from tests.rollouts.compare import IDS, MASK, RAGGED, V
from tests.rollouts.test_layouts import causal, equal
from tests.rollouts.test_samplers import RECIPES, each_recipe
from tests.tiny import eurobert


class Made(TorchDispatchMode):
    """Sizes of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.sizes += [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


@pytest.fixture
def head_rows(monkeypatch):
    """Rows that every call of the head was given."""
    rows, sample = [], denoising.sample

    def counted(hidden, *args, **kwargs):
        rows.append(hidden.shape[0])
        return sample(hidden, *args, **kwargs)

    monkeypatch.setattr(denoising, "sample", counted)
    return rows


@each_recipe
def test_no_logits_of_the_whole_text_exist(backend, recipe, monkeypatch):
    """B S is 1040 here; what is as wide as the vocabulary has one block of rows, or no more than there are
    candidates.
    """
    monkeypatch.setattr(ops, "observed", lambda *tensors: False)  # else the head would be one operation, seen from outside
    vocabulary = 600
    model = eurobert(vocab=vocabulary, layers=1, hidden=16, dtype=torch.float32)
    prompts = [torch.arange(3, 3 + n) for n in (252, 250, 251, 252)]
    options = {"length": 8, "mask_id": vocabulary - 1, "temperature": 1.0, "sequence_ids": torch.arange(4)}
    with Made() as made:
        generate(model, prompts, **options, **recipe)
    weights = {(16, vocabulary), (vocabulary, 16)}
    wide = [size for size in made.sizes if vocabulary in size and size not in weights]
    assert max((math.prod(size) // vocabulary for size in wide), default=0) <= contract.ROW_BLOCK
    columns = 261 if recipe.get("block_length") == 3 and recipe.get("sampler") == "sdar" else 260  # its last block is whole
    assert any(size[1:] == (columns, 16) for size in made.sizes), "the model was watched"
    assert any(size[-1:] == (vocabulary,) for size in wide) or backend.name == "cpu", "the head was watched"


def test_the_head_sees_the_undecided_rows_of_the_active_block_and_no_others(model, head_rows):
    options = {"length": 8, "mask_id": MASK}
    generate(model, RAGGED, block_length=4, steps=6, **options)
    assert head_rows == [3 * n for n in (4, 2, 1, 4, 2, 1)]
    head_rows.clear()
    generate(model, RAGGED, block_length=4, steps=6, greedy=True, **options)
    assert head_rows[::2] == [3 * n for n in (4, 2, 1, 4, 2, 1)]
    assert head_rows[1::2] == [3 * n for n in (8, 6, 5, 4, 2, 1)]
    head_rows.clear()
    generate(model, RAGGED, sampler="dream", alg="entropy", steps=4, guidance=1.0, **options)
    assert head_rows == [3 * n for n in (8, 7, 5, 3)]


@pytest.mark.parametrize("recipe", ["dream origin", "fast_dllm", "sdar dynamic", "entropy_bound"])
def test_so_it_does_where_the_number_is_known_only_at_run_time(model, head_rows, recipe):
    rollout = generate(model, RAGGED, length=8, mask_id=MASK, temperature=0.7, sequence_ids=IDS, **RECIPES[recipe])
    size = RECIPES[recipe].get("block_length", 8)
    expected = 0
    for b, prompt in enumerate(RAGGED):
        first = len(prompt) if recipe.startswith("sdar") else 0
        for step in range(int(rollout.steps_B[b])):
            steps_L = rollout.step_map_BS[b][rollout.step_map_BS[b] >= 0]  # SDAR's go on to the end of the last block
            now = steps_L == step
            if recipe == "dream origin":
                expected += int(now.sum())  # what chance has chosen
                continue
            block_L = (first + torch.arange(len(steps_L))) // size
            expected += int(((block_L == block_L[now][0]) & (steps_L >= step)).sum())
    assert sum(head_rows) == expected


# --- laws ---------------------------------------------------------------------------------------------------

N = 4000


def many(model, length, **options):
    options = {"mask_id": MASK, "sequence_ids": torch.arange(N), "deterministic": True, **options}
    return generate(model, torch.tensor([[3, 9, 4]]).expand(N, 3), length=length, **options)


@torch.no_grad()
def law(model, completion, temperature, top_k=None):
    """Probabilities `[L, V]` in fp64, the mask id ruled out."""
    z = model(torch.tensor([[3, 9, 4, *completion]])).logits[0, 3:].double() / temperature
    z[:, MASK] = -math.inf
    if top_k is not None:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
    return z.softmax(-1)


def fits(observed, expected):
    """Chi-square with cells of less than 5 expected draws put together."""
    assert (observed[expected == 0] == 0).all()
    rare = (expected < 5) & (expected > 0)
    cells = [(observed[expected >= 5], expected[expected >= 5]), (observed[rare].sum()[None], expected[rare].sum()[None])]
    o, e = (torch.cat(parts) for parts in zip(*(c for c in cells if c[1].sum() > 0), strict=True))
    assert len(e) > 2
    assert oracle.chi_square(o.double(), e) < oracle.chi_square_limit(len(e) - 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("recipe", ["llada", "dream maskgit_plus", "fast_dllm", "sdar static", "entropy_bound"])
def test_one_token_follows_the_softmax_at_the_temperature(model, recipe, temperature):
    options = {**RECIPES[recipe], "block_length": 1, "steps": 1}
    top_k = options.pop("top_k", None) and 4
    options.pop("top_p", None), options.pop("shift", None)
    if recipe in ("fast_dllm", "entropy_bound"):
        options["steps"] = None
    if "dream" in recipe:
        options["block_length"] = None
    drawn = many(model, 1, temperature=temperature, top_k=top_k, **options).completion_BL[:, 0]
    fits(torch.bincount(drawn, minlength=V), N * law(model, [MASK], temperature, top_k)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_tokens_in_random_order_follow_the_mixture_over_orders(model, temperature):
    """Drawn by the chain rule along an order that is itself by chance: the joint law is the mean over both
    orders.
    """
    rollout = many(model, 2, block_length=2, steps=2, remasking="random", temperature=temperature)
    joint = torch.zeros(V, V, dtype=torch.float64)
    alone = law(model, [MASK, MASK], temperature)
    for v in range(V):
        joint[v] += 0.5 * alone[0, v] * law(model, [v, MASK], temperature)[1]
        joint[:, v] += 0.5 * alone[1, v] * law(model, [MASK, v], temperature)[0]
    first, second = rollout.completion_BL.unbind(1)
    fits(torch.bincount(V * first + second, minlength=V * V), N * joint.flatten())
    ahead = int((rollout.commit_step_BL[:, 0] == 0).sum())
    assert abs(ahead - N / 2) < 5 * math.sqrt(N) / 2


def test_dream_s_origin_decides_each_token_with_the_share_of_the_schedule(model):
    rollout = many(model, 3, sampler="dream", steps=3, eps=0.1, temperature=1.0)
    t = [1.0, 0.7, 0.4]
    chance = torch.tensor([t[0] - t[1], t[1] - t[2], t[2]], dtype=torch.float64)  # of step 0, 1, 2, for each token by itself
    calls = rollout.commit_step_BL.tolist()
    merged: dict[tuple[int, ...], float] = {}
    for steps in itertools.product(range(3), repeat=3):
        rank = {step: i for i, step in enumerate(sorted(set(steps)))}  # a call is counted only where it decides something
        key = tuple(rank[step] for step in steps)
        merged[key] = merged.get(key, 0.0) + float(chance[list(steps)].prod())
    found = torch.tensor([sum(tuple(c) == key for c in calls) for key in merged])
    fits(found, N * torch.tensor(list(merged.values()), dtype=torch.float64))


# --- a broken sequence --------------------------------------------------------------------------------------

POISON = 9  # only the first prompt holds it


def poisoned(model, token=POISON, value=math.nan):
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@each_recipe
def test_a_sequence_that_is_not_a_number_is_told_and_the_others_are_unharmed(model, recipe, value):
    options = {"length": 8, "mask_id": MASK, "temperature": 0.7, "sequence_ids": IDS, "suppress": (POISON,), **recipe}
    clean = generate(model, RAGGED, **options)
    rollout = generate(poisoned(eurobert(layers=1, hidden=16), value=value), RAGGED, greedy=True, **options)
    assert rollout.failed_B.tolist() == [True, False, False]
    assert (rollout.completion_BL[0] == MASK).all()
    assert (rollout.commit_step_BL[0] == -1).all()
    kept = rollout.kept((~rollout.failed_B).nonzero()[:, 0])
    equal(kept, clean, slice(1, 3))
    with pytest.raises(ValueError, match=r"rollout.*failed.*\[0\]"):
        trajectory_rows(rollout)
    assert len(trajectory_rows(kept).rows) == 16


def test_a_sequence_may_break_in_the_middle(model):
    """A token whose embedding is no number is drawn by some: whoever sees it in a later step fails, and
    nobody else.
    """
    options = {"length": 8, "mask_id": MASK, "temperature": 1.0, "sequence_ids": torch.arange(24), "block_length": 8, "steps": 4}
    prompts = [RAGGED[1 + b % 2] for b in range(24)]
    clean = generate(model, prompts, **options)
    expected = [bool((clean.completion_BL[b][clean.commit_step_BL[b] < 3] == 7).any()) for b in range(24)]
    assert 0 < sum(expected) < 24
    rollout = generate(poisoned(eurobert(layers=1, hidden=16), token=7), prompts, **options)
    assert rollout.failed_B.tolist() == expected
    alive = (~rollout.failed_B).nonzero()[:, 0]
    equal(rollout.kept(alive), clean, alive)


def test_a_broken_sequence_leaves_its_neighbours_in_a_cached_batch_alone():
    prompts = [torch.tensor(ids) for ids in ([3, POISON, 4, 5, 6], [3, 4], [5, 6, 7, 8, 3, 4, 5, 6, 7])]
    options = {
        "sampler": "sdar",
        "block_length": 4,
        "steps": 2,
        "length": 8,
        "mask_id": MASK,
        "suppress": (POISON,),
        "cache": True,
    }
    clean = generate(causal("Qwen3"), prompts, **options)
    rollout = generate(poisoned(causal("Qwen3")), prompts, **options)
    assert rollout.failed_B.tolist() == [True, False, False]
    equal(rollout.kept(torch.tensor([1, 2])), clean, slice(1, 3))


def test_a_broken_sequence_breaks_the_one_row_that_it_is_packed_into_and_says_so():
    """Attention multiplies what it must not see by 0, and 0 times not-a-number is none: no sequence of the
    row is trusted.
    """
    options = {"length": 8, "mask_id": MASK, "block_length": 4, "steps": 4, "suppress": (POISON,), "packed": True}
    rollout = generate(poisoned(eurobert(layers=1, hidden=16)), RAGGED, **options)
    assert rollout.failed_B.all()
    parted = generate(poisoned(eurobert(layers=1, hidden=16)), RAGGED, micro_batch=1, **options)
    assert parted.failed_B.tolist() == [True, False, False]
