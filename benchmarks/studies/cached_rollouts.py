"""What keys and values that a rollout keeps between steps save, and how far they take its policy from the model's.

    python -m benchmarks.studies.cached_rollouts --run runs/seed0 --out benchmarks/results/cached-rollouts-cpu.json    25 minutes

Of a body of 50 million parameters (EuroBERT, random weights), one sequence of 64 prompt tokens and L = 256 in blocks of 32,
at schedules that take as many calls of the model in all ways: 1 and 4 tokens a step. Seconds are the processor's, of one
thread, as others share the machine; tokens of a call are counted in the layers. The gap is the mean of |log-prob at the
rollout - log-prob of the same state in a full call| over the tokens of 32 steps drawn at random, in nats: 0 is exact.

Of a model that has learned (--run, a run of `dllm-kernels demo`: Sudoku, L = 16, here in blocks of 8), with as many tokens a
step as are surer than a threshold: calls, tokens of calls, and solved puzzles of 256 unseen ones at temperature 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import registry
from benchmarks.report import digits, markdown
from dllm_kernels import Rollout, generate, score_samples, trajectory_logp, trajectory_rows
from dllm_kernels.noise import sequence_ids

BODY = {"V": 8192, "H": 512, "layers": 16, "P": 64, "L": 256, "block": 32}
# cache, refresh
WAYS: dict[str, tuple[Any, int | None]] = {
    "none": (False, None),
    "prefix": ("prefix", None),
    "prefix, refreshed every 8": ("prefix", 8),
    "dual": ("dual", None),
    "dual, refreshed every 8": ("dual", 8),
    "dual, refreshed every 4": ("dual", 4),
    "dual, refreshed every step": ("dual", 1),
}
TOKENS_A_STEP = (1, 4)
SCORED_STEPS = 32
THRESHOLDS = (0.9, 0.7)
UNSEEN = 256


class Layers:
    """Calls of a model, and tokens in its layers, summed over the calls: the mean of all layers."""

    def __init__(self, model: nn.Module) -> None:
        self.calls, self._tokens = 0, 0
        layers: Sequence[nn.Module] = model.model.layers  # type: ignore[assignment, union-attr]
        self._layers = len(layers)
        self._hooks = [layer.mlp.register_forward_pre_hook(self._see) for layer in layers]  # type: ignore[union-attr, operator]
        self._hooks.append(layers[0].register_forward_pre_hook(self._count))

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tokens += inputs[0].shape[:-1].numel()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls += 1

    @property
    def tokens(self) -> float:
        return self._tokens / self._layers

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@contextmanager
def counted(model: nn.Module) -> Iterator[Layers]:
    layers = Layers(model)
    try:
        yield layers
    finally:
        layers.close()


# --- at fixed schedules -----------------------------------------------------------------------------------------------


def body(sizes: Mapping[str, int]) -> nn.Module:
    return registry.small_model(V=sizes["V"], H=sizes["H"], layers=sizes["layers"], dtype=torch.float32, sharpen=5.0)


def sample(model: nn.Module, sizes: Mapping[str, int], way: str, tokens_a_step: int, **options: Any) -> Rollout:
    cache, refresh = WAYS[way]
    prompt = torch.randint(3, sizes["V"] - 1, (1, sizes["P"]), generator=torch.Generator().manual_seed(1))
    given = {"length": sizes["L"], "steps": sizes["L"] // tokens_a_step, "block_length": sizes["block"], "temperature": 1.0}
    return generate(
        model,
        prompt,
        mask_id=sizes["V"] - 1,
        sequence_ids=torch.tensor([7]),
        cache=cache,
        refresh=refresh,
        **{**given, **options},
    )


def gap_of(model: nn.Module, rollout: Rollout, steps: int) -> float:
    """Nats a token, the mean over the tokens that some steps decided."""
    taken = int(rollout.commit_step_BL.max()) + 1
    # at random: steps at even distances would all be just after a refresh, or none
    chosen_J = torch.randperm(taken, generator=torch.Generator().manual_seed(0))[:steps].sort().values
    chosen_BJ = chosen_J.expand(len(rollout.completion_BL), -1)
    plan = trajectory_rows(rollout, chosen_BJ)
    scored_BK = score_samples(model, plan, suppress=(rollout.mask_id,), samples_per_pass=1)
    off_BK = (scored_BK - trajectory_logp(rollout, plan, approximate=True)).abs()
    return float(off_BK.sum() / plan.counts.sum())


def fixed(sizes: Mapping[str, int], steps: int, rounds: Mapping[int, int]) -> list[dict[str, Any]]:
    """Every way at every schedule, in turns; the exact ones must decide the same tokens."""
    torch.set_num_threads(1)
    model = body(sizes)
    for way in WAYS:
        sample(model, sizes, way, sizes["block"], length=2 * sizes["block"], steps=2)  # warmed up, and looked at
    rows = []
    for tokens_a_step in TOKENS_A_STEP:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        found = {}
        for _ in range(rounds[tokens_a_step]):
            for way in WAYS:
                with counted(model) as layers:
                    started = time.process_time()
                    found[way] = sample(model, sizes, way, tokens_a_step), layers.calls, layers.tokens
                    seconds[way].append(time.process_time() - started)
        exact = found["none"][0].completion_BL
        if not torch.equal(found["dual, refreshed every step"][0].completion_BL, exact):
            raise RuntimeError("a cache that is computed anew in every step has other tokens than none")
        for way, (rollout, calls, tokens) in found.items():
            row = {
                "way": way,
                "tokens_a_step": tokens_a_step,
                "cpu_seconds": sorted(seconds[way]),
                "calls": calls,
                "token_forwards": tokens,
                "gap": gap_of(model, rollout, steps),
                "same_tokens": float((rollout.completion_BL == exact).float().mean()),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


# --- of a model that has learned --------------------------------------------------------------------------------------


def learned(run: Path, puzzles: int) -> list[dict[str, Any]]:
    from dllm_trainer.config import load_config
    from dllm_trainer.distributed import Ranks
    from dllm_trainer.tasks import make_task
    from dllm_trainer.train.run import prepare

    checkpoint = run / "checkpoint"
    folder = checkpoint if checkpoint.is_dir() else run / "checkpoint_sft"
    config = load_config(run / "config.yaml", [f"model.checkpoint={json.dumps(str(folder))}", "threads=1"])
    setup = prepare(config, make_task(config.task, seed=config.task_seed), Ranks())
    examples = next(iter(setup.task.tests.values()))[:puzzles]
    prompts, how = setup.codec.asked(examples)
    given = {"length": setup.length, "block_length": setup.length // 2, "mask_id": setup.facts.mask_id, **how}
    options = {"suppress": setup.loaded.suppressed, "sequence_ids": sequence_ids([e.id for e in examples]), **given}
    one = {**options, "sequence_ids": sequence_ids([examples[0].id])}
    rows = []
    for threshold in (None, *THRESHOLDS):
        schedule = {"steps": setup.length} if threshold is None else {"sampler": "fast_dllm", "threshold": threshold}
        for way in ("none", "prefix", "dual", "dual, refreshed every 4"):
            cache, refresh = WAYS[way]
            generate(setup.model, prompts[:1], cache=cache, refresh=refresh, **schedule, **one)  # looks at a new model
            with counted(setup.model) as layers:
                rollout = generate(setup.model, prompts, cache=cache, refresh=refresh, **schedule, **options)
            texts = setup.codec.texts(rollout.completion_BL)
            row = {
                "way": way,
                "threshold": threshold,
                "calls": layers.calls,
                "token_forwards": layers.tokens / len(examples),
                "correct": sum(setup.task.correct(examples, texts)) / len(examples),
                "gap": gap_of(setup.model, rollout, 16),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


# --- tables -----------------------------------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(result: Mapping[str, Any]) -> str:
    lines, longest = [], {row["tokens_a_step"]: middle(row["cpu_seconds"]) for row in result["fixed"] if row["way"] == "none"}
    for row in result["fixed"]:
        seconds = middle(row["cpu_seconds"])
        figures = (BODY["L"] / seconds, longest[row["tokens_a_step"]] / seconds)
        shares = (f"{row['token_forwards']:,.0f}", f"{row['gap']:.2g}", f"{100 * row['same_tokens']:.0f} %")
        lines.append([str(row["tokens_a_step"]), row["way"], str(row["calls"]), *map(digits, figures), *shares])
    heads = ["tokens a step", "kept", "calls", "tokens a CPU s", "x", "tokens in calls", "gap, nats", "tokens as without"]
    return markdown(heads, lines, "---")


def table_of_learned(result: Mapping[str, Any]) -> str:
    lines = []
    for row in result["learned"]:
        schedule = "1 a step" if row["threshold"] is None else f"above {row['threshold']:g}"
        figures = (f"{row['token_forwards']:.0f}", f"{100 * row['correct']:.1f} %", f"{row['gap']:.2g}")
        lines.append([schedule, row["way"], str(row["calls"]), *figures])
    return markdown(["tokens", "kept", "calls", "tokens in calls, a puzzle", "solved", "gap, nats"], lines, "---")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="of `dllm-kernels demo`")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from dllm_trainer.records.environment import environment

    result = {
        "command": f"python -m benchmarks.studies.cached_rollouts --run RUN --out {options.out.name}",
        "learned": learned(options.run, UNSEEN),
        "fixed": fixed(BODY, SCORED_STEPS, {1: 1, 4: 1}),
        "environment": environment(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
