"""Reinforcement learning in a loop of your own: rollouts, rewards, masks, and one exact gradient per update.

    python examples/rl_loop.py --updates 12

A random EuroBERT learns to answer with even tokens: no trainer, no download, seconds on one core. Your model, prompts
and reward go where `make_model`, `make_prompts` and `reward` are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM

from dllm_kernels import accumulate, generate, make_mask_plan
from dllm_kernels.noise import sequence_ids
from dllm_kernels.objectives import BGPO, Batch, group_advantages

VOCABULARY, MASK = 32, 31
GROUP, LENGTH, SAMPLES = 8, 8, 4


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
    return EuroBertForMaskedLM(config).eval()  # eval: dropout would make two scores of the same tokens differ


def make_prompts(update: int, count: int) -> Tensor:
    """`[count, 4]` ids, other ones in every update."""
    return torch.randint(1, MASK, (count, 4), generator=torch.Generator().manual_seed(update))


def reward(completion_BL: Tensor) -> Tensor:
    """The share of even tokens."""
    return (completion_BL % 2 == 0).float().mean(-1)


def train(updates: int, prompts: int = 4) -> Iterator[float]:
    """Yields each update's mean reward, before the step that learns from it."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    group_ids_B = torch.arange(prompts).repeat_interleave(GROUP)
    for update in range(updates):
        names = [f"update {update}, prompt {prompt}" for prompt in group_ids_B.tolist()]
        ids_B = sequence_ids(names, members=list(range(GROUP)) * prompts)  # every rollout has noise of its own
        rollout = generate(
            model,
            make_prompts(update, prompts)[group_ids_B],
            length=LENGTH,
            steps=LENGTH,
            block_length=LENGTH,
            temperature=1.0,
            mask_id=MASK,
            sequence_ids=ids_B,
        )
        rewards_B = reward(rollout.completion_BL)
        plan = make_mask_plan(
            rollout.ids_BS,
            rollout.completion_mask_BS,
            law="exact",
            samples=SAMPLES,
            seed=0,
            sequence_ids=ids_B,
            mask_id=MASK,
        )
        advantages_B = group_advantages(rewards_B, group_ids_B, "std")
        optimizer.zero_grad()
        accumulate(model, plan, BGPO, Batch({"advantages": advantages_B}), suppress=(MASK,))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(rewards_B.mean())


if __name__ == "__main__":
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=12)
    for update, mean in enumerate(train(parser.parse_args().updates)):
        print(f"update {update:3d}  reward {mean:.3f}")
