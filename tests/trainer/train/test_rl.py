"""What `rl_updates` tells of its rollouts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dllm_trainer.distributed import Ranks
from dllm_trainer.tasks import Example
from dllm_trainer.train.rl import _rewards_of, _rollout_figures


@pytest.mark.parametrize(("eos", "length"), [(7, (1 + 3 + 0 + 2) / 4), (None, 3.0)])
def test_figures_of_rollouts_are_those_of_all_and_of_their_groups(eos: int | None, length: float) -> None:
    completion_BL = torch.tensor([[1, 7, 7], [1, 2, 3], [7, 1, 2], [1, 2, 7]])
    rollouts: Any = SimpleNamespace(
        completion_BL=completion_BL,
        commit_logp_BL=torch.tensor([[-1.0, -2.0, -3.0]] * 3 + [[0.0, 0.0, -2.0]]),
        ids_BS=torch.zeros(4, 5, dtype=torch.int64),
        steps_B=torch.tensor([3, 2, 3, 1]),
    )
    task = SimpleNamespace(
        correct=lambda examples, texts: [float(text == "b") for text in texts],
        metrics={"longest": lambda examples, texts: [float(len(example.id)) for example in examples]},
    )
    setup: Any = SimpleNamespace(
        ranks=Ranks(), task=task, facts=SimpleNamespace(eos_id=eos), config=SimpleNamespace(rl=SimpleNamespace(group=2))
    )
    examples = [Example(id="x" * n, prompt="") for n in (1, 1, 3, 3)]
    rewards, index = torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([4, 4, 6, 6])
    assert _rollout_figures(setup, rollouts, rewards, examples, ["a", "b", "b", "c"], index) == pytest.approx(
        {
            "reward": 1.25,
            "reward_std": (2.75 / 4) ** 0.5,  # of all, as a population
            "groups_without_signal": 1,
            "tokens": 5 * 9,  # every step sees all positions
            "correct": 0.5,
            "longest": 2.0,
            "completion_length": length,  # before the first EOS
        }
    )


def test_rewards_of_states_stand_by_rollout_and_state() -> None:
    setup: Any = SimpleNamespace(codec=SimpleNamespace(texts=lambda ids: ["".join(map(str, row)) for row in ids.tolist()]))
    asked: list[tuple[str, str]] = []

    def reward(examples: Any, texts: Any) -> list[float]:
        asked.extend((example.id, text) for example, text in zip(examples, texts, strict=True))
        return [float(text) for text in texts]

    examples = [Example(id=name, prompt="") for name in "abc"]
    found = _rewards_of(setup, reward, examples, torch.tensor([2, 0]), torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]))
    assert found.tolist() == [[12.0, 34.0], [56.0, 78.0]]
    assert asked == [("c", "12"), ("c", "34"), ("a", "56"), ("a", "78")]
