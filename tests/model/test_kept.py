"""Keys and values that stay as a block's first step made them, beside whole calls whose attention is told to forget the rest."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dllm_kernels import generate, score_samples, trajectory_logp, trajectory_rows
from tests.tiny import eurobert

MASK, SDPA = 10, functional.scaled_dot_product_attention
PROMPTS = [torch.tensor(ids) for ids in ([3, 9, 4, 7, 8], [5, 6], [8, 3, 3, 6])]
OPTIONS = {"length": 8, "block_length": 4, "mask_id": MASK}
SAMPLERS = {"llada": {"sampler": "llada", "steps": 8}, "fast_dllm": {"sampler": "fast_dllm", "threshold": 0.35}}


def eager():
    return eurobert(hidden=16, attn_implementation="eager")


def grouped():
    """Fewer heads of keys than of queries, as in Qwen2 and Llama 3."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    sizes = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = EuroBertConfig(**sizes, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3)
    return _seeded(EuroBertForMaskedLM, config)


def modernbert():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    local = {"local_attention": 6, "global_attn_every_n_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return _seeded(ModernBertForMaskedLM, ModernBertConfig(**sizes, **local, **ids, attn_implementation="sdpa"))


def loaded(kind):
    """A model of a published structure, as the trainer loads it, which knows what mask of padding it takes."""
    from dllm_trainer.models.loading import load

    from tests.trainer.models import tiny_checkpoints

    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoints.write(kind, Path(folder) / kind)
        return load(Path(folder) / kind, trust_remote_code=True).model.double().eval()


def _seeded(cls, config):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = cls(config).double().eval()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.3)
    return model


def with_an_option():
    """LLaDA, with a third argument of the module that turns queries and keys, as a model's own code may have it."""
    model = loaded("llada")
    for module in model.modules():
        if type(module).__name__ == "RotaryEmbedding":
            turn = type(module).forward
            own = {"forward": lambda self, q, k, backwards=False, turn=turn: turn(self, q, k)}
            module.__class__ = type("RotaryEmbedding", (type(module),), own)
    return model


FAMILIES = {
    "eurobert": lambda: eurobert(hidden=16),
    "grouped": grouped,
    "modernbert": modernbert,
    "llada": lambda: loaded("llada"),
    "dream": lambda: loaded("dream"),
}


class Frozen:
    """`scaled_dot_product_attention` of whole calls, with the keys and values of some columns as a fresh call made them."""

    def __init__(self):
        self.stored, self.stale_S, self.layer = [], None, 0

    def __call__(self, query, key, value, attn_mask=None, **options):
        if self.stale_S is None:
            self.stored.append((key, value))
        else:
            old_key, old_value = self.stored[self.layer]
            stale = self.stale_S[:, None]
            key, value = torch.where(stale, old_key, key), torch.where(stale, old_value, value)
            self.layer += 1
        return SDPA(query, key, value, attn_mask, **options)


def plain(model, prompt, monkeypatch, *, kind, refresh, shift, sampler, steps=None, threshold=None):
    """LLaDA's and Fast-dLLM's greedy loops, one prompt, from the logits of whole calls: (completion, steps, log-probs, stale)."""
    P, (L, b) = len(prompt), (8, 4)
    ids = torch.cat([prompt, torch.full((L,), MASK)])
    step_S, logp_S, stale, column_S = torch.full((P + L,), -1), torch.zeros(P + L).double(), [], torch.arange(P + L)
    for first in range(P, P + L, b):
        age, here_S = 0, (column_S >= first) & (column_S < first + b)
        while bool((ids[here_S] == MASK).any()):
            if age == 0 or (refresh and age % refresh == 0):
                frozen = Frozen()
                stale_S = torch.zeros(P + L, dtype=torch.bool)
            else:
                stale_S = column_S < first - shift
                if kind == "dual":
                    stale_S |= column_S >= first + b
                frozen.stale_S, frozen.layer = stale_S, 0
            monkeypatch.setattr(functional, "scaled_dot_product_attention", frozen)
            with torch.no_grad():
                z_SV = model(input_ids=ids[None]).logits[0].double().roll(shift, 0)
            monkeypatch.setattr(functional, "scaled_dot_product_attention", SDPA)
            z_SV[:, MASK] = -torch.inf
            best_S, token_S = z_SV.log_softmax(-1).max(-1)
            open_S = here_S & (ids == MASK)
            order = best_S.masked_fill(~open_S, -torch.inf).argsort(descending=True, stable=True)
            count = b * L // b // steps if threshold is None else max(1, int((best_S.exp() >= threshold)[open_S].sum()))
            chosen = order[:count]
            ids[chosen], logp_S[chosen], step_S[chosen] = token_S[chosen], best_S[chosen], len(stale)
            stale.append(stale_S)
            age += 1
    return ids, step_S[P:], logp_S[P:], stale


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_is_that_of_whole_calls_with_frozen_keys_and_values(family, kind, monkeypatch):
    model, differs = FAMILIES[family](), False
    for name, refresh, shift in (("llada", None, 0), ("llada", 2, 1), ("fast_dllm", None, 1), ("fast_dllm", 3, 0)):
        options = SAMPLERS[name]
        rollout = generate(model, PROMPTS, cache=kind, refresh=refresh, shift=shift, **OPTIONS, **options)
        exact = generate(model, PROMPTS, shift=shift, **OPTIONS, **options)
        differs |= not torch.equal(rollout.commit_logp_BL, exact.commit_logp_BL)
        for b, prompt in enumerate(PROMPTS):
            ids, step_L, logp_L, stale = plain(model, prompt, monkeypatch, kind=kind, refresh=refresh, shift=shift, **options)
            assert torch.equal(rollout.ids_BS[b][: len(ids)], ids)
            assert torch.equal(rollout.commit_step_BL[b].long(), step_L)
            torch.testing.assert_close(rollout.commit_logp_BL[b].double(), logp_L, rtol=1e-5, atol=1e-6)
            assert rollout.steps_B[b] == len(stale)
            for step, stale_S in enumerate(stale):
                assert torch.equal(rollout.stale_at(step)[b][: len(ids)], stale_S)
    assert differs, "nothing was kept"


@pytest.mark.parametrize("options", [{"guidance": 0.5}, {"deterministic": True, "micro_batch": 2}, {"eos_id": 3}])
def test_guidance_and_batches_go_with_it(options):
    """A sequence alone has the tokens that it has in company, where sequences leave a block one after the other."""
    model, ids = eurobert(hidden=16), torch.arange(3)
    common = {**OPTIONS, **SAMPLERS["fast_dllm"], "temperature": 0.7, "cache": "dual"}
    whole = generate(model, PROMPTS, sequence_ids=ids, **common, **options)
    for b in range(3):
        alone = generate(model, PROMPTS[b : b + 1], sequence_ids=ids[b : b + 1], **common, **options)
        assert torch.equal(alone.completion_BL[0], whole.completion_BL[b])
        torch.testing.assert_close(alone.commit_logp_BL[0], whole.commit_logp_BL[b])


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_refresh_at_every_step_is_exact_to_the_bit(kind):
    model = eurobert(hidden=16, dtype=torch.float32)
    common = {**OPTIONS, **SAMPLERS["llada"], "temperature": 0.7, "sequence_ids": torch.arange(3)}
    rollout, exact = generate(model, PROMPTS, cache=kind, refresh=1, **common), generate(model, PROMPTS, **common)
    for name in ("ids_BS", "commit_step_BL", "commit_logp_BL", "commit_entropy_BL"):
        assert torch.equal(getattr(rollout, name), getattr(exact, name))
    assert not rollout.approximate


def test_a_step_is_one_call_on_the_window():
    model, shapes = eurobert(hidden=16), []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    generate(model, PROMPTS, cache="dual", **OPTIONS, **SAMPLERS["llada"])
    assert shapes[:4] == [(1, 8), (1, 3), (1, 2), (1, 2)], "the first looks whether the model can be called so"
    shapes.clear()
    generate(model, PROMPTS, cache="dual", **OPTIONS, **SAMPLERS["llada"])
    assert shapes == [(3, 13), (3, 4), (3, 4), (3, 4)] * 2
    shapes.clear()
    generate(model, PROMPTS, cache="prefix", refresh=2, **OPTIONS, **SAMPLERS["llada"])
    assert shapes == [(3, 13), (3, 8)] * 2 + [(3, 13), (3, 4)] * 2


def test_old_scores_are_refused_and_the_gap_can_be_seen():
    model = eurobert(hidden=16)
    rollout = generate(model, PROMPTS, cache="dual", **OPTIONS, **SAMPLERS["llada"])
    plan = trajectory_rows(rollout)
    with pytest.raises(ValueError, match="rollout must be exact, got one of cache='dual'"):
        trajectory_logp(rollout, plan)
    scored = score_samples(model, plan, suppress=(MASK,), model_kwargs={"attention_mask": rollout.attention_mask_BS.long()})
    gap_BK = (trajectory_logp(rollout, plan, approximate=True) - scored).abs()
    assert float(gap_BK[:, [0, 4]].max()) < 1e-5, "the first step of a block is exact"
    assert float(gap_BK[:, [1, 2, 3, 5, 6, 7]].max()) > 1e-3


def test_a_rotary_module_may_take_more_than_queries_and_keys():
    plain, other = (
        generate(model, PROMPTS, cache="dual", **OPTIONS, **SAMPLERS["llada"]) for model in (loaded("llada"), with_an_option())
    )
    assert torch.equal(plain.ids_BS, other.ids_BS)
    assert torch.equal(plain.commit_logp_BL, other.commit_logp_BL)


class Deaf(torch.nn.Module):
    """A model that takes positions and does not heed them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.get_output_embeddings = model.get_output_embeddings
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (eager, r"EuroBertForMaskedLM.*attn_implementation='eager'.* is not scaled_dot_product_attention"),
        (lambda: Deaf(eurobert(hidden=16)), "Deaf: .*ignores the position_ids"),
    ],
)
def test_a_model_that_cannot_be_called_on_a_window_is_refused_by_name(make, reason):
    with pytest.raises(ValueError, match="cache must be False for " + reason):
        generate(make(), PROMPTS, cache="dual", **OPTIONS, **SAMPLERS["llada"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "both"}, "cache must be one of"),
        ({"cache": True, "refresh": 2}, "refresh must be None with cache=True"),
        ({"refresh": 2}, "refresh must be None with cache=False"),
        ({"cache": "dual", "refresh": 0}, "refresh must be"),
        ({"cache": "dual", "greedy": True}, "cache='dual' takes a sampler whose blocks"),
        ({"cache": "dual", "packed": True}, "packed must be False with"),
        (
            {"cache": "dual", "sampler": "dream", "block_length": None, "alg": "entropy"},
            "cache='dual' takes a sampler whose blocks",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(eurobert(hidden=16), PROMPTS, **{**OPTIONS, **SAMPLERS["llada"], **options})
