"""What a pass over k samples of a block-causal model costs: one clean copy for all, beside a clean copy for each.

    python -m benchmarks.studies.block_cost --out benchmarks/results/block-cost-cpu.json       10 minutes

Forward and backward of one sequence of 64 prompt tokens and C completion tokens in blocks of 4, one thread:

    doubled    k sequences [clean | noisy], as the published trainers feed them; attention under a whole mask
    dense      `plan.layout(k)`, [clean | noisy_1 | ... | noisy_k], under a whole mask
    parts      the same, attention computed in the parts that exist, as it is by default

Tokens are counted at the model. Time is the processor's, of one thread, best of the rounds that run in turns:
the machine is shared, and what others take from it is no cost of ours; wall time stands beside it in the file.
Memory is the growth of the resident set in a process of its own. Losses and gradients of the three are equal,
which is checked in every case.

The trajectory: all states of a rollout in one pass, beside one pass for each round of states, as dLLM-RL
trains SDAR (train/rl_sdar.py), whose doubled sequence holds the prompt once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.report import digits, markdown
from dllm_kernels import MaskPlan, headless, make_mask_plan
from dllm_kernels.head.scoring import score
from dllm_kernels.model.layouts import block_diffusion

BLOCK, PROMPT, VOCABULARY = 4, 64, 512
BODIES = {"0.1M": (64, 2), "2.6M": (256, 4)}  # parameters of the body: width, layers
COMPLETIONS, SAMPLES = (64, 256), (1, 4, 16)
WAYS = ("doubled", "dense", "parts")
ROUNDS = 3
TRAJECTORY = {"P": 128, "C": 128}  # S = 256
ROUNDS_OF_STATES = ("a round a pass, whole mask", "a round a pass, in parts", "one pass, in parts")

Run = Callable[[], float]


def model_of(width: int, layers: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


def plan_of(prompt: int, completion: int, samples: int | None) -> MaskPlan:
    """Samples of the exact law; without a number, the states of a rollout that decides one token of a block a step."""
    S = prompt + completion
    ids = torch.randint(VOCABULARY - 1, (1, S), generator=torch.Generator().manual_seed(0))
    column_S = torch.arange(S)
    options: dict[str, Any] = {"law": "exact", "samples": samples}
    if samples is None:
        order_S = column_S - prompt  # left to right: the steps of a rollout, one after the other
        options = {"law": "trace", "samples": None, "step_map_BS": torch.where(order_S >= 0, order_S, -1)[None]}
    completion_BS = (column_S >= prompt)[None]
    keys = torch.tensor([1])
    return make_mask_plan(ids, completion_BS, seed=0, sequence_ids=keys, mask_id=VOCABULARY - 1, causal_block=BLOCK, **options)


def train(model: nn.Module, plan: MaskPlan, copies: int | None, *, dense: bool) -> float:
    """Adds the gradient of minus the sum of the plan's log-probs; that sum."""
    layout = plan.layout(copies)
    with headless(model) as body:
        if dense:
            dtype = torch.finfo(torch.float32)
            mask = torch.zeros(layout.sees.shape).masked_fill_(~layout.sees, dtype.min)[:, None]
            hidden = body(layout.ids_RT, attention_mask=mask, position_ids=layout.position_RT)
        else:
            hidden = block_diffusion(body, layout, {})
        coef_M = torch.full((len(layout.index_M),), -1.0)
        scores = score(hidden, body.weight, layout.target_M, layout.index_M, body.options, coef=coef_M)
        assert scores.weighted_sum is not None
        scores.weighted_sum.backward()
    return float(scores.weighted_sum.detach())


def runner(body: str, completion: int, samples: int, way: str) -> Run:
    """One pass over all samples."""
    model, plan = model_of(*BODIES[body]), plan_of(PROMPT, completion, samples)
    return lambda: train(model, plan, 1 if way == "doubled" else None, dense=way != "parts")


def prepared(*case: Any) -> Run:
    """For a process of its own: warmed up at the smallest sizes."""
    torch.set_num_threads(1)
    runner("0.1M", COMPLETIONS[0], SAMPLES[0], case[-1])()
    return runner(*case)


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, in turns; the first round is thrown away."""
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in runs}
    for number in range(-1, rounds):
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            if number >= 0:
                found[name]["cpu"].append(time.process_time() - cpu)
                found[name]["wall"].append(time.perf_counter() - wall)
    return found


class Tokens:
    """Tokens that a model is called with."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.count += ids.numel()


def same(model: nn.Module, runs: Mapping[str, Callable[[], float]]) -> dict[str, int]:
    """Tokens of each run. Raises AssertionError where losses or gradients differ by more than rounding."""
    tokens, first = {}, None
    for name, run in runs.items():
        model.zero_grad(set_to_none=True)
        counter = Tokens(model)
        loss = run()
        tokens[name] = counter.count
        model._forward_pre_hooks.clear()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        if first is None:
            first = loss, found
        assert abs(loss - first[0]) < 1e-4 * abs(first[0]), (name, loss, first[0])
        assert float((found - first[1]).norm()) < 1e-4 * float(first[1].norm()), name
    return tokens


def of_samples(body: str, completion: int, samples: int, rounds: int) -> dict[str, Any]:
    model, plan = model_of(*BODIES[body]), plan_of(PROMPT, completion, samples)
    runs = {
        way: lambda way=way: train(model, plan, 1 if way == "doubled" else None, dense=way != "parts")  # type: ignore[misc]
        for way in WAYS
    }
    return {
        "body": body,
        "C": completion,
        "S": PROMPT + completion,
        "k": samples,
        "tokens": same(model, runs),
        "seconds": timed(runs, rounds),
    }


def of_trajectory(body: str, rounds: int, sizes: Mapping[str, int] = TRAJECTORY) -> dict[str, Any]:
    model, plan = model_of(*BODIES[body]), plan_of(sizes["P"], sizes["C"], None)
    K = plan.shape[0]
    states = [plan.cut(samples=slice(k, k + 1)) for k in range(K)]

    def one_by_one(dense: bool) -> float:
        return sum(train(model, state, 1, dense=dense) for state in states)

    ways: tuple[Callable[[], float], ...] = (
        lambda: one_by_one(True),
        lambda: one_by_one(False),
        lambda: train(model, plan, None, dense=False),
    )
    runs = dict(zip(ROUNDS_OF_STATES, ways, strict=True))
    tokens = same(model, runs)
    return {"body": body, **sizes, "b": BLOCK, "states": K, "tokens": tokens, "seconds": timed(runs, rounds)}


def run(bodies: Sequence[str], completions: Sequence[int], counts: Sequence[int], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    measure.start_memory_server(["transformers", "benchmarks.studies.block_cost"])
    rows = []
    for body in bodies:
        for completion in completions:
            for samples in counts:
                row = of_samples(body, completion, samples, rounds)
                row["memory_mib"] = {way: measure.peak_of(prepared, body, completion, samples, way).extra_mib for way in WAYS}
                rows.append(row)
                print(json.dumps({key: row[key] for key in ("body", "C", "k", "tokens", "memory_mib")}), _best(row), flush=True)
    trajectories = [of_trajectory(body, rounds) for body in bodies]
    for row in trajectories:
        print(row["body"], "trajectory", row["tokens"], _best(row), flush=True)
    return {"rows": rows, "trajectories": trajectories}


# --- tables -------------------------------------------------------------------------------------------------


def _best(row: Mapping[str, Any]) -> dict[str, float]:
    return {way: min(seconds["cpu"]) for way, seconds in row["seconds"].items()}


def table(result: Mapping[str, Any]) -> str:
    """A line per case, and up to which of the measured k a way is faster than the doubled sequence."""
    lines, ends = [], []
    rows = result["rows"]
    for row in rows:
        best, memory, tokens = _best(row), row["memory_mib"], row["tokens"]
        lines.append(
            [
                row["body"],
                str(row["C"]),
                str(row["k"]),
                f"{tokens['parts']:,}",
                f"{tokens['doubled']:,}",
                digits(1e3 * best["doubled"] / row["k"]),
                *(f"{best['doubled'] / best[way]:.2f}" for way in ("dense", "parts")),
                ", ".join(digits(memory[way]) for way in WAYS),
            ]
        )
    for body, completion in dict.fromkeys((row["body"], row["C"]) for row in rows):
        of = [row for row in rows if (row["body"], row["C"]) == (body, completion)]
        told = [f"{way} {_pays(of, way)}" for way in ("dense", "parts")]
        ends.append(f"- {body}, C = {completion}: {'; '.join(told)}.")
    heads = ["body", "C", "k", "tokens, ours", "doubled", "doubled, ms a sample", "dense: times faster", "parts: times faster"]
    whole = markdown([*heads, "MiB: doubled, dense, parts"], lines, "---")
    return "\n\n".join([whole, "\n".join(ends), *(_told(row) for row in result["trajectories"])])


def _pays(rows: Sequence[Mapping[str, Any]], way: str) -> str:
    """Up to which of the measured k it is faster than the doubled sequence, whose tokens are the same at k = 1."""
    several = [row for row in rows if row["k"] > 1]
    slower = [row["k"] for row in several if _best(row)[way] >= _best(row)["doubled"]]
    cheapest = min(rows, key=lambda row: _best(row)[way] / row["k"])["k"]
    ends = f"no longer at k = {min(slower)}" if slower else f"still faster at k = {max(row['k'] for row in several)}"
    return f"{ends}, a sample is cheapest at k = {cheapest}"


def _told(row: Mapping[str, Any]) -> str:
    best, tokens = _best(row), row["tokens"]
    ours = ROUNDS_OF_STATES[-1]
    others = [
        f"{best[name] / best[ours]:.2f} times the time of one pass ({tokens[name]:,} tokens)" for name in ROUNDS_OF_STATES[:-1]
    ]
    return (
        f"A trajectory of {row['states']} states a block, body {row['body']}, S = {row['P'] + row['C']}, C = {row['C']}, "
        f"b = {row['b']}: one pass takes {digits(1e3 * best[ours])} ms and {tokens[ours]:,} tokens; a round a pass takes "
        f"{others[0]} under a whole mask, {others[1]} in parts."
    )


def main(argv: Sequence[str] | None = None) -> None:
    from dllm_trainer.records.environment import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args(argv)
    found = run(tuple(BODIES), COMPLETIONS, SAMPLES, arguments.rounds)
    result = {"schema": 1, "environment": environment(), "rounds": arguments.rounds, **found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
