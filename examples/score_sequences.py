"""Log-likelihood bounds of given texts, with standard errors: evaluation, reranking, filtering of data.

    python examples/score_sequences.py --checkpoint runs/demo/checkpoint --prompt 4000013002104000= --answer 4312213412433421

Takes any checkpoint that the trainer loads. Two checkpoints are compared under the same masks, so that much of the noise
is gone from the difference of their scores.
"""

from __future__ import annotations

import argparse

import torch
from dllm_trainer.models.loading import load

from dllm_kernels import estimate_elbo


def score(checkpoint: str, prompt: str, answer: str, samples: int) -> tuple[float, float]:
    """The ELBO of the answer given the prompt, and its standard error, in nats."""
    loaded = load(checkpoint)
    texts = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    ids_BS = torch.tensor([texts[0] + texts[1]])
    answer_BS = torch.arange(ids_BS.shape[1])[None] >= len(texts[0])
    estimate = estimate_elbo(
        loaded.model,
        ids_BS,
        answer_BS,
        samples=samples,
        mask_id=loaded.facts.mask_id,
        shift=loaded.facts.shift,
        suppress=(loaded.facts.mask_id, *loaded.suppressed),
    )
    return float(estimate.elbo_B[0]), float(estimate.standard_error_B[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, help="may be given several times")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoint:
        elbo, error = score(checkpoint, arguments.prompt, arguments.answer, arguments.samples)
        print(f"{checkpoint}: {elbo:.3f} +- {error:.3f} nats")
