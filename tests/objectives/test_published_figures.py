"""What a recipe says of its algorithm is what was published: every figure here has its source beside it.

Sources are a paper's section or table, or a file and line of the official code (commits are in docs/algorithms.md); "port" is
yjyddq/DARE where the authors' own code is closed; "ours" is a choice that nobody published, and says why.
"""

import inspect
from dataclasses import asdict

import pytest

from dllm_kernels import objectives

# law, samples, advantage, old, reference, optimizer steps per rollout, window, tail | options | sources
PUBLISHED = {
    "bgpo": (
        ("exact", {}, 16, "std", True, False, 1, "eos", "removed"),
        {"window": None, "clip_low": None, "clip_high": None, "dual_clip": None, "aggregate": "sequences"},
        "arXiv 2510.11683: n_t = 16, A = (r - mean) / std, no clip and no KL, on-policy; DARE dllm_core_algos.py:593-631 "
        "draws exact counts over the response of the attention mask",
    ),
    "cj_grpo": (
        ("trace", {}, None, "mean", True, True, 12, "completion", None),
        {"epsilon": 0.5, "beta": 0.04},
        "EOSER-ASS-RL's code, of diffu-GRPO's family: mu 12, epsilon 0.5, beta 0.04, every step of the rollout",
    ),
    "coupled_grpo": (
        ("coupled", {"t_low": 0.2, "t_high": 0.8}, 3, "loo", True, True, 2, "eos", "hidden"),
        {"epsilon": 0.5, "beta": 0.01},
        "ml-diffucoder coupled_grpo.py:254-279 (t in 0.2..0.8, three forwards), 545-567 (leave one out); "
        "recipes/config_coupled_code.yaml: mu 2, epsilon 0.5, beta 0.01",
    ),
    "d2": (
        ("segments", {"segments": 8}, None, "mean", True, True, 12, "eos", "hidden"),
        {"epsilon": 0.5, "beta": 0.04, "segments": 8},
        "d2 diffu_grpo_trainer.py:687-750; N = 8 for GSM8K; train.yaml: mu 12, epsilon 0.5, beta 0.04",
    ),
    "diffu_grpo": (
        ("full", {}, 1, "mean", True, True, 12, "eos", "hidden"),
        {"epsilon": 0.5, "beta": 0.04},
        "d1 diffu_grpo_trainer.py:96-121, 241-267, 533-539; slurm_scripts/train.yaml: mu 12, epsilon 0.5, beta 0.04",
    ),
    "dmpo": (
        ("antithetic", {"weight": "dmpo"}, 4, None, True, True, 8, "completion", None),
        {"baseline": "neg", "strength": 1.0, "alpha": 0.04, "kappa": 1.0},
        "DMPO dmpo_trainer.py:131-184, 431-457; dmpo_train_config.yaml: R = 4, mu 8, alpha 0.04, coefficient 1, neg, strength 1",
    ),
    "ebpo": (
        ("exact", {}, 16, "std", True, False, 1, "eos", "removed"),
        {"epsilon_low": 0.2, "epsilon_high": 0.2},
        "arXiv 2602.08676; port dllm_core_algos.py:153-226 and its SDAR recipes: 16 timesteps, clip 0.2 in the log domain",
    ),
    "egspo": (
        ("trace", {}, None, "mean", True, True, 1, "completion", None),
        {"epsilon_low": 0.2, "epsilon_high": 0.5, "beta": 0.04}
        | {"tokens_per_step": 2.0, "selected_steps": 8, "step_selection": "entropy"},
        "egspo egspo_trainer.py:86-146 (clip 0.2 and 0.5, beta 0.04, over L/T), 675-715 (the 8 of highest entropy)",
    ),
    "egspo_sa": (
        ("trace", {}, None, "mean", True, True, 1, "completion", None),
        {"epsilon_low": 0.2, "epsilon_high": 0.5, "beta": 0.04}
        | {"tokens_per_step": 2.0, "selected_steps": 8, "step_selection": "entropy", "stepwise": 0.5},
        "as egspo; egspo_trainer.py:884-969: lambda1 0.5, normalised",
    ),
    "espo": (
        ("antithetic", {"weight": "espo"}, 4, "loo", True, True, 8, "completion", None),
        {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.01},
        "ESPO espo_trainer.py:55-75, 176-201, 694-716; recipes/*.sh: num_mc 2 with complements, mu 8, epsilon 0.2, beta 1e-2 "
        "(Sudoku and code)",
    ),
    "gdpo": (
        ("quadrature", {"nodes": 3}, 3, "mean", True, False, 12, "completion", None),
        {"epsilon": 0.5, "beta": 0.0, "mode": "code"},
        "GDPO likelihood_estimators.py:168-303, gdpo_trainer.py:99-138; train.yaml: mu 12, epsilon 0.5, beta 0; sbatch: gauss-3",
    ),
    "gdsd": (
        ("antithetic", {"weight": "espo"}, 2, "loo", True, True, 8, "completion", None),
        {"psi": 1.0, "epsilon_low": 4e-4, "epsilon_high": 4e-4, "beta": 1e-3},
        "GDSD's code: one pair of complements, mu 8, psi 1 and clip 4e-4 on Sudoku",
    ),
    "justgrpo": (
        ("segments", {}, None, "std", True, False, 1, "completion", None),
        {"epsilon": 0.2},
        "JustGRPO's code: one token a state from left to right, clip 0.2, no KL",
    ),
    "mdpo": (
        ("trace", {}, None, None, True, False, 1, "completion", None),
        {"epsilon": 0.2, "beta": 0.0, "selected_steps": 16},
        "mdpo's code: clip 0.2, no KL, 16 of 128 steps, advantages of each step's draft",
    ),
    "on_policy_distillation": (
        ("trace", {"shrink": 1}, None, None, True, True, 1, "eos", "hidden"),
        {"epsilon": 0.2},
        "ours: on-policy distillation of autoregressive models (arXiv 2306.13649) at the states of a rollout",
    ),
    "rldf": (
        ("trace", {}, None, "std", True, True, 1, "eos", "hidden"),
        {"epsilon": 0.2, "beta": 0.01, "threshold": 0.6, "selected_steps": 4, "temperature": 1.0},
        "RLDF's code: clip 0.2, beta 0.01, threshold 0.6, 4 states, loss_norm 'sample'",
    ),
    "rspo": (
        ("bernoulli", {"weight": "L/count"}, 4, "std", False, True, 1, "completion", None),
        {"lam": 0.01},
        "automatic-eureka src/rl/losses/baselines.py (a third party's port): lambda 0.01, 4 samples, mean over masked tokens; "
        "optimizer steps and window are ours: unknown, and the whole window is the ELBO's",
    ),
    "spg": (
        ("block", {"block_length": 32}, 2, "mean", False, False, 4, "eos", "hidden"),
        {"omega": 0.5, "eubo_beta": 1.5, "negative": "mix"},
        "SPG spg_trainer.py:238-380, 432-559, 717-720; slurm_scripts/spg_mix: mu 4, omega 0.5, eubo_beta 1.5, num_t 2",
    ),
    "trace_rl": (
        ("trace", {"shrink": 8}, None, "population_std", True, False, 1, "eos", "hidden"),
        {"epsilon": 0.2, "beta": 0.01, "mode": "llada", "window": None, "shrink": 8, "length": None},
        "dLLM-RL rl_llada.py:203-292, 573-607, rl_reward.py:74-124; configs/rl_llada.yaml: epsilon 0.2, beta 0.01, shrink 8",
    ),
    "unigrpo": (
        ("bernoulli", {"weight": "L/count"}, 1, "std", True, True, 1, "completion", None),
        {"epsilon": 0.2, "beta": 0.01},
        "arXiv 2505.15809: mean over masked tokens, token clip, KL; the figures are ours, after dLLM-RL's (no code is public)",
    ),
    "vrpo": (
        ("exact", {}, 4, None, False, True, 1, "eos", "removed"),
        {"beta": 0.2, "normalize": True, "window": None},
        "port llada_dp_actor_vrpo.py:94-190: beta 0.2, n = 4, over the response window",
    ),
    "wd1": (
        ("full", {}, 1, "mean", False, False, 8, "eos", "hidden"),
        {},
        "wd1 rev_grpo_trainer.py:144-160: softmax of A and of -A, no ratio, no KL; scripts: mu 8",
    ),
}


def test_every_algorithm_has_its_published_figures_here():
    assert set(PUBLISHED) == set(objectives.RECIPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_what_was_published(name):
    recipe, (form, options, _) = objectives.RECIPES[name], PUBLISHED[name]
    assert form == (
        recipe.law,
        dict(recipe.law_options),
        recipe.samples,
        recipe.advantage,
        recipe.needs_old,
        recipe.needs_reference,
        recipe.inner_iterations,
        recipe.window,
        recipe.tail,
    )
    assert recipe.needs_trajectory == (form[0] in ("trace", "segments"))
    assert recipe.pairs == (name == "vrpo")
    assert asdict(recipe.option_type()) == options


# the paper's default where the port's is the recipe's: test_recipes.PORT_S
OWN_DEFAULTS = {("vrpo", "normalize"): False}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_factory_and_the_pure_function_have_the_published_defaults(name):
    options = PUBLISHED[name][1]
    recipe, loss = objectives.RECIPES[name], getattr(objectives, name.removesuffix("_sa"))
    for callee in (recipe.objective, loss):
        for keyword, parameter in inspect.signature(callee).parameters.items():
            if keyword in options and parameter.default is not parameter.empty:
                assert parameter.default == OWN_DEFAULTS.get((name, keyword), options[keyword]), (callee.__name__, keyword)
