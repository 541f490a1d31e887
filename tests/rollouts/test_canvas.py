"""Holes anywhere, lengths of their own, and a queue: each sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch

from dllm_kernels import generate, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.rollouts.canvas import make_canvas
from tests.rollouts import published
from tests.rollouts.compare import IDS, MASK, RAGGED, left_padded
from tests.rollouts.test_layouts import FIELDS, Calls
from tests.rollouts.test_samplers import RECIPES, TAKING_BACK
from tests.tiny import eurobert

M = MASK
CANVASES = [torch.tensor(ids) for ids in ([3, M, 9, M, M, 4, M, M, 8], [M, M, M, M, 5, 6], [8, 3, M, M, 3, M, 6, 7, M, M])]
HOLES = [5, 4, 5]
FREE = {name: r for name, r in {**RECIPES, **TAKING_BACK}.items() if r.get("sampler") != "sdar" and not r.get("shift")}
each_free = pytest.mark.parametrize("name", FREE)


def published_loop(model, canvas, *, sequence_id, sampler="llada", temperature, top_k=None, top_p=None, seed=0, **options):
    """The published loop on the holes of one canvas: it sees its places, and the model the whole canvas."""
    places = (canvas == MASK).nonzero()[:, 0]

    def filled(completion):
        ids = canvas.clone()
        ids[places] = completion
        return ids

    def look(completion):
        return model(filled(completion)[None]).logits[0].double()[places].clone()

    found = published.Canvas(
        look,
        len(places),
        MASK,
        seed=seed,
        sequence_id=sequence_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_p_first=sampler in ("dream", "fast_dream", "rcr", "remdm"),
        suppress=[MASK],
    )
    if sampler == "wino":
        options["verify"] = shadows(model, places, filled)
    {**published.SAMPLERS, **published.taking_back.SAMPLERS}[sampler](found, **options)
    return found


def shadows(model, places, filled):
    def verify(completion, block):
        ids, b = filled(completion), len(block)
        S, own = len(ids), places[list(block)]
        allowed = torch.ones(S + b, S + b, dtype=torch.bool)
        allowed[:S, S:] = False
        allowed[S + torch.arange(b), own] = False
        bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
        longer = torch.cat([ids, torch.full((b,), MASK)])[None]
        position = torch.cat([torch.arange(S), own])[None]
        z = model(longer, attention_mask=bias[None, None], position_ids=position).logits[0].double()[S:].clone()
        z[:, MASK] = -torch.inf
        return z

    return verify


def per_block(recipe, longest=8):
    """The recipe, which is that of a completion of so many tokens, with the steps of a block."""
    if "block_length" not in recipe or "steps" not in recipe:
        return recipe
    return {**recipe, "steps": recipe["steps"] // -(-longest // recipe["block_length"])}


def steps_of(recipe, count):
    """Steps of a completion of `count` tokens with these of each block."""
    if "block_length" not in recipe or "steps" not in recipe:
        return recipe
    return {**recipe, "steps": recipe["steps"] * -(-count // recipe["block_length"])}


@each_free
@torch.no_grad()
def test_holes_are_filled_as_the_published_loop_fills_them_one_canvas_alone(model, name):
    recipe, temperature = per_block(FREE[name], max(HOLES)), 0.7
    rollout = generate(model, CANVASES, length=None, mask_id=MASK, sequence_ids=IDS, temperature=temperature, **recipe)
    for b, canvas in enumerate(CANVASES):
        alone = published_loop(model, canvas, sequence_id=int(IDS[b]), temperature=temperature, **steps_of(recipe, HOLES[b]))
        n = HOLES[b]
        assert rollout.completion_BL[b, :n].tolist() == alone.ids.tolist()
        assert rollout.commit_step_BL[b, :n].tolist() == alone.step.tolist()
        assert (rollout.completion_BL[b, n:] == MASK).all()
        torch.testing.assert_close(rollout.commit_logp_BL[b, :n].double(), alone.logp, rtol=1e-5, atol=1e-6)
        assert torch.equal(rollout.ids_BS[b, : len(canvas)][canvas != MASK], canvas[canvas != MASK])
        assert rollout.completion_mask_BS[b].nonzero()[:, 0].tolist() == (canvas == MASK).nonzero()[:, 0].tolist()
        for step, state in enumerate(alone.states):
            assert torch.equal(rollout.state_at(step)[b][rollout.completion_mask_BS[b]], state)


@pytest.mark.parametrize("name", ["llada", "fast_dllm", "rcr", "wino", "remdm conf"])
def test_states_of_canvases_are_scored_as_they_were_seen(model, name):
    """So are those of samplers that take tokens back: RL works on them as on any rollout."""
    rollout = generate(model, CANVASES, length=None, mask_id=MASK, sequence_ids=IDS, temperature=1.0, seed=4,
                       **per_block(FREE[name], max(HOLES)))  # fmt: skip
    for score in ("last", "all_events"):
        plan = trajectory_rows(rollout, score=score)
        mask = {"attention_mask": rollout.attention_mask_BS.long()}
        scored = score_samples(model, plan, suppress=(MASK,), model_kwargs=mask)
        torch.testing.assert_close(scored, trajectory_logp(rollout, plan), rtol=1e-5, atol=1e-5)
    assert int(trajectory_rows(rollout).counts.sum()) == sum(HOLES)


@pytest.mark.parametrize("layout", ["ragged", "left", "packed"])
@pytest.mark.parametrize("name", ["llada", "fast_dllm", "dream threshold", "dream entropy"])
def test_lengths_of_their_own(model, layout, name):
    """Of each prompt its own length: as a canvas with so many masks behind it, and as the published loop alone."""
    recipe, lengths = per_block(RECIPES[name]), [8, 3, 6]
    shift = recipe.get("shift", 0)
    options = {"mask_id": MASK, "temperature": 0.7, "sequence_ids": IDS, "length": lengths, **recipe}
    if layout == "left":
        ids, attention_mask = left_padded(RAGGED)
        rollout = generate(model, ids, attention_mask=attention_mask, **options)
        assert torch.equal(rollout.ids_BS[:, :5], ids)
    else:
        rollout = generate(model, RAGGED, packed=layout == "packed", **options)
    for b, prompt in enumerate(RAGGED):
        mine = steps_of(recipe, lengths[b])
        (alone,) = published.generate(
            model,
            [prompt],
            length=lengths[b],
            mask_id=MASK,
            temperature=0.7,
            sequence_ids=IDS[b : b + 1],
            **({**mine, "shift": shift} if shift else mine),
        )
        assert rollout.completion_BL[b, : lengths[b]].tolist() == alone.ids.tolist()
        assert int(rollout.completion_mask_BS[b].sum()) == lengths[b]


def test_an_end_within_a_length_of_its_own(model):
    options = {"mask_id": MASK, "temperature": 1.0, "sequence_ids": IDS, "length": [12, 8, 5], **RECIPES["fast_dllm"]}
    plain = generate(model, RAGGED, **options)
    eos_id = int(plain.completion_BL[0, 2])
    ended = generate(model, RAGGED, eos_id=eos_id, **options)
    assert torch.equal(ended.completion_BL[0, :4], plain.completion_BL[0, :4])
    assert (ended.completion_BL[0, 4:] == eos_id).all()
    assert (ended.commit_step_BL[0, 4:] == -1).all()
    assert (ended.completion_BL[2, 5:] == MASK).all(), "there is nothing beyond its length"


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "confidence_threshold"])
def test_dream_ends_when_nothing_before_an_eos_is_undecided(model, alg):
    options = {"length": 12, "mask_id": MASK, "temperature": 1.0, "sequence_ids": IDS, "sampler": "dream", "alg": alg, "steps": 6}
    plain = generate(model, RAGGED, **options)
    saved = 0
    for eos_id in range(10):
        ended = generate(model, RAGGED, eos_id=eos_id, **options)
        canvases = published.generate(model, RAGGED, eos_id=eos_id, **options)
        assert torch.equal(ended.completion_BL, torch.stack([c.ids for c in canvases]))
        assert ended.steps_B.tolist() == [len(c.states) for c in canvases]
        saved += int(plain.steps_B.sum() - ended.steps_B.sum())
        for b in range(3):
            text = plain.completion_BL[b].tolist()
            end = text.index(eos_id) + 1 if eos_id in text else 12
            assert ended.completion_BL[b, :end].tolist() == text[:end], "the text up to the end is what it would have been"
    assert saved > 0


# --- the queue ----------------------------------------------------------------------------------------------


QUEUE = {
    "fast_dllm": {**RECIPES["fast_dllm"], "eos_id": 3},
    "llada": {**RECIPES["llada"], "eos_id": 3},
    "dream": {"sampler": "dream", "alg": "entropy", "alg_temp": 0.3, "steps": 7, "eos_id": 3},
    "sdar": {**RECIPES["sdar dynamic"], "eos_id": 3},
    "remdm": TAKING_BACK["remdm conf"],
    "wino": TAKING_BACK["wino"],
}


@pytest.mark.parametrize("recipe", QUEUE.values(), ids=QUEUE)
def test_sequences_enter_as_others_leave_and_have_the_bits_that_they_have_alone(recipe):
    model = eurobert(layers=1, hidden=64, vocab=97, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (n,), generator=generator) for n in (9, 4, 13, 7, 11, 2, 5)]
    ids = torch.arange(7)
    options = {"mask_id": 96, "width": 16, "micro_batch": 3, "deterministic": True, "temperature": 1.0, "length": 8, **recipe}
    with Calls(model) as shapes:
        queued = generate(model, prompts, sequence_ids=ids, **options)
    assert len(set(shapes)) == 1
    taken = queued.steps_B.tolist()
    assert -(-sum(taken) // 3) <= len(shapes)
    if recipe["sampler" if "sampler" in recipe else "steps"] in ("fast_dllm", "sdar"):
        rounds = sum(max(taken[b : b + 3]) for b in range(0, 7, 3))
        assert len(shapes) < rounds, "no call waits for the slowest of a round"
    for b in (0, 3, 6):
        alone = generate(model, prompts[b : b + 1], sequence_ids=ids[b : b + 1], **options)
        for name in (*FIELDS, "commit_logp_BL", "commit_entropy_BL"):
            assert torch.equal(getattr(alone, name)[0], getattr(queued, name)[b]), name


@pytest.mark.parametrize("name", ["fast_dllm", "llada"])
def test_a_queue_of_canvases_and_lengths(model, name):
    """Also in how many steps a canvas is filled does not depend on the longest beside it."""
    options = {"mask_id": MASK, "temperature": 0.7, "micro_batch": 2, **per_block(RECIPES[name])}
    ids = torch.arange(6)
    together = generate(model, CANVASES * 2, length=None, sequence_ids=ids, **options)
    for b in range(6):
        alone = generate(model, [CANVASES[b % 3]], length=None, sequence_ids=ids[b : b + 1], **options)
        n = HOLES[b % 3]
        assert torch.equal(alone.completion_BL[0, :n], together.completion_BL[b, :n])
        assert torch.equal(alone.commit_step_BL[0, :n], together.commit_step_BL[b, :n])


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt_ids": [CANVASES[0], torch.tensor([3, 4])]}, ValueError, ["prompt_ids", "every canvas", "[1]"]),
        ({"prompt_ids": RAGGED, "length": [4, 4]}, ValueError, ["length", "3 prompts", "got 2"]),
        ({"prompt_ids": RAGGED, "length": [4, 0, 4]}, ValueError, ["length[1]", "0"]),
        ({"prompt_ids": RAGGED, "length": [4, 2.0, 4]}, TypeError, ["length[1]", "float"]),
        ({"prompt_ids": RAGGED, "length": "4"}, TypeError, ["length", "str"]),
        ({"length": 4}, ValueError, ["prompt_ids", f"mask_id={MASK}", "length=None"]),
        ({"sampler": "sdar", "steps": 2}, ValueError, ["length", "sdar"]),
        ({"cache": "dual"}, ValueError, ["cache", "holes", "dual"]),
        ({"shift": 1}, ValueError, ["prompt_ids", "begin with 1", "shift=1"]),
        ({"eos_id": 3}, ValueError, ["eos_id", "follow a mask", "3"]),
        ({"steps": 5}, ValueError, ["steps", "of a block", "block_length=4", "5"]),
        ({"steps": 0}, ValueError, ["steps", "0"]),
        ({"prompt_ids": RAGGED, "length": [4, 4, 4], "width": 8}, ValueError, ["width", "9", "8"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(model, changes, error, words):
    options = {"prompt_ids": CANVASES, "length": None, "mask_id": MASK, "block_length": 4, "steps": 4} | changes
    with pytest.raises(error) as caught:
        generate(model, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "holes", "words"),
    [
        ([3, 4, 5], [], ["holes", "none"]),
        ([3, 4, 5], [(0, 2), (1, 3)], ["holes", "overlap", "(0, 2)", "(1, 3)"]),
        ([3, 4, 5], [(1, 1)], ["holes", "(1, 1)"]),
        ([3, 4, 5], [(2, 4)], ["holes", "3", "(2, 4)"]),
        ([3, M, 5], [(0, 1)], ["ids", f"mask_id={M}"]),
    ],
)
def test_holes_that_make_no_canvas(ids, holes, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        make_canvas(torch.tensor(ids), holes, mask_id=MASK)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("holes", [[(0.0, 2)], [("a", 2)], [(0, 1, 2)], [3], [(True, 2)], None, "ab"])
def test_holes_that_are_no_places(holes):
    with pytest.raises(TypeError, match=r"holes must be (pairs of ints, \(first, end\)|a list or tuple of \(first, end\)), got"):
        make_canvas(torch.tensor([3, 4, 5]), holes, mask_id=MASK)
