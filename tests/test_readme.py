"""The README is true: its code runs, its before and after agree, its figures are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from benchmarks import demo_table
from dllm_kernels import elbo_loss, headless
from tests.tiny import eurobert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_examples_run_one_after_the_other():
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    report, model, elbo = names["report"], names["model"], names["elbo"]
    assert (report.passes, report.forwards, report.backwards) == (1, 16, 16)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert_close(elbo, report.sample_elbo_BK, atol=1e-4, rtol=1e-4)
    assert (names["estimate"].elbo_B - elbo.mean(-1)).abs().max() < 8 * names["estimate"].standard_error_B.max()


def test_the_two_sides_of_the_diff_give_the_same_loss_and_gradients():
    (diff,) = blocks("diff")
    sides = {sign: "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")) for sign in "-+"}
    B, L, V = 3, 12, 17
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, V - 1, (B, L), generator=generator)
    p_mask = torch.rand(B, 1, generator=generator).clamp(min=0.2).expand(B, L)
    masked = torch.rand(B, L, generator=generator) < p_mask
    names = {"F": F, "headless": headless, "elbo_loss": elbo_loss, "input_ids": input_ids, "p_mask": p_mask, "masked": masked}
    names |= {"noisy_ids": input_ids.masked_fill(masked, V - 1), "B": B, "L": L, "model": eurobert(vocab=V)}
    losses, gradients = [], []
    for side in sides.values():
        names["model"].zero_grad()
        exec(compile(side, "README.md", "exec"), names)
        losses.append(names["loss"].detach())
        gradients.append([p.grad.clone() for p in names["model"].parameters()])
    assert_close(losses[0], losses[1].to(losses[0].dtype), rtol=1e-6, atol=1e-6)
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:benchmarks|trainer|tests|csrc|dllm_kernels|docs)/[\w./-]+)`", README)))
)
def test_every_file_it_names_is_there(path):
    assert (ROOT / path).exists()


def test_the_demo_s_table_is_that_of_the_committed_runs_and_meets_its_bounds():
    result = json.loads((ROOT / "benchmarks" / "results" / "demo-cpu.json").read_text())
    assert demo_table.in_readme(README) == demo_table.table(result)
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    for way in ("rollout", "greedy"):
        gains = [run["sets"]["unseen_puzzles"][way]["gain"]["gain"] for run in result["runs"]]
        assert min(gains) > 0
        assert sum(gains) / 3 >= 0.15


def test_the_bgpo_figures_are_those_of_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu-xeon-2-cores.json").read_text())
    rows = {(row["case"].split()[0], row["contestant"]): row for row in result["suites"]["bgpo"]["rows"]}
    mib = {key: f"{row['memory_mib']:.0f}" for key, row in rows.items()}
    assert f"from {mib['n_t=2', 'ours']} to {mib['n_t=32', 'ours']} MiB between n_t = 2 and 32" in README
    assert f"from {mib['n_t=2', 'full graph']} to {mib['n_t=32', 'full graph']} MiB" in README
    ratio = {n: rows[f"n_t={n}", "ours"]["to_baseline"] for n in (1, 32)}
    assert f"Time at n_t = 32 is {ratio[32]:.2f} x the full graph's, at n_t = 1 {ratio[1]:.2f} x" in README
    assert "Gradients agree to 2e-5" in README
    assert max(row["errors"]["gradient"] for row in rows.values()) <= 2e-5


def test_the_rollout_figures_are_those_of_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks" / "results" / "rollout-cpu.json").read_text())
    rows = {(row["case"].split()[0], row["contestant"]): row for row in result["suites"]["rollout"]["rows"]}
    faster = {case: 1 / rows[case, "ours"]["to_baseline"] for case in ("argmax", "drawn")}
    memory = [rows["argmax", name]["memory_mib"] for name in ("ours", "published")]
    prose = " ".join(README.split())
    assert f"denoising step is {faster['argmax']:.1f} x faster than the published form" in prose
    assert f"at {memory[0]:.0f} MiB of extra memory against {memory[1]:.0f}" in prose
    assert f"at temperature 0.9 it is {faster['drawn']:.1f} x faster" in prose
    assert rows["argmax", "ours"]["errors"]["tokens"] == 0
    assert faster["argmax"] >= 10
    assert memory[1] >= 20 * memory[0]


def test_the_head_figures_are_those_of_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks" / "results" / "head-cpu.json").read_text())
    found = {}
    for run in result["runs"]:
        for row in run["suites"]["head"]["rows"]:
            if row["contestant"] == "ours" and (row["sizes"]["N"], row["sizes"]["H"]) == (512, 1024):
                found[row["case"].split()[0], run["settings"]["dtype"]] = row
    prose = " ".join(README.split())
    for plan, words in (("forward", " with entropy and top-1"), ("unit", ""), ("coef", ""), ("sample", "")):
        row = found[plan, "float32"]
        assert f"`{plan}`{words} {row['to_floor']:.2f} and {row['to_baseline']:.2f}" in prose
    for plan, words in (("forward", " of eager"), ("coef", "")):
        assert f"`{plan}` {found[plan, 'bfloat16']['to_baseline']:.2f}{words}" in prose
