"""Block diffusion by definition: a block is denoised given the clean blocks before it, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from dllm_kernels import accumulate, estimate_elbo, generate, headless, make_mask_plan
from dllm_kernels.accumulation.objective import NEGATIVE_ELBO, Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.masks import steps
from dllm_kernels.masks.layout import input_tokens
from dllm_kernels.model.layouts import block_diffusion
from dllm_kernels.objectives import BGPO, egspo_objective, egspo_sa_objective, trace_rl_objective
from tests.rollouts.test_layouts import causal
from tests.tiny import gradients, worst_gradient_error

BLOCK = 4
PROMPTS, LENGTHS = [5, 2, 8, 3], [7, 9, 4, 1]  # every prompt length modulo the block, ragged last blocks
LAWS = {
    "bernoulli": (3, {}),
    "exact": (5, {}),
    "exact_zero": (3, {}),
    "antithetic": (4, {}),
    "coupled": (3, {}),
    "quadrature": (4, {"nodes": 2}),
    "full": (1, {}),
    "trace": (None, {}),
    "segments": (None, {"segments": 3}),
}


@pytest.fixture(scope="module")
def model():
    return causal("Qwen3")


def sequences(vocabulary, *, left=False, seed=0):
    """(ids, completion, real, step map) of ragged prompts and completions."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(PROMPTS), max(p + n for p, n in zip(PROMPTS, LENGTHS, strict=True))
    ids = torch.randint(3, vocabulary - 1, (B, S), generator=generator)
    completion, real = torch.zeros(B, S, dtype=torch.bool), torch.zeros(B, S, dtype=torch.bool)
    step_map = torch.full((B, S), -1)
    for b, (p, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        first = S - p - n if left else 0
        real[b, first : first + p + n] = True
        completion[b, first + p : first + p + n] = True
        # two tokens of a block in a step, blocks one after the other
        place = torch.arange(p, p + n)
        shuffled = place // BLOCK * BLOCK + (place * 3 + 1) % BLOCK
        step_map[b, first + p : first + p + n] = shuffled // 2
    return ids, completion, real, step_map


def plan_of(model, law, *, left=False, **options):
    vocabulary = int(model.config.vocab_size)
    ids, completion, real, step_map = sequences(vocabulary, left=left)
    samples, of_law = LAWS[law]
    if law in ("trace", "segments"):
        of_law = {"step_map_BS": step_map, **of_law}
    options = {"causal_block": BLOCK, "attention_mask_BS": real, "seed": 1, **of_law, **options}
    keys = torch.arange(len(ids)) + 7
    return make_mask_plan(ids, completion, law=law, samples=samples, sequence_ids=keys, mask_id=vocabulary - 1, **options)


def by_definition(model, plan):
    """Log-probs `[B, K, S]`: the model on the clean blocks before a block and its own noisy tokens alone.

    With shift a block's first token is read from the row before it, which ends the clean blocks.
    """
    K, B, S = plan.shape
    rows = []
    for k in range(K):
        for b in range(B):
            block_S = plan.block_BS[b]
            for j in range(int(block_S.max()) + 1):
                before, own = ((block_S >= 0) & (block_S < j)).nonzero()[:, 0], (block_S == j).nonzero()[:, 0]
                if not plan.scored[k, b, own].any():
                    continue
                seen = torch.cat([before, own])
                ids = torch.cat([plan.input_ids_BS[b, before], plan.noisy_ids[k, b, own]])
                sees = block_S[seen][None, :] <= block_S[seen][:, None]
                additive = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
                logp = model(input_ids=ids[None], attention_mask=additive[None, None]).logits[0].log_softmax(-1)
                for i in own[plan.scored[k, b, own]].tolist():
                    row = int((seen == i).nonzero()) - plan.shift
                    rows.append(((k * B + b) * S + i, logp[row, plan.input_ids_BS[b, i]]))
    index, values = torch.tensor([i for i, _ in rows]), torch.stack([value for _, value in rows])
    return values.new_zeros(K * B * S).index_copy(0, index, values).view(K, B, S)


@pytest.mark.parametrize("origin", ["sequence", "completion"])
@pytest.mark.parametrize("law", LAWS)
def test_every_row_is_scored_given_clean_blocks_before_it_and_its_own_noisy_block(model, law, origin):
    """Ragged prompts, ragged first and last blocks, padding on both sides, any number of samples a pass, with
    and without shift.
    """
    for left, shift in ((False, 0), (True, 1)):
        plan = plan_of(model, law, left=left, shift=shift, block_origin=origin)
        with torch.no_grad():
            want = by_definition(model, plan).transpose(0, 1)
        for samples_per_pass in (1, 3):
            got = score_samples(model, plan, samples_per_pass=samples_per_pass, per_token=True)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tail", ["shown", "hidden", "removed"])
def test_short_prompts_early_ends_and_what_hides_nothing_are_scored_by_definition(model, tail):
    """No prompt, one shorter than a block, EOS in the block that the prompt begins, no mask at all, more copies than samples."""
    generator = torch.Generator().manual_seed(3)
    prompts, lengths, eos = [0, 1, 2, 5, 3], [3, 2, 1, 6, 9], 2
    B, S = len(prompts), 12
    ids = torch.randint(3, int(model.config.vocab_size) - 1, (B, S), generator=generator)
    place, first, count = torch.arange(S), torch.tensor(prompts)[:, None], torch.tensor(lengths)[:, None]
    completion, real = (place >= first) & (place < first + count), place < first + count
    for b in (1, 3, 4):
        ids[b, prompts[b] + b % 2] = eos
    options = {"seed": 0, "sequence_ids": torch.arange(B), "mask_id": int(model.config.vocab_size) - 1, "causal_block": BLOCK}
    options |= {"eos_id": eos, "tail": tail, "attention_mask_BS": real}
    for law in ("exact_zero", "bernoulli"):  # the first may hide nothing of a sequence
        plan = make_mask_plan(ids, completion, law=law, samples=3, **options)
        with torch.no_grad():
            want = by_definition(model, plan).transpose(0, 1)
        got = score_samples(model, plan, samples_per_pass=8, per_token=True)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        accumulate(model, plan, NEGATIVE_ELBO, Batch(), samples_per_pass=2)
        assert all(bool(g.isfinite().all()) for g in gradients(model).values())
        model.zero_grad()
    given = {name: value for name, value in options.items() if name not in ("tail", "eos_id")}
    nothing = torch.zeros(2, B, S, dtype=torch.bool)
    plan = make_mask_plan(ids, completion, law="given", samples=None, masked_KBS=nothing, **given)
    assert not score_samples(model, plan, samples_per_pass=2).any()


def test_the_old_form_conditions_on_noisy_history(model):
    """A noisy sequence under a block-causal mask, as it was scored before: off by much more than rounding."""
    plan = plan_of(model, "exact")
    with torch.no_grad():
        want = by_definition(model, plan)
        got = torch.zeros_like(want)
        for k in range(plan.shape[0]):
            sees = (plan.block_BS[:, None, :] <= plan.block_BS[:, :, None]) & (plan.block_BS[:, None, :] >= 0)
            sees = sees | torch.eye(plan.shape[2], dtype=torch.bool)
            additive = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
            logp = model(input_ids=plan.noisy_ids[k], attention_mask=additive[:, None]).logits.log_softmax(-1)
            got[k] = logp.gather(-1, plan.input_ids_BS[..., None])[..., 0]
    later = plan.scored & (plan.block_BS > plan.block_BS.masked_fill(~plan.completion_mask_BS, 99).amin(-1, keepdim=True))
    first = plan.scored & ~later
    torch.testing.assert_close(got[first], want[first], rtol=0, atol=1e-10)
    assert float((got - want)[later].abs().mean()) > 0.1


def test_the_input_is_one_clean_copy_and_a_noisy_one_for_every_sample_with_a_row(model):
    plan = plan_of(model, "exact")
    K, B, S = plan.shape
    ordinals = [(p - p % BLOCK, p + n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    copy = max(last - first for first, last in ordinals)
    for k in (1, 2, 5):
        layout = plan.layout(k)
        assert layout.ids_RT.shape == (B * -(-K // k), S + k * copy)
        assert layout.copies == k
        assert layout.copy == copy
        assert input_tokens(plan.shape, plan.completion_mask_BS, plan.block_BS, k) == B * (-(-K // k) * S + K * copy)
        if K % k == 0:  # else the last input has places without a copy
            assert layout.ids_RT.numel() == input_tokens(plan.shape, plan.completion_mask_BS, plan.block_BS, k)
        assert torch.equal(layout.ids_RT[:, :S], plan.input_ids_BS[layout.sequence_R])
        predicted = layout.ids_RT.flatten()[layout.index_M[layout.row_N]]
        assert (predicted == plan.mask_id).all()
    keep = plan.rows.sample == 2
    kept = plan.layout(keep_N=keep)
    assert kept.ids_RT.shape == (B, S + copy)
    assert torch.equal(kept.target_M[kept.row_N], plan.rows.target[keep])
    assert kept.extended(torch.arange(B)).tolist() == list(range(B))
    with pytest.raises(ValueError, match="make the plan with causal_block"):
        make_mask_plan(
            plan.input_ids_BS, plan.completion_mask_BS, law="full", samples=1, seed=0, sequence_ids=torch.arange(B), mask_id=99
        ).layout()


def test_a_noisy_copy_sees_strictly_earlier_clean_blocks_and_its_own_block(model):
    layout = plan_of(model, "exact").layout(2)
    R, T = layout.ids_RT.shape
    sees, block, S, C = layout.sees, layout.block_RT, layout.clean, layout.copy
    for r in range(R):
        for q in range(0, T, 3):
            for k in range(T):
                copy_q, copy_k = (-1 if t < S else (t - S) // C for t in (q, k))
                if q == k:
                    want = True
                elif block[r, q] < 0 or block[r, k] < 0:
                    want = False
                elif copy_k == -1:
                    want = bool(block[r, k] < block[r, q]) or (copy_q == -1 and bool(block[r, k] == block[r, q]))
                else:
                    want = copy_q == copy_k and bool(block[r, q] == block[r, k])
                assert bool(sees[r, q, k]) == want, (r, q, k)


def full_graph(model, plan, loss):
    model.zero_grad()
    dense_KBS = by_definition(model, plan)
    value = loss(dense_KBS[plan.scored])
    value.backward()
    return value.detach(), gradients(model)


@pytest.mark.parametrize("samples_per_pass", [1, 2, 8])
@pytest.mark.parametrize("shift", [0, 1])
def test_accumulate_adds_the_gradient_of_the_definition(model, samples_per_pass, shift):
    """Keys and values of the clean copy belong to the policy: they carry a gradient."""
    cases = {
        "elbo": (NEGATIVE_ELBO, "bernoulli", {}, "sequences"),
        "bgpo": (BGPO, "exact", {"advantages": torch.tensor([1.0, -0.5, 0.25, 2.0])}, "sequences"),
        "trace_rl": (trace_rl_objective(), "trace", {"advantages": torch.tensor([1.0, -0.5, 0.0, 2.0])}, "steps"),
    }
    for objective, law, entries, _ in cases.values():
        plan = plan_of(model, law, shift=shift)
        batch = Batch(entries)
        _, want = full_graph(model, plan, lambda logp, o=objective, p=plan, b=batch: o.contributions(logp, p, b) / 3)
        model.zero_grad()
        accumulate(model, plan, objective, batch, denominator=3.0, samples_per_pass=samples_per_pass)
        assert worst_gradient_error(gradients(model), want) < 1e-6  # Qwen3 normalises in fp32
    model.zero_grad()


def test_a_step_is_what_a_state_of_a_block_decides(model):
    """TraceRL's mean over the tokens of a step, EGSPO's joint ratio of them: groups are (sequence, state)."""
    plan = plan_of(model, "trace")
    rows = plan.rows
    groups = {}
    for n, key in enumerate(zip(rows.sequence.tolist(), rows.state.tolist(), strict=True)):
        groups.setdefault(key, []).append(n)
    assert plan.shape[0] < int(rows.state.max())  # as many samples as a block has steps, not as many as the rollout
    logp = -torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    batch = Batch({"advantages": advantages})
    got = trace_rl_objective(beta=0.0).contributions(logp, plan, batch)
    assert float(got) == pytest.approx(-sum(float(advantages[b]) for b, _ in groups))
    objective = egspo_objective(beta=0.0, epsilon_low=0.9, epsilon_high=9.0, tokens_per_step=1.0)
    old_BKJ = torch.zeros(len(PROMPTS), plan.shape[0], len(plan.units.lengths_U) // len(PROMPTS), dtype=torch.float64)
    moved = Batch({"advantages": advantages}, {"old_sample_elbo": old_BKJ})
    objective.check(moved, plan)
    want = sum(
        -min(float(advantages[b]) * r, float(advantages[b]) * min(max(r, 0.1), 10.0))
        for (b, _), members in groups.items()
        for r in [float(logp[members].sum().exp())]
    )
    assert float(objective.contributions(logp, plan, moved)) == pytest.approx(want)


def test_merged_steps_are_of_one_block_and_told_by_their_last(model):
    plan, (_, _, _, step_map_BS) = plan_of(model, "trace", shrink=2), sequences(int(model.config.vocab_size))
    K, B, S = plan.shape
    rank_BS = torch.full((B, S), -1)
    for b, block in {(b, j) for b, blocks in enumerate(plan.block_BS.tolist()) for j in blocks}:
        own_S = (plan.block_BS[b] == block) & plan.completion_mask_BS[b]
        for rank, step in enumerate(step_map_BS[b, own_S].unique()):
            rank_BS[b, own_S & (step_map_BS[b] == step)] = rank // 2
    assert int(rank_BS.max()) + 1 == K
    for k in range(K):
        assert torch.equal(plan.scored[k], rank_BS == k)
        assert torch.equal(plan.masked[k], rank_BS >= k) if k else torch.equal(plan.masked[0], plan.completion_mask_BS)
    rows = plan.rows
    for n, (b, k, state) in enumerate(zip(rows.sequence.tolist(), rows.sample.tolist(), rows.state.tolist(), strict=True)):
        block = plan.block_BS[b, rows.index[n] % S]
        merged_S = (plan.block_BS[b] == block) & (rank_BS[b] == k)
        assert state == int(step_map_BS[b, merged_S].max())


def test_the_bound_of_a_sequence_does_not_depend_on_its_batch_its_padding_or_the_pass(model):
    vocabulary = int(model.config.vocab_size)
    ids, completion, real, _ = sequences(vocabulary)
    options = {"law": "exact", "samples": 4, "mask_id": vocabulary - 1, "causal_block": BLOCK}
    keys = torch.arange(4) + 3
    whole = estimate_elbo(model, ids, completion, sequence_ids=keys, samples_per_pass=4, attention_mask_BS=real, **options).elbo_B
    for b in range(4):
        n = int(real[b].sum())
        alone = estimate_elbo(model, ids[b : b + 1, :n], completion[b : b + 1, :n], sequence_ids=keys[b : b + 1], **options)
        torch.testing.assert_close(alone.elbo_B[0], whole[b], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"law": "block"}, "law must be another than 'block' with causal_block=4"),
        ({"prompt_noise": 0.15}, "prompt_noise must be 0 with causal_block=4, whose prompts are clean, got 0.15"),
        ({"causal_block": 0}, "causal_block must be at least 1, got 0"),
        ({"block_origin": "prompt"}, "block_origin must be one of 'sequence', 'completion', got 'prompt'"),
        ({"edge": "noisy"}, "edge must be 'clean' with shift=0"),
        ({"causal_block": None, "block_origin": "completion"}, "causal_block must be given with block_origin='completion'"),
    ],
)
def test_bad_input_is_told_in_a_sentence(changes, sentence):
    ids = torch.arange(12)[None]
    options = {"law": "full", "samples": 1, "seed": 0, "sequence_ids": torch.tensor([1]), "mask_id": 99, "causal_block": 4}
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")) as caught:
        make_mask_plan(ids, ids > 5, **{**options, **changes})
    assert "\n" not in str(caught.value)


def test_a_step_map_that_is_no_order_of_its_blocks_is_told_in_a_sentence(model):
    """As of a sampler that knows no blocks, or one that counts anew in each."""
    plan = plan_of(model, "trace")
    batch = Batch({"advantages": torch.ones(len(PROMPTS))})
    trace_rl_objective().check(batch, plan)
    step_map = torch.where(plan.completion_mask_BS, torch.arange(plan.shape[2]) % BLOCK, -1)
    wrong = plan_of(model, "trace", step_map_BS=step_map)
    for objective in (trace_rl_objective(), egspo_objective(tokens_per_step=1.0)):
        with pytest.raises(ValueError, match=r"^step_map_BS must decide tokens of one block in a step, where an objective"):
            accumulate(model, wrong, objective, batch)
        backwards = plan_of(
            model, "trace", step_map_BS=torch.where(plan.completion_mask_BS, 99 - torch.arange(plan.shape[2]), -1)
        )
        with pytest.raises(ValueError, match=r"^step_map_BS must decide a block before it begins the next, where an objective"):
            accumulate(model, backwards, objective, batch)
    with pytest.raises(ValueError, match=r"^step_map_BS must be at least 0 where completion_mask_BS is True, got -1"):
        plan_of(model, "trace", step_map_BS=torch.full_like(step_map, -1))


def test_a_model_whose_configuration_states_another_block_length_refuses_the_plan(model):
    """SDAR's and Fast-dLLM v2's do, with no attribute of ours; a plan without blocks is the old form."""
    other = {"sdar": {"block_size": 8}, "fast_dllm_qwen": {"bd_size": 8}}
    for kind, config in other.items():
        stated = copy.deepcopy(model)
        stated.config.model_type = kind
        for name, value in config.items():
            setattr(stated.config, name, value)
        plan = plan_of(model, "exact")
        for score in (score_samples, lambda model, plan: accumulate(model, plan, NEGATIVE_ELBO, Batch())):
            with pytest.raises(ValueError, match=r"^causal_block must be the model's 8, got a plan of 4$"):
                score(stated, plan)
        whole = plan_of(model, "exact", causal_block=None)
        with pytest.raises(ValueError, match=r"^plan must have causal_block=8 for a block-causal model, which has never seen"):
            score_samples(stated, whole)
        with (
            headless(stated) as body,
            pytest.raises(ValueError, match=r"^causal_block must be the model's 8, got a layout of 4$"),
        ):
            block_diffusion(body, plan.layout(), {})
        with pytest.raises(ValueError, match=r"^block_length must be the model's 8 for sampler='sdar', got 4$"):
            generate(stated, torch.tensor([[3, 4]]), length=4, mask_id=9, sampler="sdar", steps=4, block_length=4)
        score_samples(stated, plan_of(model, "exact", causal_block=8))


def test_a_model_that_takes_no_mask_of_pairs_is_told_in_a_sentence(model):
    plan = plan_of(model, "exact")
    unseeing = copy.deepcopy(model)
    unseeing.forward = lambda input_ids, position_ids=None: None
    flash = copy.deepcopy(model)
    flash.config._attn_implementation = "flash_attention_2"
    for wrong, sentence in (
        (unseeing, r"^model must take attention_mask, which says what each copy sees, but Qwen3ForCausalLM does not$"),
        (flash, r"^model must attend by sdpa, eager or flex_attention, .* by flash_attention_2, which takes none$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            score_samples(wrong, plan)


def test_weights_of_a_sample_are_those_of_its_blocks(model):
    plan = plan_of(model, "exact")
    for name in ("weight_KB", "p_mask_KB"):
        with pytest.raises(ValueError, match=f"{name} must not be read of a plan with causal_block"):
            getattr(plan, name)
    K, B, _ = plan.shape
    weight_KBS = plan.dense(plan.rows.weight)
    for k in range(K):
        for b in range(B):
            for j in range(int(plan.block_BS[b].max()) + 1):
                inside = (plan.block_BS[b] == j) & plan.completion_mask_BS[b]
                hidden = inside & plan.masked[k, b]
                if hidden.any():
                    want = float(inside.sum()) / float(hidden.sum())
                    torch.testing.assert_close(weight_KBS[k, b][hidden], torch.full((int(hidden.sum()),), want))
                    share = torch.full((int(hidden.sum()),), 1 / want)
                    torch.testing.assert_close(plan.p_mask_KBS[k, b][hidden], share)


def test_the_loss_of_fine_tuning_is_over_each_length_also_where_it_is_one(model):
    plan = plan_of(model, "exact")
    assert 1 in LENGTHS
    logp_N = -torch.rand(len(plan.rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = -sum(float(score) / n for score, n in zip(plan.score(logp_N), LENGTHS, strict=True))
    assert float(NEGATIVE_ELBO.contributions(logp_N, plan, Batch())) == pytest.approx(want, rel=1e-12)


def test_entries_of_steps_are_of_every_block_and_others_of_a_sample(model):
    plan = plan_of(model, "trace")
    for cut in (plan, plan.cut(sequences=slice(0, 1))):
        K, B, S = cut.shape
        assert steps.shape(cut) == [B, K, -(-S // BLOCK) + 1]
        BGPO.check(Batch({"advantages": torch.ones(B)}, {"old_sample_elbo": torch.zeros(B, K)}), cut)
        with pytest.raises(ValueError, match="step_advantages must have 3 dimension"):
            egspo_sa_objective(beta=0.0, tokens_per_step=1).check(Batch({}, {"step_advantages": torch.ones(B, K)}), cut)
