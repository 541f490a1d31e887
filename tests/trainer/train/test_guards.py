"""The guards of rollouts: what each stops, and what is next to it and goes on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dllm_trainer.errors import GuardError
from dllm_trainer.tasks import Example
from dllm_trainer.train.guards import guard_failures, guard_groups, guard_rollouts


def test_ids_outside_the_vocabulary_and_rewards_that_are_no_numbers_stop_a_run() -> None:
    text_config = SimpleNamespace(vocab_size=10)
    setup: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config)))

    def check(ids: list[int], reward: float = 0.0) -> None:
        rollouts: Any = SimpleNamespace(completion_BL=torch.tensor([ids, [0, 9]]))
        guard_rollouts(setup, rollouts, torch.tensor([1.0, reward]))

    check([9, 0])
    with pytest.raises(GuardError, match=r"ids in 0\.\.9, got 0\.\.10"):
        check([10, 3])
    with pytest.raises(GuardError, match=r"ids in 0\.\.9, got -1\.\.9"):
        check([-1, 3])
    for reward in ("nan", "inf", "-inf"):
        with pytest.raises(GuardError, match=f"a reward is {reward}"):
            check([1, 2], float(reward))


def test_failed_rollouts_are_counted_and_the_first_is_named() -> None:
    examples = [Example(prompt="", answer="", id=name) for name in ("one", "two", "three")]
    fine, failed = (SimpleNamespace(failed_B=torch.tensor(failed)) for failed in ([False] * 3, [False, True, True]))
    guard_failures(fine, examples)  # type: ignore[arg-type]
    with pytest.raises(GuardError, match=r"^2 rollout\(s\) .* the first of example two;"):
        guard_failures(failed, examples)  # type: ignore[arg-type]


def test_one_repeated_token_and_shared_noise_stop_a_run() -> None:
    calm = torch.zeros(4, 2)
    with pytest.raises(GuardError, match="repeats a single token"):
        guard_groups(torch.tensor([[5, 5], [7, 7], [5, 5], [6, 6]]), calm, 2)
    guard_groups(torch.tensor([[5, 5], [7, 7], [5, 5], [6, 7]]), calm, 2)
    guard_groups(torch.tensor([[5], [7], [5], [6]]), calm[:, :1], 2)  # a completion of one token repeats nothing
    same = torch.tensor([[1, 2], [1, 2], [3, 4], [3, 4]])
    logp = torch.tensor([[-900.0, 0.0], [-20.0, -30.0], [-900.0, 0.0], [-25.0, -25.0]])  # the first of a group repeats none
    guard_groups(same, logp, 2)
    with pytest.raises(GuardError, match="log-probability of -101: the members"):
        guard_groups(same, logp - torch.tensor([[0.0], [0.25], [0.0], [0.25]]), 2)
    guard_groups(torch.tensor([[1, 2], [1, 2], [3, 4], [3, 5]]), 2 * logp, 2)  # one group has two answers
