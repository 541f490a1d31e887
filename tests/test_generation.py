"""Rollouts token for token against LLaDA's sampler with full logits, and the law of `sample_tokens`."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import generate, noise, sample_tokens
from dllm_kernels.noise import Stream
from tests import oracle
from tests.tiny import eurobert

MASK, V = 10, 11
F64 = torch.float64


def llada(
    model,
    prompt,
    *,
    length,
    steps,
    block_length,
    temperature=0.0,
    seed=0,
    sequence_ids=None,
    remasking="low_confidence",
    suppress=(),
    suppress_mask=True,
    shift=0,
    attention_mask=None,
):
    """LLaDA's published loop (block-wise remasking), full logits, one position at a time; our noise for its noise."""
    B, P = prompt.shape
    x = torch.cat([prompt, torch.full((B, length), MASK)], 1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones(B, length, dtype=attention_mask.dtype)], 1)
    commit_step, commit_logp = torch.full((B, length), -1), torch.zeros(B, length, dtype=F64)
    commit_entropy = torch.zeros(B, length, dtype=F64)
    blocks = length // block_length
    per_block = steps // blocks
    ids = torch.arange(B) if sequence_ids is None else sequence_ids
    positions = torch.arange(length)
    key = noise.row_bits(seed, Stream.TOKEN, ids[:, None], torch.tensor(0), positions)
    order = noise.row_bits(seed, Stream.REMASK, ids[:, None], torch.tensor(0), positions)
    for block, inner in itertools.product(range(blocks), range(per_block)):
        step = block * per_block + inner
        count = block_length // per_block + (1 if inner < block_length % per_block else 0)
        z = model(x, attention_mask=attention_mask).logits
        z = z[:, P - shift : P - shift + length].clone()
        z[:, :, [*suppress, *([MASK] if suppress_mask else [])]] = -math.inf
        logp = z.log_softmax(-1)
        for b in range(B):
            candidates = []
            for i in range(block * block_length, (block + 1) * block_length):
                if x[b, P + i] != MASK or commit_step[b, i] >= 0:
                    continue
                score = z[b, i] if temperature == 0 else z[b, i] / temperature + noise.gumbel(key[b, i : i + 1], V, step=step)[0]
                token = int(score.argmax())
                rank = float(logp[b, i, token].exp()) if remasking == "low_confidence" else int(order[b, i])
                candidates.append((-rank, i, token))
            for _, i, token in sorted(candidates)[:count]:
                x[b, P + i] = token
                commit_step[b, i] = step
                commit_logp[b, i] = logp[b, i, token]
                row = logp[b, i][logp[b, i] > -math.inf]
                commit_entropy[b, i] = -(row.exp() * row).sum()
    return x, commit_step, commit_logp, commit_entropy


PROMPT = torch.randint(3, 10, (3, 4), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([7, -(2**40), 12])


@pytest.fixture(scope="module")
def model():
    return eurobert()


@torch.no_grad()
def same(model, prompt=PROMPT, **options):
    rollout = generate(model, prompt, mask_id=MASK, **options)
    ids, step, logp, entropy = llada(model, prompt, **options)
    assert torch.equal(rollout.ids_BS, ids)
    assert torch.equal(rollout.commit_step_BL.long(), step)
    torch.testing.assert_close(rollout.commit_logp_BL.double(), logp, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rollout.commit_entropy_BL.double(), entropy, rtol=1e-5, atol=1e-6)
    return rollout


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("length", "block_length", "steps"),
    [(8, 8, 8), (8, 8, 3), (8, 4, 4), (8, 4, 6), (6, 6, 1), (6, 2, 6), (6, 3, 4), (1, 1, 1)],
)
def test_rollouts_equal_llada_s_sampler_token_for_token(backend, model, length, block_length, steps, temperature, remasking):
    same(
        model,
        length=length,
        block_length=block_length,
        steps=steps,
        temperature=temperature,
        remasking=remasking,
        seed=3,
        sequence_ids=IDS,
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_shift_suppressed_ids_and_left_padding_too(model, shift):
    attention = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    rollout = same(
        model,
        length=6,
        block_length=3,
        steps=4,
        temperature=1.0,
        sequence_ids=IDS,
        shift=shift,
        suppress=(0, 5),
        attention_mask=attention,
    )
    assert not torch.isin(rollout.completion_BL, torch.tensor([0, 5, MASK])).any()
    if shift:
        straight = generate(model, PROMPT, mask_id=MASK, length=6, block_length=3, steps=4, temperature=1.0, sequence_ids=IDS)
        assert not torch.equal(straight.ids_BS, rollout.ids_BS)


def test_remainders_go_to_the_earliest_steps(model):
    rollout = generate(model, PROMPT, mask_id=MASK, length=8, block_length=8, steps=3)
    for b in range(3):
        assert torch.bincount(rollout.commit_step_BL[b]).tolist() == [3, 3, 2]
    rollout = generate(model, PROMPT, mask_id=MASK, length=10, block_length=5, steps=6)
    for b in range(3):
        assert torch.bincount(rollout.commit_step_BL[b]).tolist() == [2, 2, 1, 2, 2, 1]
        assert rollout.commit_step_BL[b, :5].max() < rollout.commit_step_BL[b, 5:].min()


def test_the_mask_id_is_never_drawn_unless_asked_for():
    model = eurobert()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(V, dtype=F64))
        head.bias[MASK] = 50.0  # the likeliest id by far
    options = {"length": 6, "steps": 6, "block_length": 6, "mask_id": MASK, "sequence_ids": IDS}
    for temperature in (0.0, 1.0):
        assert (generate(model, PROMPT, temperature=temperature, **options).completion_BL != MASK).all()
    drawn = generate(model, PROMPT, temperature=1.0, suppress_mask=False, **options)
    assert (drawn.completion_BL == MASK).all()
    assert sorted(drawn.commit_step_BL[0].tolist()) == list(range(6))  # decided is decided, though it reads as undecided


def test_a_sequence_s_tokens_do_not_depend_on_its_batch(model):
    options = {"length": 8, "steps": 4, "block_length": 4, "mask_id": MASK, "temperature": 1.0, "seed": 5}
    whole = generate(model, PROMPT, sequence_ids=IDS, **options)
    for micro_batch in (1, 2, 3, 100):
        cut = generate(model, PROMPT, sequence_ids=IDS, micro_batch=micro_batch, **options)
        assert torch.equal(cut.ids_BS, whole.ids_BS)
        assert torch.equal(cut.commit_step_BL, whole.commit_step_BL)
    order = [2, 0, 1]
    permuted = generate(model, PROMPT[order], sequence_ids=IDS[order], **options)
    assert torch.equal(permuted.ids_BS, whole.ids_BS[order])
    alone = generate(model, PROMPT[1:2], sequence_ids=IDS[1:2], **options)
    assert torch.equal(alone.ids_BS[0], whole.ids_BS[1])


def test_members_of_a_group_differ_and_seeds_differ(model):
    prompt = PROMPT[:1].expand(16, 4)
    options = {"length": 8, "steps": 8, "block_length": 8, "mask_id": MASK, "temperature": 1.0}
    ids = noise.sequence_ids(["puzzle"] * 16, members=list(range(16)))
    rollout = generate(model, prompt, sequence_ids=ids, **options)
    assert len(rollout.completion_BL.unique(dim=0)) > 8  # a toy model may well repeat itself
    other = generate(model, prompt, sequence_ids=ids, seed=1, **options)
    assert not torch.equal(other.ids_BS, rollout.ids_BS)
    assert torch.equal(generate(model, prompt, sequence_ids=ids, **options).ids_BS, rollout.ids_BS)


def test_greedy_decoding_needs_no_noise(model):
    options = {"length": 6, "steps": 3, "block_length": 6, "mask_id": MASK}
    a = generate(model, PROMPT, **options)
    b = generate(model, PROMPT, sequence_ids=IDS, seed=9, **options)
    assert torch.equal(a.ids_BS, b.ids_BS)


def test_the_prompt_stays_and_the_settings_are_told(model):
    rollout = generate(model, PROMPT, length=6, steps=3, block_length=2, mask_id=MASK)
    assert torch.equal(rollout.ids_BS[:, :4], PROMPT)
    assert torch.equal(rollout.completion_BL, rollout.ids_BS[:, 4:])
    assert rollout.settings["steps"] == 3
    assert rollout.settings["temperature"] == 0.0
    assert (rollout.commit_logp_BL <= 0).all()
    assert (rollout.commit_entropy_BL >= 0).all()


def test_an_empty_prompt_is_legal(model):
    same(model, torch.zeros(2, 0, dtype=torch.int64), length=4, steps=2, block_length=4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"block_length": 4}, ValueError, ["block_length", "4", "6"]),
        ({"steps": 3, "block_length": 3}, ValueError, ["steps", "3", "2"]),
        ({"steps": 7, "block_length": 6}, ValueError, ["steps", "7", "6"]),
        ({"steps": 0}, ValueError, ["steps", "0"]),
        ({"length": 0}, ValueError, ["length", "0"]),
        ({"temperature": -1.0}, ValueError, ["temperature", "-1"]),
        ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
        ({"temperature": 1.0}, ValueError, ["sequence_ids"]),
        ({"remasking": "random"}, ValueError, ["sequence_ids"]),
        ({"remasking": "entropy"}, ValueError, ["remasking", "entropy", "random"]),
        ({"temperature": 1.0, "sequence_ids": torch.tensor([1, 2])}, ValueError, ["sequence_ids", "2", "3"]),
        ({"temperature": 1.0, "sequence_ids": torch.tensor([1, 2, 2])}, ValueError, ["sequence_ids", "distinct"]),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, ["attention_mask", "5", "4"]),
        ({"micro_batch": 0}, ValueError, ["micro_batch", "0"]),
        ({"seed": -1}, ValueError, ["seed", "-1"]),
        ({"mask_id": 11}, ValueError, ["mask_id", "11", "10"]),
        ({"mask_id": 3}, ValueError, ["prompt_ids", "mask_id=3"]),
        ({"suppress": (11,)}, ValueError, ["suppress", "11"]),
        ({"shift": 5}, ValueError, ["prompt_ids", "shift=5"]),
        ({"prompt_ids": PROMPT[:0]}, ValueError, ["prompt_ids", "empty"]),
        ({"prompt_ids": PROMPT.float()}, TypeError, ["prompt_ids", "float32"]),
        ({"prompt_ids": PROMPT[0]}, ValueError, ["prompt_ids", "4"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(model, changes, error, words):
    prompt = torch.cat([PROMPT[:, :3], torch.full((3, 1), 3)], 1)
    options = {"prompt_ids": prompt, "length": 6, "steps": 2, "block_length": 6, "mask_id": MASK} | changes
    with pytest.raises(error) as caught:
        generate(model, **options)
    for word in words:
        assert word in str(caught.value)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_a_model_in_training_mode_with_dropout_is_refused_since_its_rollout_could_not_be_repeated():
    model = eurobert(attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"model.*dropout"):
        generate(model, PROMPT, length=6, steps=2, block_length=6, mask_id=MASK)


# --- sample_tokens ----------------------------------------------------------------------------------------------------


def draw(logits, rows, **options):
    """`rows` draws from one row of logits."""
    key = noise.row_bits(1, Stream.TOKEN, torch.arange(rows), torch.tensor(0), torch.tensor(0))
    eye = torch.eye(len(logits), dtype=logits.dtype)
    return sample_tokens(logits.expand(rows, -1), eye, key, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_follow_the_softmax_at_the_temperature(backend, temperature):
    rows, logits = 15000, torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -3.0, 0.5])
    drawn = draw(logits, rows, temperature=temperature, suppress=(4,))
    p = (logits / temperature).double()
    p[4] = -math.inf
    expected = rows * p.softmax(-1)
    observed = torch.bincount(drawn.token, minlength=7).double()
    assert observed[4] == 0
    live = expected > 0
    assert oracle.chi_square(observed[live], expected[live]) < oracle.chi_square_limit(5)


def test_draws_of_two_steps_are_independent(backend):
    logits = torch.tensor([0.5, 0.0, -0.5])
    a, b = (draw(logits, 8000, step=step).token for step in (0, 1))
    p = logits.double().softmax(-1)
    observed = torch.bincount(3 * a + b, minlength=9).double()
    assert oracle.chi_square(observed, 8000 * torch.outer(p, p).flatten()) < oracle.chi_square_limit(8)


def test_logp_confidence_and_entropy_are_at_temperature_1(backend):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    logp = logits.double().log_softmax(-1)
    for temperature in (0.0, 0.3, 5.0):
        drawn = draw(logits, 64, temperature=temperature)
        torch.testing.assert_close(drawn.logp.double(), logp[drawn.token], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(drawn.confidence.double(), logp.exp()[drawn.token], rtol=1e-5, atol=1e-6)
        entropy = (-(logp.exp() * logp).sum()).expand(64)
        torch.testing.assert_close(drawn.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert (draw(logits, 500, temperature=0.0).token == 2).all()
    assert len(draw(logits, 500, temperature=5.0).token.unique()) == 4


@pytest.mark.parametrize("vocabulary", [2, 9, 33, 1000])
def test_ties_at_temperature_0_go_to_the_smallest_id(backend, vocabulary):
    logits = torch.zeros(vocabulary)
    assert (draw(logits, 3, temperature=0.0).token == 0).all()
    logits[[vocabulary // 2, vocabulary - 1]] = 1.0
    assert (draw(logits, 3, temperature=0.0).token == vocabulary // 2).all()
    assert (draw(logits, 3, temperature=0.0, suppress=(vocabulary // 2,)).token == vocabulary - 1).all() or vocabulary == 2


@given(
    N=st.integers(0, 6),
    H=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 999),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
)
def test_any_shape_equals_argmax_of_full_logits_plus_noise(backend, N, H, vocabulary, temperature, seed, softcap, bias):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(9, H, generator=g, dtype=F64), torch.randn(vocabulary, H, generator=g, dtype=F64)
    rows = torch.randperm(9, generator=g)[:N]
    key = noise.row_bits(seed, Stream.TOKEN, torch.arange(N), torch.tensor(3), torch.tensor(1))
    options = {"softcap": softcap, "bias": torch.randn(vocabulary, generator=g, dtype=F64) if bias else None}
    valid = max(1, vocabulary - 2)
    got = sample_tokens(hidden, weight, key, rows=rows, step=2, temperature=temperature, valid_vocab=valid, **options)
    z = oracle.logits(hidden, weight, rows, valid_vocab=valid, **options)
    score = z if temperature == 0 else z / temperature + noise.gumbel(key, vocabulary, step=2)
    assert torch.equal(got.token, score.argmax(-1))
    torch.testing.assert_close(got.logp, z.log_softmax(-1).gather(1, got.token[:, None])[:, 0])


def test_a_row_s_token_does_not_depend_on_its_company(backend):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(600, 16, generator=g), torch.randn(50, 16, generator=g)
    key = noise.row_bits(0, Stream.TOKEN, torch.arange(600), torch.tensor(0), torch.tensor(0))
    whole = sample_tokens(hidden, weight, key)
    for count in (1, 255, 257):
        chosen = torch.randperm(600, generator=g)[:count]
        part = sample_tokens(hidden, weight, key[chosen], rows=chosen)
        for name in ("token", "logp", "confidence", "entropy"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[chosen]), name


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"temperature": -0.1}, ValueError, ["temperature", "-0.1"]),
        ({"logit_temperature": 0.0}, ValueError, ["logit_temperature", "0"]),
        ({"step": -1}, ValueError, ["step", "-1"]),
        ({"key": torch.zeros(4)}, TypeError, ["key", "float32"]),
        ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, ["3", "4"]),
        ({"key": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, ["key", "4, 1"]),
        ({"suppress": tuple(range(5))}, ValueError, ["suppress"]),
        ({"hidden": torch.full((4, 3), math.nan)}, ValueError, ["hidden"]),
        ({"weight": torch.zeros(5, 2)}, ValueError, ["hidden", "2", "3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_sampling_error_names_the_argument(changes, error, words):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(5, 3),
        "key": torch.zeros(4, dtype=torch.int64),
    } | changes
    with pytest.raises(error) as caught:
        sample_tokens(**arguments)
    for word in words:
        assert word in str(caught.value)
