"""An actor as DARE's (verl) trains it: masks come as tensors; log-probs and gradients without logits.

    python examples/dare_actor.py --samples 8

Shows both ways into `DLLMDataParallelPPOActor`: `forward_micro_batch` in place of the body of `_forward_micro_batch`,
sample by sample, and `plan_of` with `accumulate` in place of the loop. They give the same gradient.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM

from dllm_kernels import accumulate
from dllm_kernels.integrations.verl import forward_micro_batch, plan_of
from dllm_kernels.objectives import BGPO, Batch

VOCABULARY, MASK = 32, 31
PROMPT, RESPONSE = 4, 8


def make_model() -> EuroBertForMaskedLM:
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=MASK,
    )
    return EuroBertForMaskedLM(config).eval()


def make_batch(samples: int, sequences: int = 3) -> dict[str, Tensor]:
    """What DARE's trainer hands to an actor: n of the response's tokens hidden, p_mask = n / length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, MASK, (sequences, PROMPT + RESPONSE), generator=generator)
    order = torch.rand(sequences, samples, RESPONSE, generator=generator).argsort(-1)
    count = torch.randint(1, RESPONSE + 1, (sequences, samples, 1), generator=generator)
    masked = torch.nn.functional.pad(order < count, (PROMPT, 0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "responses": ids[:, PROMPT:],
        "perturbed_seq": torch.where(masked, MASK, ids[:, None]),
        "mask_indices": masked,
        "p_mask": (count / RESPONSE).expand(masked.shape),
    }


def gradient(model: EuroBertForMaskedLM) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    samples = parser.parse_args().samples
    model, batch, advantages = make_model(), make_batch(samples), torch.tensor([1.0, -0.5, 0.3])
    sequences = len(advantages)

    for k in range(samples):  # on-policy: the ratio is 1, its gradient that of the ELBO
        one = {name: value[:, k : k + 1] if value.dim() == 3 else value for name, value in batch.items()}
        _, elbo, _ = forward_micro_batch(model, one, packed=False)
        (-(advantages * elbo[:, 0]).sum() / (sequences * samples)).backward()
    by_loop = gradient(model)

    report = accumulate(model, plan_of(batch, mask_id=MASK), BGPO, Batch({"advantages": advantages}))
    by_engine = gradient(model)
    error = float((by_loop - by_engine).norm() / by_loop.norm())
    print(f"largest difference {error:.1e}; {report.forwards} calls of the model, {report.rows} rows through its head")
