"""Every sampler token for token against the published loops with full logits: tokens, steps, logps,
entropies, states, greedy.
"""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import Rollout, generate, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.rollouts import schedules
from dllm_kernels.rollouts.samplers import SAMPLERS
from tests.rollouts import published
from tests.rollouts.compare import IDS, MASK, RAGGED, V, both
from tests.tiny import eurobert

LAYOUTS = ("ragged", "left", "packed")
TEMPERATURES = (0.0, 0.7, 1.0)
RECIPES = {
    "llada": {"block_length": 4, "steps": 6},
    "llada random": {"block_length": 4, "steps": 6, "remasking": "random"},
    "dream origin": {"sampler": "dream", "steps": 5},
    "dream maskgit_plus": {"sampler": "dream", "steps": 5, "alg": "maskgit_plus", "top_p": 0.8, "top_k": 4, "shift": 1},
    "dream topk_margin": {"sampler": "dream", "steps": 12, "alg": "topk_margin"},
    "dream entropy": {"sampler": "dream", "steps": 3, "alg": "entropy", "alg_temp": 0.3, "top_p": 0.9, "shift": 1},
    "fast_dllm": {"sampler": "fast_dllm", "block_length": 4, "threshold": 0.3},
    "sdar dynamic": {"sampler": "sdar", "block_length": 3, "steps": 2, "threshold": 0.3},
    "sdar static": {
        "sampler": "sdar",
        "block_length": 5,
        "steps": 3,
        "remasking": "low_confidence_static",
        "top_k": 3,
        "top_p": 0.7,
    },
    "sdar entropy": {"sampler": "sdar", "block_length": 4, "remasking": "entropy_bounded", "bound": 1.0},
    "sdar sequential": {"sampler": "sdar", "block_length": 4, "steps": 3, "remasking": "sequential"},
    "entropy_bound": {"sampler": "entropy_bound", "block_length": 4, "bound": 2.0},
    "roar": {"sampler": "roar", "block_length": 4},
    "fast_dllm factor": {"sampler": "fast_dllm", "block_length": 4, "factor": 2.0},
    "dream threshold": {"sampler": "dream", "steps": 4, "alg": "confidence_threshold", "threshold": 0.25, "top_p": 0.9},
    "fast_dream": {"sampler": "fast_dream", "block_length": 4, "threshold": 0.25, "shift": 1},
    "fast_dream entropy": {"sampler": "fast_dream", "block_length": 4, "steps": 6, "alg": "entropy", "shift": 1},
}
OFF = torch.linspace(1, 1e-5, 10)[7].item()  # the time of one of nine steps, which is the first that takes nothing back
TAKING_BACK = {
    "rcr": {"sampler": "rcr", "block_length": 4, "steps": 6},
    "rcr margin": {"sampler": "rcr", "block_length": 8, "steps": 5, "alg": "topk_margin", "top_k": 5},
    "wino": {"sampler": "wino", "block_length": 8, "threshold": 0.2, "threshold_back": 0.5},
    "remdm cap": {"sampler": "remdm", "steps": 6, "eta": 0.3},
    "remdm rescale": {"sampler": "remdm", "steps": 6, "eta": 0.5, "strategy": "rescale"},
    "remdm conf": {"sampler": "remdm", "steps": 6, "strategy": "conf"},
    "remdm loop": {"sampler": "remdm", "steps": 9, "strategy": "loop", "eta": 0.1, "t_on": 0.7, "t_off": OFF},
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@each_recipe
def test_every_sampler_equals_its_published_loop_on_ragged_prompts(model, recipe, temperature):
    both(model, temperature=temperature, seed=3, **recipe)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("recipe", TAKING_BACK.values(), ids=TAKING_BACK)
def test_and_those_that_take_tokens_back(model, recipe, temperature):
    rollout, _ = both(model, temperature=temperature, seed=3, length=8, **recipe)
    assert rollout.edited or recipe.get("alg")


@pytest.mark.parametrize("recipe", TAKING_BACK.values(), ids=TAKING_BACK)
def test_whose_padding_and_company_change_nothing_either(model, recipe):
    options = {"temperature": 0.7, "length": 8, **recipe}
    left, _ = both(model, layout="left", **options)
    for micro_batch in (1, 2):
        ragged = generate(model, RAGGED, mask_id=MASK, sequence_ids=IDS, micro_batch=micro_batch, **options)
        assert torch.equal(ragged.completion_BL, left.completion_BL)
        assert torch.equal(ragged.commit_step_BL, left.commit_step_BL)


@each_recipe
def test_and_on_left_padded_prompts_as_if_there_were_no_padding(model, recipe):
    both(model, layout="left", temperature=0.7, **recipe)


@each_recipe
def test_and_packed_into_one_row(model, recipe):
    both(model, layout="packed", temperature=1.0, **recipe)


@each_recipe
def test_and_in_fp32_on_every_backend(backend, model32, recipe):
    _, canvases = both(model32, temperature=0.7, dtype=torch.float32, length=6 if "sdar" in str(recipe) else 8, **recipe)
    assert len({tuple(canvas.ids.tolist()) for canvas in canvases}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@each_recipe
@pytest.mark.parametrize("seed", [1, 2])
def test_and_at_every_layout_temperature_and_seed(recipe, temperature, layout, seed):
    both(eurobert(seed=seed), layout=layout, temperature=temperature, seed=seed, length=12, **recipe)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize(
    ("length", "block_length", "steps"), [(8, 8, 8), (8, 8, 3), (8, 4, 4), (6, 6, 1), (6, 2, 6), (6, 3, 4), (1, 1, 1)]
)
def test_llada_s_blocks_and_steps_that_do_not_divide(model, length, block_length, steps, remasking):
    rollout, _ = both(
        model, length=length, block_length=block_length, steps=steps, temperature=1.0, remasking=remasking, sequence_ids=IDS
    )
    assert rollout.steps_B.tolist() == [steps] * 3


def test_llada_s_remainders_go_to_the_earliest_steps(model):
    rollout = generate(model, RAGGED, mask_id=MASK, length=10, block_length=5, steps=6)
    for b in range(3):
        assert torch.bincount(rollout.commit_step_BL[b]).tolist() == [2, 2, 1, 2, 2, 1]
        assert rollout.commit_step_BL[b, :5].max() < rollout.commit_step_BL[b, 5:].min()


@pytest.mark.parametrize("block_length", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("remasking", ["low_confidence_dynamic", "sequential"])
def test_sdar_s_blocks_begin_with_the_prompt_so_the_first_and_the_last_are_partial(model, block_length, remasking):
    steps = max(1, block_length - 1)
    rollout, _ = both(
        model, sampler="sdar", block_length=block_length, steps=steps, remasking=remasking, temperature=0.7, threshold=0.2
    )
    for b, prompt in enumerate(RAGGED):
        of_block = {}
        for place, step in enumerate(rollout.commit_step_BL[b].tolist()):
            of_block.setdefault((len(prompt) + place) // block_length, []).append(step)
        in_order = [of_block[block] for block in sorted(of_block)]
        assert all(max(a) < min(b) for a, b in itertools.pairwise(in_order))


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("sampler", ["fast_dllm", "sdar"])
def test_any_threshold(model, sampler, threshold):
    steps = {"steps": 4} if sampler == "sdar" else {}
    rollout, _ = both(model, sampler=sampler, block_length=4, threshold=threshold, temperature=1.0, **steps)
    if threshold == 1.0:
        assert rollout.steps_B.tolist() == ([8, 8, 8] if sampler == "fast_dllm" else [11, 10, 8])  # to the end of the block
    if threshold == 0.0:
        assert rollout.steps_B.tolist() == ([2, 2, 2] if sampler == "fast_dllm" else [3, 3, 2])


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0, 100.0])
def test_any_entropy_bound(model, bound):
    rollout, _ = both(model, sampler="entropy_bound", block_length=4, bound=bound, temperature=0.7)
    assert rollout.steps_B.tolist() == {0.0: [8, 8, 8], 100.0: [2, 2, 2]}.get(bound, rollout.steps_B.tolist())


@given(length=st.integers(1, 400), steps=st.integers(1, 500), eps=st.floats(1e-5, 0.5))
def test_dream_commits_the_published_numbers_of_tokens(length, steps, eps):
    counts = schedules.times_commit(length, steps, eps)
    assert counts == published.dream_counts(length, steps, eps)
    assert sum(counts) == length


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("alg_temp", [None, 0.0, 0.05, 3.0])
def test_dream_s_order_may_be_drawn(model, alg, alg_temp):
    both(model, sampler="dream", steps=4, alg=alg, alg_temp=alg_temp, temperature=0.0, shift=1)


def test_dream_s_nucleus_is_that_of_all_ids_and_sdar_s_of_the_k_largest(model):
    """The orders leave other ids: of the two largest, SDAR's nucleus holds 0.6 of their own mass, Dream's of
    everybody's.
    """
    restriction = {"top_k": 2, "top_p": 0.6, "temperature": 1.0}
    for seed in range(2):
        both(model, sampler="dream", steps=4, alg="maskgit_plus", seed=seed, **restriction)
        both(model, sampler="sdar", steps=4, block_length=4, seed=seed, **restriction)


@pytest.mark.parametrize("layout", ["ragged", "left"])
@pytest.mark.parametrize("recipe", ["llada", "dream maskgit_plus", "fast_dllm", "sdar dynamic"])
def test_classifier_free_guidance_hides_the_prompt(model, recipe, layout):
    guided, _ = both(model, layout=layout, guidance=1.5, temperature=0.7, **RECIPES[recipe])
    plain, _ = both(model, layout=layout, temperature=0.7, **RECIPES[recipe])
    assert not torch.equal(guided.commit_logp_BL, plain.commit_logp_BL)


@pytest.mark.parametrize("recipe", ["llada", "fast_dllm", "entropy_bound"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_of_commit_last_wait_until_nothing_else_is_left(model, recipe, temperature):
    options = {"temperature": temperature, "seed": 2, **RECIPES[recipe]}
    plain, _ = both(model, **options)
    late = plain.completion_BL.flatten().mode().values.item()
    rollout, _ = both(model, commit_last=(late,), **options)
    assert (rollout.completion_BL == late).any()
    assert not torch.equal(rollout.commit_step_BL, plain.commit_step_BL)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_committed_last_may_be_left_out_of_the_confidence_of_others(temperature):
    """LLaDA's `confidence_eos_eot_inf`: the others' probabilities are those without it, which changes their order."""
    drawn, same_order = set(), set()
    for seed in range(6):
        model = eurobert(layers=1, hidden=16, seed=seed)
        options = {"temperature": temperature, "remasking": "low_confidence", "block_length": 8, "steps": 8}
        late = both(model, **options)[0].completion_BL.flatten().mode().values.item()
        last, _ = both(model, commit_last=(late, 3), **options)
        rollout, _ = both(model, commit_last=(late, 3), renormalise=True, **options)
        drawn.add(bool((rollout.completion_BL == late).any()))
        same_order.add(torch.equal(rollout.commit_step_BL, last.commit_step_BL))
    assert True in drawn
    assert False in same_order


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.7, 5.0])
def test_any_factor(model, factor):
    for block_length in (2, 4, 8):
        both(model, sampler="fast_dllm", block_length=block_length, factor=factor, temperature=1.0)


def test_random_order_a_token_a_step_gives_the_elbo_on_average():
    """DMPO's roar: the mean over all orders of the exact log-probability given the order is the ELBO (AO-ARM)."""
    model, L = eurobert(layers=1, hidden=16), 4
    prompt, ids = torch.tensor([3, 9, 4]), torch.tensor([5, 1, 7, 5])
    orders = list(itertools.permutations(range(L)))
    states = Rollout.from_steps([prompt] * len(orders), [ids] * len(orders), orders, mask_id=MASK)
    exact = score_samples(model, trajectory_rows(states), suppress=(MASK,)).sum(-1).mean()
    subsets = [list(s) for n in range(1, L + 1) for s in itertools.combinations(range(L), n)]
    noisy = torch.stack([torch.cat([prompt, ids]) for _ in subsets])
    for row, hidden in enumerate(subsets):
        noisy[row, [3 + place for place in hidden]] = MASK
    with torch.no_grad():
        z = model(noisy).logits[:, 3:].double()
    z[..., MASK] = -torch.inf
    logp = z.log_softmax(-1).gather(-1, ids.expand(len(subsets), L)[..., None])[..., 0]
    weights = [1 / len(s) / math.comb(L, len(s)) for s in subsets]
    elbo = sum(w * float(logp[row, s].sum()) for row, (w, s) in enumerate(zip(weights, subsets, strict=True)))
    assert float(exact) == pytest.approx(elbo, abs=1e-6)
    rollout = generate(model, [prompt] * 6, length=L, block_length=L, sampler="roar", mask_id=MASK, temperature=1.0,
                       sequence_ids=torch.arange(6))  # fmt: skip
    assert rollout.steps_B.tolist() == [L] * 6
    trace = trajectory_rows(rollout)
    torch.testing.assert_close(score_samples(model, trace, suppress=(MASK,)).sum(-1), rollout.commit_logp_BL.double().sum(-1))


def test_suppressed_ids_are_never_drawn_and_change_what_the_others_weigh(model):
    for recipe in ("llada", "dream entropy", "sdar static"):
        rollout, _ = both(model, suppress=(0, 5), temperature=1.0, **RECIPES[recipe])
        assert not torch.isin(rollout.completion_BL, torch.tensor([0, 5, MASK])).any()


@pytest.mark.parametrize("recipe", ["llada", "dream maskgit_plus", "fast_dllm", "sdar sequential"])
def test_the_mask_id_is_drawn_only_where_asked_for_and_is_then_decided_though_it_reads_as_undecided(recipe):
    model = eurobert(layers=1, hidden=16)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(V, dtype=torch.float64))
        head.bias[MASK] = 50.0  # the likeliest id by far
    rollout, _ = both(model, temperature=1.0, **RECIPES[recipe])
    assert (rollout.completion_BL != MASK).all()
    drawn = generate(
        model, RAGGED, length=8, mask_id=MASK, temperature=1.0, sequence_ids=IDS, suppress_mask=False, **RECIPES[recipe]
    )
    assert (drawn.completion_BL == MASK).all()
    assert (drawn.commit_step_BL >= 0).all()
    assert not drawn.failed_B.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["llada", "fast_dllm", "sdar dynamic", "entropy_bound"])
def test_a_block_that_decides_eos_is_the_last_and_the_rest_reads_eos(model, layout, recipe):
    seen = set()
    for eos_id in (3, 7):
        rollout, canvases = both(
            model, layout=layout, length=12, eos_id=eos_id, temperature=1.0, deterministic=layout == "left", **RECIPES[recipe]
        )
        seen |= {bool((canvas.step < 0).any()) for canvas in canvases}
        filled_BL = rollout.commit_step_BL < 0
        assert (rollout.completion_BL[filled_BL] == eos_id).all()
        assert (rollout.commit_logp_BL[filled_BL] == 0).all()
    assert seen == {False, True}, "some sequences must end early and some must not"


def test_an_empty_prompt_is_legal(model):
    nothing = [torch.zeros(0, dtype=torch.int64)] * 2
    both(model, prompts=nothing, block_length=4, steps=4, sequence_ids=IDS[:2])
    both(model, prompts=[nothing[0], RAGGED[0]], sampler="sdar", block_length=3, steps=3, sequence_ids=IDS[:2])


def test_greedy_decoding_needs_no_noise(model):
    options = {"length": 8, "mask_id": MASK}
    for recipe in ("llada", "fast_dllm", "sdar dynamic", "entropy_bound", "dream maskgit_plus"):
        a = generate(model, RAGGED, **options, **RECIPES[recipe])
        b = generate(model, RAGGED, sequence_ids=IDS, seed=9, **options, **RECIPES[recipe])
        assert torch.equal(a.ids_BS, b.ids_BS)


def test_the_prompt_stays_and_the_settings_are_told(model):
    prompts = torch.stack([RAGGED[0], RAGGED[0].flip(0)])
    rollout = generate(model, prompts, length=6, steps=3, block_length=2, mask_id=MASK)
    assert torch.equal(rollout.ids_BS[:, :5], prompts)
    assert torch.equal(rollout.completion_BL, rollout.ids_BS[:, 5:])
    assert rollout.settings["steps"] == 3
    assert rollout.settings["temperature"] == 0.0
    assert rollout.settings["remasking"] == "low_confidence"


def test_every_sampler_and_option_is_told_and_compared():
    page = (Path(__file__).resolve().parents[2] / "docs" / "rollouts.md").read_text()
    told = inspect.getdoc(generate)  # of Python 3.13 __doc__ is without its indentation, too
    compared = {recipe.get("sampler", "llada") for recipe in (*RECIPES.values(), *TAKING_BACK.values())} | {"llada2"}
    for sampler in SAMPLERS.values():
        assert f"| `{sampler.name}`" in page
        assert f"    {sampler.name} " in told
        assert sampler.name in compared
        for option in sampler.options:
            assert f"{option}=" in told or option in told, option


def test_default_numbers_are_those_of_the_sources_that_the_table_names():
    numbers = {
        name: {option: value for option, value in sampler.options.items() if type(value) in (int, float)}
        for name, sampler in SAMPLERS.items()
    }
    assert numbers == {
        "llada": {},
        "dream": {"eps": 1e-3, "threshold": 0.9},
        "roar": {},
        "fast_dllm": {"threshold": 0.9},
        "fast_dream": {"eps": 1e-3, "threshold": 0.9},
        "rcr": {},
        "wino": {"threshold": 0.6, "threshold_back": 0.9},
        "remdm": {"eta": 0.02, "eps": 1e-5, "t_on": 0.55, "t_off": 0.05, "alpha_on": 0.9},
        "sdar": {"threshold": 0.85, "bound": 0.1},
        "llada2": {"threshold": 0.95, "max_post_steps": 16},
        "entropy_bound": {"bound": 0.1},
    }
