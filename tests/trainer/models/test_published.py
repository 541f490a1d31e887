"""Every published family, from its checkpoint to training and back: load, head, one step, save, reload,
generate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from dllm_trainer.models.loading import Loaded, load
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from dllm_kernels import accumulate, generate, headless, make_mask_plan, noise
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import BGPO
from tests.tiny import gradients, worst_gradient_error
from tests.trainer.models.tiny_checkpoints import MASK, PAD, PUBLISHED, TEXT, VOCABULARY, write

pytestmark = pytest.mark.xdist_group("published")  # one worker: what its fixtures make is made once

PROMPT, LENGTH = 5, 8
IDS = torch.randint(0, TEXT, (2, PROMPT + LENGTH), generator=torch.Generator().manual_seed(3))
IDS[0, :2] = PAD
REAL = IDS != PAD


@dataclass
class Case:
    kind: str
    folder: Path
    built: PreTrainedModel  # with the folder's weights, never loaded
    loaded: Loaded

    def logits(self, ids: Tensor = IDS, real: Tensor = REAL) -> Tensor:
        with torch.no_grad():
            return self.loaded.model(input_ids=ids, **self.loaded.call_kwargs(real)).logits


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "mmada" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 copies what a module of a folder imports, and nothing further: MMaDA's are more")
    folder = tmp_path_factory.mktemp(request.param)
    built = write(request.param, folder)
    return Case(request.param, folder, built, load(folder, dtype=torch.float64, trust_remote_code=True))


def test_a_checkpoint_loads_as_it_was_built(case: Case) -> None:
    """Buffers that are not saved included: transformers leaves those of remote code uninitialised."""
    want, got = dict(case.built.named_parameters()), dict(case.loaded.model.named_parameters())
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    form = vars(case.loaded.model).get("_dllm_attention_form")
    if form is not None:
        case.built._dllm_attention_form = form
    with torch.no_grad():  # not bitwise: vendor products may depend on the alignment of a weight in memory
        built = case.built(input_ids=IDS, **case.loaded.call_kwargs(REAL)).logits
    assert_close(built, case.logits(), rtol=0, atol=1e-12)
    assert not case.loaded.model.training
    assert case.loaded.tokenizer.mask_token_id == case.loaded.facts.mask_id == MASK
    assert case.loaded.facts.family == PUBLISHED[case.kind].family


def test_padding_is_never_seen(case: Case) -> None:
    other = IDS.masked_fill(~REAL, 7)
    assert torch.equal(case.logits(other)[REAL], case.logits()[REAL])


def test_a_sequence_scores_the_same_with_and_without_padding(case: Case) -> None:
    """Blocks count from the first token that is no padding."""
    alone = case.logits(IDS[:1, 2:], REAL[:1, 2:])
    torch.testing.assert_close(case.logits()[:1, 2:], alone, rtol=1e-4, atol=1e-4)  # positions differ, rotations are fp32


def test_what_a_token_sees_is_its_topology(case: Case) -> None:
    facts = case.loaded.facts
    changed = IDS.clone()
    changed[1, -1] = (changed[1, -1] + 1) % TEXT
    differs = (case.logits(changed) != case.logits())[1].any(-1)
    if facts.topology == "bidirectional":
        assert differs.all()
    else:
        assert facts.block_length is not None
        last = (IDS.shape[1] - 1) // facts.block_length * facts.block_length
        assert not differs[:last].any()
        assert differs[last:].all()


def test_hidden_states_times_the_head_are_the_model_s_logits(case: Case) -> None:
    with torch.no_grad(), headless(case.loaded.model) as body:
        hidden = body(IDS, **case.loaded.call_kwargs(REAL))
        got = torch.nn.functional.linear(hidden, body.weight, body.bias)
        assert len(body.weight) == VOCABULARY
        assert (body.bias is not None) == (case.kind == "modernbert")
    torch.testing.assert_close(got, case.logits().double(), rtol=1e-6, atol=1e-5)  # LLaDA2's logits are fp32
    tied = case.loaded.model.get_input_embeddings().weight is body.parameter
    assert tied == (case.kind in ("modernbert", "llada_tied", "dream_tied"))


def test_one_bgpo_step_gives_the_gradient_of_the_model_s_own_logits(case: Case) -> None:
    model, facts = case.loaded.model, case.loaded.facts
    completion = torch.arange(IDS.shape[1]).expand(2, -1) >= PROMPT
    plan = make_mask_plan(
        IDS,
        completion,
        law="exact",
        samples=2,
        seed=1,
        sequence_ids=noise.sequence_ids(["a", "b"]),
        mask_id=facts.mask_id,
        shift=facts.shift,
        attention_mask_BS=REAL,
        causal_block=facts.block_length,
    )
    batch = Batch({"advantages": torch.tensor([1.0, 0.5])})
    suppress = case.loaded.suppressed
    model.zero_grad()
    kwargs = case.loaded.call_kwargs(REAL)
    report = accumulate(model, plan, BGPO, batch, model_kwargs=kwargs, suppress=suppress)
    ours = gradients(model)
    model.zero_grad()

    if facts.block_length is None:
        logits = torch.stack([model(input_ids=ids, **kwargs).logits for ids in plan.noisy_ids]).double()
        index = plan.rows.index
    else:
        layout = plan.layout()
        own = {"attention_mask": layout.sees[:, None], "position_ids": layout.position_RT}
        logits = model(input_ids=layout.ids_RT, **own).logits.double()
        index = layout.index_M[layout.row_N]
    if suppress:
        logits[..., list(suppress)] = -math.inf
    logp = logits.log_softmax(-1).flatten(0, -2)[index].gather(1, plan.rows.target[:, None])[:, 0]
    loss = BGPO.contributions(logp, plan, batch) / 2
    loss.backward()
    tolerance = {"llada2": 1e-4, "sdar": 1e-6}.get(case.kind, 1e-9)  # fp32 logits; fp32 rotations in other batches
    torch.testing.assert_close(report.loss, loss.detach(), rtol=tolerance, atol=0)
    want = gradients(model)
    # experts that no token chose have no gradient either way
    assert worst_gradient_error(ours, want) < tolerance
    assert len(ours) > 5
    model.zero_grad()


def test_a_block_causal_model_refuses_plans_that_feed_it_noisy_history_or_other_blocks(case: Case) -> None:
    facts = case.loaded.facts
    options = {"law": "exact", "samples": 1, "seed": 1, "sequence_ids": noise.sequence_ids(["a", "b"]), "mask_id": facts.mask_id}
    completion = torch.arange(IDS.shape[1]).expand(2, -1) >= PROMPT
    if facts.block_length is None:
        return
    whole = make_mask_plan(IDS, completion, attention_mask_BS=REAL, **options)
    with pytest.raises(ValueError, match=f"plan must have causal_block={facts.block_length} for a block-causal model"):
        score_samples(case.loaded.model, whole, model_kwargs=case.loaded.call_kwargs(REAL))
    other = make_mask_plan(IDS, completion, attention_mask_BS=REAL, causal_block=facts.block_length + 1, **options)
    with pytest.raises(ValueError, match=f"causal_block must be the model's {facts.block_length}, got a plan of"):
        score_samples(case.loaded.model, other, model_kwargs=case.loaded.call_kwargs(REAL))
    padded = make_mask_plan(IDS, completion, causal_block=facts.block_length, **options)
    with pytest.raises(ValueError, match="attention_mask must be that of the plan"):
        score_samples(case.loaded.model, padded, model_kwargs=case.loaded.call_kwargs(REAL))


def test_saving_keeps_names_and_code_and_reloads_to_the_same_logits(case: Case, tmp_path: Path) -> None:
    case.loaded.model.save_pretrained(tmp_path)
    case.loaded.tokenizer.save_pretrained(tmp_path)
    with (
        safe_open(case.folder / "model.safetensors", "pt") as published,
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
    ):
        assert set(saved.keys()) == set(published.keys())
    assert all((tmp_path / name).read_text() == (case.folder / name).read_text() for name in PUBLISHED[case.kind].files)
    again = load(tmp_path, dtype=torch.float64, trust_remote_code=True)
    assert again.facts == case.loaded.facts
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=IDS, **again.call_kwargs(REAL)).logits, case.logits())


def test_completions_are_generated(case: Case) -> None:
    facts = case.loaded.facts
    rollout = generate(
        case.loaded.model,
        IDS[:, :PROMPT],
        length=LENGTH,
        steps=4,
        block_length=4,
        mask_id=facts.mask_id,
        temperature=1.0,
        sequence_ids=noise.sequence_ids(["a", "b"]),
        shift=facts.shift,
        suppress=case.loaded.suppressed,
        **case.loaded.call_kwargs(REAL[:, :PROMPT]),
    )
    assert rollout.completion_BL.shape == (2, LENGTH)
    assert not torch.isin(rollout.completion_BL, torch.tensor([facts.mask_id, *case.loaded.suppressed])).any()
    assert rollout.commit_logp_BL.isfinite().all()
