"""`dllm-kernels task`: a task as a model and its rewards see it, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..errors import visible
from ..models.codec import encode
from ..models.loading import recognise, tokenizer_of
from ..tasks import Example, Reward, Task, make_task
from ..tasks.rewards import choose

EXAMPLES = 3


def describe_task(config: RunConfig) -> str:
    """Three training examples, each with its prompt as the model sees it, and the rewards of a right and a wrong answer.

    Where a demonstration is not right, as those of the toys' careless solvers, that is said in place of "right answer".
    """
    task = make_task(config.task, seed=config.task_seed)
    tokenizer = _tokenizer(config, task)
    rewards = {"correct": task.correct, **task.rewards}
    rewards[config.rl.reward] = choose(config.rl.reward, task.rewards, timeout=config.rl.reward_timeout)
    tests = ", ".join(f"{len(test)} {name}" for name, test in task.tests.items()) or "none"
    length = config.rollout.length or task.completion_length
    lines = [
        f"{task.name}: {len(task.train):,} training examples, {len(task.demonstrations):,} of them with answers shown in SFT; "
        f"tests: {tests}",
        f"tokenizer of {len(tokenizer):,} tokens; completions of {length}; rl.reward is {config.rl.reward}",
        *task.notes(),
    ]
    system = task.system if config.prompt.instructions else ""
    if not config.prompt.chat_template:
        tokenizer.chat_template = None
    shots = task.train[: config.prompt.few_shot]
    for example in task.train[:EXAMPLES]:
        (ids,) = encode(tokenizer, [example], system=system, shots=shots, longest=config.prompt.max_length)
        lines += ["", f"example {example.id}, a prompt of {len(ids)} tokens", *_indented(tokenizer.decode(ids))]
        is_right = example.answer and _score(task.correct, example, example.answer)
        shown = "right answer" if is_right or not example.answer else "demonstration, which is not right"
        for name, answer in ((shown, example.answer), ("wrong answer", _wrong(task, example))):
            if answer:
                scores = ", ".join(f"{key} {_score(reward, example, answer):g}" for key, reward in rewards.items())
                lines += [f"{name}: {scores}", *_indented(answer)]
            else:
                lines.append(f"{name}: none is known")
    return "\n".join(lines)


def _tokenizer(config: RunConfig, task: Task) -> PreTrainedTokenizerBase:
    model = config.model
    if model.checkpoint is None:
        return tokenizer_of(task)
    return recognise(model.checkpoint, trust_remote_code=model.trust_remote_code, revision=model.revision, facts=model.facts)[1]


def _wrong(task: Task, example: Example) -> str:
    """The answer of another example, or the start of the right one, that does not solve this one."""
    others = [other.answer for other in task.train[: 4 * EXAMPLES] if other.answer != example.answer]
    for answer in [*others, example.answer[:-1], "?"]:
        if answer and not _score(task.correct, example, answer):
            return answer
    return ""


def _score(reward: Reward, example: Example, answer: str) -> float:
    return reward([example], [answer])[0]


def _indented(text: str) -> Sequence[str]:
    return [f"  {line}" for line in visible(text).splitlines()] or ["  "]
