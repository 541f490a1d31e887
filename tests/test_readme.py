"""The README is short, its before and after agree; its figures and those it links to are of the committed results."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from benchmarks import documents
from dllm_kernels import elbo_loss, headless
from tests.tiny import eurobert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


def test_a_stranger_can_read_it_in_a_minute():
    """Five lines of what it is, two commands, one diff, one figure, one table, links; everything else is in docs/."""
    assert len(README.encode()) < 6000
    assert README.index("## Two commands") < 1500
    assert len(re.findall("^```diff$", README, flags=re.MULTILINE)) == 1
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", README) == [str(documents.FIGURE.relative_to(ROOT))]
    assert "No GPU has run any of it yet" in README


def test_the_demo_s_table_is_that_of_the_committed_runs_and_meets_its_bounds():
    result = documents.result_of("demo-cpu")
    (document,) = documents.DOCUMENTS["demo"]
    assert documents.in_document((ROOT / document).read_text(), "demo table") == documents.demo(result)
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    for way in ("rollout", "greedy"):
        gains = [run["sets"]["unseen_puzzles"][way]["gain"]["gain"] for run in result["runs"]]
        assert min(gains) > 0
        assert sum(gains) / 3 >= 0.15


RESULT = documents.load()


@pytest.mark.parametrize("table", ["measured", "every row"])
def test_measured_figures_are_those_of_the_committed_run(table):
    (document,) = documents.DOCUMENTS[table]
    assert documents.in_document((ROOT / document).read_text(), table) == documents.blocks(table)[table]


def test_the_figure_was_drawn_from_the_committed_run():
    assert Image.open(documents.FIGURE).text["Source"] == documents.digest()


def test_the_figure_and_the_tables_follow_the_result(tmp_path):
    other = json.loads(json.dumps(RESULT))
    row = next(pair.ours for pair in documents.pairs(other))
    row["time_ms"]["median"] *= 2
    assert documents.measured(other) != documents.measured(RESULT)
    documents.draw(other, tmp_path / "figure.png", "another")
    assert Image.open(tmp_path / "figure.png").text["Source"] == "another"
    row["status"] = "wrong"
    with pytest.raises(ValueError, match="must hold one case"):
        list(documents.pairs(other))


def ratios(suite, name, beside, sizes=""):
    """(their time over ours, their extra memory over ours) of a line of the table in docs/results.md."""
    (pair,) = (p for p in documents.pairs(RESULT) if p.line[:4] == (suite, name, sizes, beside))
    return documents.ratio(pair, "time_ms"), pair.other["memory_mib"] / max(pair.ours["memory_mib"], 0.1)


def test_the_bounds_that_the_committed_run_keeps():
    assert all(row["status"] in ("ok", "absent") for entry in RESULT["suites"].values() for row in entry["rows"])
    step = ratios("step", "gdpo_bound", "published")
    assert step[0] >= 2
    assert step[1] >= 8
    for name in ("score", "train"):
        assert ratios("elbo", name, "full logits", "K=16")[1] >= 20
        memory = {
            row["sizes"]["K"]: row["memory_mib"]
            for row in RESULT["suites"]["elbo"]["rows"]
            if row["contestant"] == "ours" and row["case"].startswith(f"{name} ") and row["memory_mib"] is not None
        }
        assert max(memory.values()) <= 1.05 * memory[4] + 1.0, "flat in K: within 5 % and a MiB"


def test_the_rollout_s_figures_at_full_size_are_those_of_the_committed_run():
    result = documents.result_of("rollout-cpu")
    rows = {row["contestant"]: row for row in result["suites"]["rollout"]["rows"] if row["case"].startswith("argmax ")}
    ours, published = rows["ours"], rows["published"]
    prose = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert f"{1 / ours['to_baseline']:.1f} x faster than the published form" in prose
    assert f"with {ours['memory_mib']:.0f} MiB of extra memory against {published['memory_mib']:.0f}" in prose
    assert ours["errors"]["tokens"] == 0
    assert ours["to_baseline"] <= 0.1
    assert published["memory_mib"] >= 20 * ours["memory_mib"]
