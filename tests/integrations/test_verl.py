"""What DARE's and verl's actors take, beside the lines that it replaces: full logits, zero buffers, cross-entropy."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dllm_kernels import accumulate
from dllm_kernels.integrations import verl
from dllm_kernels.objectives import BGPO, Batch
from tests.tiny import eurobert, gradients, worst_gradient_error

B, K, P, R, MASK = 3, 4, 3, 5, 10
S = P + R


def micro_batch(seed=0):
    """Left-padded prompts, responses of one length; exact counts, as DARE draws them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 10, (B, S), generator=generator)
    attention = (torch.arange(S) >= torch.tensor([[0], [1], [2]])).long()
    masked, p_mask = torch.zeros(B, K, S, dtype=torch.bool), torch.zeros(B, K, S)
    for b in range(B):
        for k in range(K):
            n = int(torch.randint(1, R + 1, (1,), generator=generator))
            masked[b, k, P + torch.randperm(R, generator=generator)[:n]] = True
            p_mask[b, k] = n / R
    noisy = torch.where(masked, MASK, ids[:, None])
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "responses": ids[:, P:],
        "perturbed_seq": noisy,
        "mask_indices": masked,
        "p_mask": p_mask,
    }


def plain(model, batch, shift=0):
    """The ELBO of each sample over the response's length, `[B, K]`, from all logits."""
    ids, found = batch["input_ids"], torch.zeros(B, K, dtype=torch.float64)
    for k in range(K):
        logits = model(input_ids=batch["perturbed_seq"][:, k], attention_mask=batch["attention_mask"]).logits
        logits = torch.cat([logits[:, :1]] * shift + [logits[:, : S - shift]], dim=1)
        for b in range(B):
            mask = batch["mask_indices"][b, k]
            losses = F.cross_entropy(logits[b][mask], ids[b][mask], reduction="none")
            found[b, k] = -(losses / batch["p_mask"][b, k][mask]).sum()
    return found / R


class TakesLengths(torch.nn.Module):
    """A model as DARE patches them: real tokens in one row, `cu_seqlens` in place of a mask."""

    def __init__(self, model):
        super().__init__()
        self.inside, self.config = model, model.config

    def get_output_embeddings(self):
        return self.inside.get_output_embeddings()

    def get_input_embeddings(self):
        return self.inside.get_input_embeddings()

    def forward(self, input_ids, cu_seqlens, max_seqlen):
        sequence = torch.bucketize(torch.arange(input_ids.shape[1]), cu_seqlens[1:], right=True)
        position = torch.arange(input_ids.shape[1]) - cu_seqlens[sequence]
        assert int(position.max()) + 1 == max_seqlen
        apart = torch.zeros(len(sequence), len(sequence), dtype=torch.float64)
        apart.masked_fill_(sequence[:, None] != sequence, torch.finfo(torch.float64).min)
        return self.inside(input_ids=input_ids, attention_mask=apart[None, None], position_ids=position[None])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_an_actor_s_micro_batch_is_that_of_full_logits(packed, shift):
    model, batch = eurobert(), micro_batch()
    called = TakesLengths(model) if packed else model
    entropy, log_prob, loss = verl.forward_micro_batch(called, batch, calculate_entropy=True, shift=shift, packed=packed)
    assert (log_prob.shape, loss.shape) == ((B, R), (B, K, R))
    found = torch.autograd.grad((loss[:, :, 0] ** 2).sum(), list(model.parameters())[1:])
    want = plain(model, batch, shift)
    # packed positions begin after the padding: the same rotations but for their angles, which are fp32
    assert_close(loss, want[:, :, None].expand(-1, -1, R), rtol=1e-6, atol=1e-6, check_dtype=False)
    assert_close(log_prob[:, 0], want.mean(1) * R, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert_close(entropy, -log_prob.exp() * log_prob)
    other = torch.autograd.grad((want**2).sum(), list(model.parameters())[1:])
    assert_close(found, other, rtol=1e-5, atol=1e-4 if packed else 1e-6)


def test_the_actor_s_loop_over_samples_is_one_call_of_accumulate():
    model, batch = eurobert(), micro_batch()
    advantages = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
    old = plain(model, batch).detach() + 0.05
    for k in range(K):  # DARE's, without clipping: ratio 1 + d or e^d of ELBOs over the length, times the advantage
        one = {n: v[:, k : k + 1] if v.dim() == 3 else v for n, v in batch.items()}
        _, _, loss = verl.forward_micro_batch(model, one, packed=False)
        d = R * (loss[:, 0, 0] - old[:, k])
        (-(advantages * torch.where(advantages > 0, 1 + d, d.exp())).sum() / (B * K)).backward()
    want = gradients(model)
    model.zero_grad()
    plan = verl.plan_of(batch, mask_id=MASK)
    entries = Batch({"advantages": advantages}, {"old_sample_elbo": old * R})
    accumulate(model, plan, BGPO, entries, model_kwargs={"attention_mask": batch["attention_mask"]})
    assert worst_gradient_error(gradients(model), want) < 1e-6


def test_a_patched_forward_gives_log_probs_and_entropies_and_else_is_the_model_s_own():
    model = eurobert()
    ids = torch.randint(3, 10, (2, 6), generator=torch.Generator().manual_seed(1))
    masked = torch.arange(6).expand(2, 6) >= 2
    noisy, labels = ids.masked_fill(masked, MASK), ids.masked_fill(~masked, -100)
    logits = model(input_ids=noisy).logits
    verl.patch_forward(model)
    assert torch.equal(model(input_ids=noisy).logits, logits)
    found = model(input_ids=noisy, labels=labels, temperature=0.5)
    logp = (logits / 0.5).log_softmax(-1)
    assert_close(found.log_probs, logp.gather(-1, ids[..., None])[..., 0] * masked)
    assert_close(found.entropy, -(logp.exp() * logp).sum(-1) * masked)
    gradients = [
        torch.autograd.grad(loss, list(model.parameters())[1:], retain_graph=True)
        for loss in (
            found.log_probs.sum() + found.entropy.sum(),
            (logp.gather(-1, ids[..., None])[..., 0] * masked).sum() - ((logp.exp() * logp).sum(-1) * masked).sum(),
        )
    ]
    assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_the_fused_linear_is_verl_s_own():
    """Its file of PyPI's 0.9.1 alone: `import verl` would want ray."""
    found = importlib.util.find_spec("verl")
    if found is None:
        pytest.skip("verl is not installed; its wheel is enough: pip install --no-deps verl==0.9.1")
    path = Path(found.submodule_search_locations[0]) / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(37, (2, 5), generator=generator)
    results = []
    for cls in (theirs.FusedLinearForPPO, verl.FusedLinearForPPO):
        hidden = torch.randn(2, 5, 8, generator=generator.manual_seed(1)).requires_grad_()
        weight = torch.randn(37, 8, generator=generator).requires_grad_()
        log_probs, entropy = cls()(hidden, weight, target, temperature=0.7)
        (log_probs.sin() + entropy**2).sum().backward()
        results.append((log_probs, entropy, hidden.grad, weight.grad))
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_rewards_of_either_form_are_rewards_of_the_other():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        value = float(solution_str == ground_truth) + (extra_info or {}).get("bonus", 0.0)
        return {"score": value, "acc": 1} if data_source == "as a dictionary" else value

    reward = verl.reward_of(compute_score)
    columns = {"ground_truth": ["2", "3"], "data_source": ["", "as a dictionary"], "extra_info": [None, {"bonus": 0.5}]}
    assert reward(["1+1=", "1+2="], ["2", "4"], **columns) == [1.0, 0.5]
    chat = [[{"role": "assistant", "content": "2"}]]
    assert reward(["1+1="], chat, reward_model=[{"ground_truth": "2"}]) == [1.0]
    again = verl.compute_score_of(reward)
    assert again("", "2", "2") == 1.0
    assert again("", "2", "2", extra_info={"prompt": "1+1="}) == 1.0
    with pytest.raises(ValueError, match=r"^ground_truth must be a column of the data"):
        reward(["a"], ["b"])
    with pytest.raises(ValueError, match=r"^reward must give every completion a number, got None"):
        verl.compute_score_of(lambda prompts, completions, **columns: [None])("", "2", "2")


def test_what_cannot_be_right_is_refused():
    batch = micro_batch()
    padded = batch["mask_indices"].clone()
    padded[2, 0, 0] = True
    with pytest.raises(ValueError, match=r"^mask_indices must be False at padding"):
        verl.forward_micro_batch(eurobert(), batch | {"mask_indices": padded}, packed=False)
    with pytest.raises(ValueError, match=r"^p_mask must be one number above 0"):
        verl.plan_of(batch | {"p_mask": torch.rand(B, K, S)}, mask_id=MASK)
    model = eurobert()
    verl.patch_forward(model, shift=1)
    with pytest.raises(ValueError, match=r"^labels must be -100 at the first 1 position"):
        model(input_ids=batch["input_ids"], labels=batch["input_ids"])
