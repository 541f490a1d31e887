"""What K Monte-Carlo samples cost and bring, from 1 to 1024: seconds, memory, and the error of ELBO and gradient.

    python -m benchmarks.studies.many_samples --out benchmarks/results/many-samples-cpu.json       6 minutes

BGPO's gradient by `accumulate`, a sample a pass, of two sequences, on the demo's model and on one with LLaDA's vocabulary;
one thread. Time is the processor's: others share the machine. Memory is the growth of the resident set in a process of its
own, `.grad` included. The standard error of an ELBO of K samples is the spread over plans of other seeds, beside what
`plan.standard_error` says of one. The error of a gradient is its distance from that of 1024 other samples, over the norm of
the latter; what those lack themselves is taken off.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.report import digits, markdown
from dllm_kernels import MaskPlan, accumulate, make_mask_plan, score_samples
from dllm_kernels.objectives import BGPO, Batch

COUNTS = (1, 4, 16, 64, 256, 1024)
PLANS = 2048  # samples in all, of the plans whose ELBOs are compared
# hidden size, layers, vocabulary, prompt, completion
MODELS = {"demo": (64, 4, 15, 17, 16), "V = 126464": (64, 2, 126464, 16, 32)}
ADVANTAGES = (1.0, -0.5)


def model_of(name: str) -> nn.Module:
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    H, layers, V, _, _ = MODELS[name]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"), 0)
    config = EuroBertConfig(
        vocab_size=V, hidden_size=H, intermediate_size=2 * H, num_hidden_layers=layers, num_attention_heads=4, **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EuroBertForMaskedLM(config)
    for parameter in model.parameters():  # far from uniform, so that samples differ
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    return model.eval()


def plan_of(name: str, samples: int, seed: int) -> MaskPlan:
    *_, V, prompt, completion = MODELS[name]
    ids = torch.randint(1, V, (2, prompt + completion), generator=torch.Generator().manual_seed(0))
    completion_BS = (torch.arange(prompt + completion) >= prompt).expand(2, -1)
    keys = torch.tensor([1, 2])
    return make_mask_plan(ids, completion_BS, law="exact", samples=samples, seed=seed, sequence_ids=keys, mask_id=0)


def gradient(model: nn.Module, plan: MaskPlan) -> Tensor:
    model.zero_grad(set_to_none=True)
    accumulate(model, plan, BGPO, Batch({"advantages": torch.tensor(ADVANTAGES)}), denominator=2.0)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def prepared(name: str, samples: int) -> Callable[[], object]:
    """For a process of its own: warmed up by another sample."""
    torch.set_num_threads(1)
    model, plan = model_of(name), plan_of(name, samples, 0)
    gradient(model, plan_of(name, 1, 1))
    model.zero_grad(set_to_none=True)

    def run() -> object:
        return accumulate(model, plan, BGPO, Batch({"advantages": torch.tensor(ADVANTAGES)}), denominator=2.0)

    return run


def errors_of_elbo(model: nn.Module, name: str, K: int) -> tuple[float, float | None]:
    """Nats, the mean of both sequences: the spread of the ELBOs of plans of K samples, and what `standard_error` says of one.

    Plans of other seeds are independent; the samples of one are not, as their levels are spread evenly.
    """
    plans = [plan_of(name, K, 1000 + seed) for seed in range(max(16, min(256, PLANS // K)))]
    elbos = [score_samples(model, plan, samples_per_pass=min(K, 16)) for plan in plans]
    spread = torch.stack([elbo_BK.mean(-1) for elbo_BK in elbos]).std(0).mean()
    if K == 1:
        return float(spread), None
    said = torch.stack([plan.standard_error(elbo_BK) for plan, elbo_BK in zip(plans, elbos, strict=True)])
    return float(spread), float(said.square().mean(0).sqrt().mean())


def of_model(name: str, counts: Sequence[int]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    model, most = model_of(name), max(counts)
    gradient(model, plan_of(name, 1, 1))
    truth, rows = gradient(model, plan_of(name, most, 100)).double(), []
    for K in counts:
        seconds, distances = [], []
        for repeat in range(max(1, min(8, 64 // K))):
            plan = plan_of(name, K, 1 + repeat)
            started = time.process_time()
            found = gradient(model, plan)
            seconds.append(time.process_time() - started)
            distances.append(float((found.double() - truth).norm() / truth.norm()) ** 2)
        # distance^2 is the error of K samples and that of `most` others
        error = math.sqrt(sum(distances) / len(distances) * most / (most + K))
        spread, said = errors_of_elbo(model, name, K)
        rows.append(
            {"model": name, "K": K, "cpu_seconds": sorted(seconds), "elbo_se": spread, "elbo_se_said": said} | {"gradient": error}
        )
    return rows


def run(counts: Sequence[int]) -> dict[str, Any]:
    measure.start_memory_server(["transformers", "benchmarks.studies.many_samples"])
    rows = []
    for name in MODELS:
        for row in of_model(name, counts):
            row["memory_mib"] = measure.peak_of(prepared, name, row["K"]).extra_mib
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {"rows": rows}


# --- table and picture ------------------------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(result: Mapping[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        seconds = middle(row["cpu_seconds"])
        figures = (seconds, 1e3 * seconds / row["K"], row["memory_mib"], row["elbo_se"], row["elbo_se_said"], row["gradient"])
        lines.append([row["model"], str(row["K"]), *("–" if figure is None else digits(figure) for figure in figures)])
    heads = ["model", "K", "CPU s", "ms a sample", "MiB", "error of the ELBO, nats", "`standard_error`", "error of the gradient"]
    return markdown(heads, lines, "---")


def draw(result: Mapping[str, Any], path: Path) -> None:
    from benchmarks.plots import OTHERS, OURS, drawing

    panels = {"CPU seconds": "cpu_seconds", "memory, MiB": "memory_mib", "relative error of the gradient": "gradient"}
    with drawing(path, (11, 3.6), columns=3) as (_, (axes,)):
        for axis, (title, key) in zip(axes, panels.items(), strict=True):
            for name, colour in zip(MODELS, (OURS, OTHERS), strict=True):
                rows = [row for row in result["rows"] if row["model"] == name]
                values = [middle(row[key]) if key == "cpu_seconds" else row[key] for row in rows]
                axis.plot([row["K"] for row in rows], values, "o-", color=colour, label=name)
                if key != "memory_mib":  # in proportion to K, and to 1 / sqrt(K)
                    power = 1.0 if key == "cpu_seconds" else -0.5
                    line = [values[2] * (row["K"] / rows[2]["K"]) ** power for row in rows]
                    axis.plot([row["K"] for row in rows], line, ":", color=colour, linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("K")
        axes[1].set_ylim(bottom=0.5)
        axes[0].legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from dllm_trainer.records.environment import environment

    result = {"command": "python -m benchmarks.studies.many_samples", **run(COUNTS), "environment": environment()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
