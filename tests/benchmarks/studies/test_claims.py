"""docs/claims.md says what the committed figures say, its rules can fail, its shortcuts equal the engine."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import documents, report
from benchmarks.studies import bgpo, claims, common, dmpo, egspo, gdpo, rspo, statistics
from benchmarks.studies.common import CONFIRMED, REFUTED, UNDECIDED, Settings, decide, gradient
from dllm_kernels import trajectory_rows
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives import (
    dmpo_objective,
    espo_objective,
    gdpo_objective,
    group_advantages,
    rspo_objective,
    wdce_baseline,
    wdce_weights,
)

pytestmark = pytest.mark.xdist_group("claims")  # one worker: the tiny run is made once
ROOT = Path(__file__).resolve().parents[3]

TEXT = (ROOT / "docs" / "claims.md").read_text()
RESULT = json.loads((common.RESULTS / "claims-cpu.json").read_text())
TINY = Settings(tiny=True)


# --- the document -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [claims.SUMMARY, *claims.CLAIMS])
def test_each_block_is_that_of_the_committed_run(name: str) -> None:
    assert documents.in_document(TEXT, name) == claims.blocks(RESULT)[name]


def test_a_bold_verdict_stands_nowhere_but_in_blocks_and_is_what_the_rule_says() -> None:
    for name, claim in claims.CLAIMS.items():
        entry = RESULT["claims"][name]
        assert re.match(r"python (-m benchmarks\.studies\.claims|benchmarks/claims\.py run) ", entry["command"])
        assert not entry["tiny"]
        assert entry["sizes"] == dict(claim.sizes(Settings("a checkpoint", large=entry.get("large", False))))
        assert {"cpu", "torch", "git_commit"} <= entry["environment"].keys()
        assert f"**{claim.verdict(entry['figures'])}**" in documents.in_document(TEXT, name)
        assert f"--claim {name} " in TEXT
    assert not re.findall(r"\*\*(?:confirmed|refuted|undecided)\*\*", prose())


def prose() -> str:
    """The document without its generated blocks."""
    return re.sub(r"<!-- [\w-]+: benchmarks/documents.py -->.*?<!-- end of [\w-]+ -->", "", TEXT, flags=re.DOTALL)


def test_prose_has_no_figure_of_its_own() -> None:
    """arXiv numbers, sizes in names and the papers' own figures may stand; other decimals are results."""
    text = re.sub(r"```.*?```|`[^`]*`|arXiv \d{4}\.\d{5}", "", prose(), flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+", text)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:\.\./)?((?:benchmarks|tests|docs)/[\w./-]+\w)", prose()))))
def test_every_file_it_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", ["gdpo-quadrature", "bgpo-memory"])
def test_figures_taken_from_other_results_are_still_theirs(name: str) -> None:
    assert claims.CLAIMS[name].measure(TINY) == RESULT["claims"][name]["figures"]


def test_shares_up_to_256_tokens_are_those_of_the_variance_suite(tiny: dict[str, Any]) -> None:
    ours, theirs = (result["claims"]["gdpo-level"]["figures"]["rows"] for result in (tiny, RESULT))
    taken = [row for row in theirs if row["tokens"] <= 256 and "characters" not in row["model"]]
    assert len(taken) == 9
    assert ours[:9] == taken


# --- the rules can fail -------------------------------------------------------------------------------------

BELOW, ABOVE, ACROSS = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (0.5, 1.5, 1.0))


def every(*keys: str, **where: Any) -> Callable[[dict[str, Any], Any], None]:
    """Sets figures of all rows that match."""

    def fabricate(figures: dict[str, Any], value: Any) -> None:
        rows = [row for row in figures["rows"] if all(row[key] == wanted for key, wanted in where.items())]
        assert rows
        for row in rows:
            for key in keys:
                assert key in row
                row[key] = value

    return fabricate


def of(key: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda figures, value: figures.__setitem__(key, value)


def last_of_samples(figures: dict[str, Any], value: Any) -> None:
    for place, row in enumerate(figures["rows"]):
        row["error"] = {"value": 1 / (1 + place), "low": 0, "high": 1}
    figures["rows"][-1]["over n_t = 1"] = value


def stepwise_figures(figures: dict[str, Any], value: Any) -> None:
    inverse = {"value": 1 / value["value"], "low": 1 / value["high"], "high": 1 / value["low"]}
    every("variance")(figures, value)
    every("signal")(figures, inverse)


def training_figures(figures: dict[str, Any], value: Any) -> None:
    figures["rows"][0]["collapsed"] = 0
    every("RSPO minus it")(figures, value)


WIN, LOSS, TIE = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (0.2, -0.2, 0.0))
RULES: list[tuple[str, Callable[[dict[str, Any], Any], None], Any, str]] = [
    *(("gdpo-quadrature", every(gdpo.MONTE_CARLO), v, w) for v, w in ((BELOW, CONFIRMED), (ABOVE, REFUTED), (ACROSS, UNDECIDED))),
    ("gdpo-level", every("t"), {"value": 0.96, "low": 0.94, "high": 0.97}, CONFIRMED),
    ("gdpo-level", every("t"), {"value": 0.5, "low": 0.4, "high": 0.89}, REFUTED),
    ("gdpo-level", every("t", model="demo/checkpoint"), {"value": 0.96, "low": 0.94, "high": 0.97}, UNDECIDED),
    ("bgpo-bound", every("violations", updates=bgpo.SNAPSHOTS[-1]), 1, REFUTED),
    ("bgpo-bound", every("gradient differs", updates=0), 1e-3, REFUTED),
    ("bgpo-bound", every("value differs -1", updates=0), 1e-3, REFUTED),
    (
        "bgpo-memory",
        of("peak MiB"),
        {w: {"2": 70, "4": 90, "8": 130, "16": 210, "32": 370} for w in ("ours", "full graph")},
        REFUTED,
    ),
    (
        "bgpo-memory",
        of("peak MiB"),
        {"ours": {"2": 70, "32": 71}, "full graph": {"2": 70, "4": 71, "8": 72, "16": 90, "32": 400}},
        UNDECIDED,
    ),
    *(("bgpo-samples", last_of_samples, v, w) for v, w in ((BELOW, CONFIRMED), (ABOVE, REFUTED), (ACROSS, UNDECIDED))),
    *(
        ("egspo-steps", every("sequence, entropy over it", "group, entropy over it"), v, w)
        for v, w in ((BELOW, CONFIRMED), (ABOVE, REFUTED), (ACROSS, UNDECIDED))
    ),
    ("egspo-bound", of("correlation"), {"value": 0.8, "low": 0.7, "high": 0.9}, CONFIRMED),
    ("egspo-bound", of("correlation"), {"value": 0.2, "low": 0.1, "high": 0.3}, REFUTED),
    ("egspo-bound", of("correlation"), {"value": 0.5, "low": 0.4, "high": 0.6}, UNDECIDED),
    *(("egspo-stepwise", stepwise_figures, v, w) for v, w in ((BELOW, CONFIRMED), (ABOVE, REFUTED), (ACROSS, UNDECIDED))),
    *(
        (f"dmpo-{kind}", every("variance", baseline=kind), v, w)
        for kind in ("mean", "unbias", "neg")
        for v, w in ((BELOW, CONFIRMED), (ABOVE, REFUTED), (ACROSS, UNDECIDED))
    ),
    ("dmpo-expectation", every("change"), {"value": 0.0, "low": -0.01, "high": 0.01}, CONFIRMED),
    ("dmpo-expectation", every("change"), {"value": 0.05, "low": 0.0, "high": 0.1}, UNDECIDED),
    ("dmpo-expectation", every("change"), BELOW, REFUTED),
    *(
        (name, every("over RSPO", objective=ratio), v, w)
        for name, ratio in (("rspo-gradient-raw", "GDPO, paper"),)
        for v, w in ((ABOVE, CONFIRMED), (BELOW, REFUTED), (ACROSS, UNDECIDED))
    ),
    *(("rspo-gradient", every("over RSPO"), v, w) for v, w in ((ABOVE, CONFIRMED), (BELOW, REFUTED), (ACROSS, UNDECIDED))),
    ("rspo-gradient", every("over RSPO", objective="ESPO"), ABOVE, UNDECIDED),
    *(("rspo-training", training_figures, v, w) for v, w in ((WIN, CONFIRMED), (LOSS, REFUTED), (TIE, UNDECIDED))),
    ("rspo-training", every("collapsed", objective="RSPO"), 99, REFUTED),
]


@pytest.mark.parametrize(
    ("name", "fabricate", "value", "want"), RULES, ids=[f"{n}-{w}-{i}" for i, (n, _, _, w) in enumerate(RULES)]
)
def test_other_figures_give_another_verdict(name: str, fabricate: Callable, value: Any, want: str) -> None:
    figures = copy.deepcopy(RESULT["claims"][name]["figures"])
    fabricate(figures, value)
    assert claims.CLAIMS[name].verdict(figures) == want


@pytest.mark.parametrize(("kind", "want"), [("unbias", CONFIRMED), ("neg", UNDECIDED), ("mean", UNDECIDED)])
def test_more_masks_decide_for_the_baseline_whose_noise_they_lower_and_for_no_other(kind: str, want: str) -> None:
    figures = copy.deepcopy(RESULT["claims"]["dmpo-unbias"]["figures"])
    published = [row for row in figures["rows"] if row["R"] == dmpo.PUBLISHED]
    figures["rows"] = [row for row in figures["rows"] if row["R"] in (None, dmpo.PUBLISHED)]
    for row in figures["rows"]:
        row["variance"] = ACROSS if row in published else BELOW
    figures["rows"] += [{**row, "R": 64, "variance": BELOW} for row in published]
    assert claims.CLAIMS[f"dmpo-{kind}"].verdict(figures) == want


def test_every_rule_was_made_to_differ_from_what_it_found() -> None:
    for name, claim in claims.CLAIMS.items():
        assert {want for n, _, _, want in RULES if n == name} - {claim.verdict(RESULT["claims"][name]["figures"])}, name
    assert decide(True, True) == decide(False, False) == UNDECIDED


# --- the experiments ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("claims") / "new" / "claims.json"
    assert claims.main(["--tiny", "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_each_experiment_runs_at_its_smallest_sizes(tiny: dict[str, Any]) -> None:
    assert tiny["claims"].keys() == claims.CLAIMS.keys()
    for name, claim in claims.CLAIMS.items():
        entry = tiny["claims"][name]
        assert entry["seconds"] > 0
        assert claim.verdict(entry["figures"]) in (CONFIRMED, REFUTED, UNDECIDED)
        assert claim.table(entry["figures"]).count("\n") >= 2
    assert documents.filled(TEXT, claims.blocks(tiny)) != TEXT, "other figures make another document"


def test_a_run_merges_into_what_is_there_and_repeats_itself(tiny: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    out.write_text(json.dumps(tiny))
    assert claims.main(["--tiny", "--claim", "bgpo-samples", "--out", str(out)]) == 0
    again = json.loads(out.read_text())["claims"]
    assert again["bgpo-samples"].pop("command").endswith(f"--claim bgpo-samples --out {out}")
    for name in claims.CLAIMS:
        assert again[name]["figures"] == tiny["claims"][name]["figures"]


@pytest.mark.slow
def test_a_stopped_experiment_goes_on_where_it_was_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    real_run = rspo._run

    def run(settings: Settings, sizes: Any, algorithm: str, seed: int, options: list[str]) -> dict[str, Any]:
        runs.append(f"{algorithm} {seed} {options}")
        if len(runs) == stop_at:
            raise KeyboardInterrupt
        return real_run(settings, sizes, algorithm, seed, options)

    monkeypatch.setattr(rspo, "_run", run)
    stop_at, file = 4, tmp_path / "new" / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rspo.training(Settings(tiny=True, parts=common.Parts(file)))
    with file.open("a") as lines:
        lines.write('{"key": {"claim": "rspo-tr')  # killed while it wrote
    stop_at = 0
    found = rspo.training(Settings(tiny=True, parts=common.Parts(file)))
    assert len(runs) == 4 + 2 * len(rspo.CONTESTANTS) - 3
    assert found == rspo.training(Settings(tiny=True))
    before = len(runs)
    assert rspo.training(Settings(tiny=True, parts=common.Parts(file))) == found
    assert len(runs) == before, "what is known was made again"
    assert common.Parts(file).get(Settings(tiny=True, seed=7), "rspo-training", {}, lambda: 1) == 1, (
        "another seed is another part"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--claim", "bgpo", "--out", "x.json"], ["--claim bgpo", "bgpo-bound"]),
        (["--checkpoint", "nowhere", "--out", "x.json"], ["--checkpoint", "nowhere"]),
        (["--tiny", "--out", "{text}"], ["it is no JSON"]),
        (["--tiny", "--out", "{other}"], ["without its claims"]),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("text", "no"), ("other", "{}")):
        (tmp_path / name).write_text(text)
    filled = [a.format(**{name: tmp_path / name for name in ("text", "other")}) for a in arguments]
    assert claims.main(filled) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in words)


def test_a_result_that_lacks_a_claim_makes_no_document() -> None:
    with pytest.raises(ValueError, match="lacks gdpo-quadrature"):
        claims.blocks({"claims": {}})


# --- shortcuts equal the engine -----------------------------------------------------------------------------


def close(got_P: torch.Tensor, want_P: torch.Tensor) -> bool:
    return float((got_P - want_P).norm()) < 1e-4 * float(want_P.norm())


@pytest.fixture(scope="module")
def subject() -> common.Subject:
    return common.load(TINY)


@pytest.fixture(scope="module")
def off_policy(subject: common.Subject) -> tuple[common.Group, torch.nn.Module]:
    ((_, policy),) = common.moved(TINY, (1,))
    return subject.with_signal(2, 3)[0], policy


def test_moved_is_elsewhere_and_its_start_is_not(subject: common.Subject) -> None:
    (_, start), (_, policy) = common.moved(TINY, (0, 1))
    weight, first, second = (next(model.parameters()) for model in (subject.model, start, policy))
    assert torch.equal(weight, first)
    assert not torch.equal(weight, second)


def test_a_group_s_gradient_from_single_masks_is_that_of_accumulate(
    subject: common.Subject, off_policy: tuple[common.Group, torch.nn.Module]
) -> None:
    group, policy = off_policy
    scored = rspo._scores(subject, group, policy, {"masks": 3, "reference": 4})
    elbo_B, old_B, gradient_BP = (scored[key].mean(1) for key in ("elbo", "old", "gradient"))
    plan, advantages_B = (
        subject.plan(group.rollout, 3, 3, **rspo.LAW),
        group_advantages(group.rewards_B, group.group_ids_B, kind="std"),
    )
    entries = {"advantages": advantages_B, "old_elbo": old_B}
    for name, objective, batch in (
        ("RSPO", rspo_objective(), {"advantages": advantages_B, "ref_elbo": old_B}),
        ("GDPO, paper", gdpo_objective(mode="paper"), entries),
        ("GDPO, code", gdpo_objective(mode="code"), entries),
        ("ESPO", espo_objective(), {**entries, "ref_elbo": old_B}),
    ):
        want_P, _ = gradient(policy, plan, objective, Batch(batch), len(elbo_B))
        assert close(rspo.coefficients(name, group, elbo_B, old_B).float() @ gradient_BP, want_P), name


@pytest.mark.parametrize("kind", dmpo.KINDS)
def test_dmpo_s_gradient_from_single_completions_is_that_of_accumulate(
    subject: common.Subject, off_policy: tuple[common.Group, torch.nn.Module], kind: str
) -> None:
    group, policy = off_policy
    pool = dmpo._scores(subject, group, policy, subject.model)
    arguments = pool.rewards_B, pool.elbo_B, pool.ref_B, group.group_ids_B
    entries = {"weights": wdce_weights(*arguments)}
    if kind == "unbias":
        entries |= {"old_elbo": pool.elbo_B, "group_ids": group.group_ids_B}
    elif kind != "none":
        entries["baseline"] = wdce_baseline(kind, *arguments)
    plan = subject.plan(group.rollout, 4, 2, "antithetic", weight="dmpo")
    want_P, _ = gradient(policy, plan, dmpo_objective(baseline=kind), Batch(entries))
    weight_1B = pool.weights(kind, len(pool.rewards_B))
    assert float(weight_1B[0] @ pool.gram_BB @ weight_1B[0]) == pytest.approx(float(want_P.double().square().sum()), rel=1e-3)


@pytest.mark.parametrize("kind", dmpo.KINDS)
def test_dmpo_s_moments_are_those_of_every_ordered_group(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, rewards = (torch.rand(dmpo.ANSWERS, generator=generator, dtype=torch.float64) for _ in range(2))
    mean_A, variance = dmpo.exact_moments(logits, 0.1 * rewards, kind, 2)
    found, probability = [], []
    logp = logits.log_softmax(0)
    for i in range(dmpo.ANSWERS):
        for j in range(dmpo.ANSWERS):
            pair = torch.tensor([i, j])
            coefficients = dmpo._coefficients(logp[pair], 0.1 * rewards[pair], kind, 2)
            leaf = logits.clone().requires_grad_()
            found.append(torch.autograd.grad((coefficients * leaf.log_softmax(0)[pair]).sum(), leaf)[0])
            probability.append(logp[pair].sum().exp())
    g, p = torch.stack(found), torch.stack(probability)[:, None]
    torch.testing.assert_close(mean_A, (p * g).sum(0))
    assert variance == pytest.approx(float((p * (g - mean_A).square()).sum()))


def test_errors_from_inner_products_are_those_of_gradients(subject: common.Subject) -> None:
    steps = egspo.measured(TINY)[0]
    rollout, T = steps.group.rollout, len(steps.entropy_TB)
    missing_BT = egspo.left_out(steps, "entropy", 3, 0)
    assert (missing_BT.sum(1) == T - 3).all()
    order_BT = steps.entropy_TB.t().argsort(1)
    plan = trajectory_rows(rollout, order_BT[:, : T - 3].contiguous())  # the least open ones are left out
    weights_B = torch.tensor([1.0, -0.5])
    want_P, _ = gradient(subject.model, plan, egspo.ONE_STEP, Batch({"advantages": weights_B}), **subject.rollout_options())
    got = egspo.form(steps.gram_NN, missing_BT * weights_B[:, None], within=False)
    assert float(got) == pytest.approx(float(want_P.square().sum()), rel=1e-3)


def test_moments_at_each_count_are_those_of_all_masks(subject: common.Subject) -> None:
    group = subject.groups(1, 2)[0]
    ids_BS, L, mask_id = group.rollout.ids_BS, 3, group.rollout.mask_id
    found = gdpo.moments_of_counts(subject.model, ids_BS, L, mask_id, 600, seed=0)
    for count in (1, 2, 3):
        hidden_XS = torch.zeros(2**L, ids_BS.shape[1], dtype=torch.bool)
        hidden_XS[:, -L:] = (torch.arange(2**L)[:, None] >> torch.arange(L)) % 2 == 1
        hidden_XS = hidden_XS[hidden_XS.sum(1) == count]
        for b in range(2):
            known_XS = ids_BS[b].expand(len(hidden_XS), -1)
            with torch.no_grad():
                logits = subject.model(input_ids=known_XS.masked_fill(hidden_XS, mask_id)).logits.log_softmax(-1)
            sums_X = (logits.gather(-1, known_XS[..., None])[..., 0] * hidden_XS).sum(1).double()
            error = 5 * float(sums_X.std(correction=0)) / 600**0.5 + 1e-6
            assert float(found.mean_BL[b, count - 1]) == pytest.approx(float(sums_X.mean()), abs=error)
            assert float(found.variance_BL[b, count - 1]) == pytest.approx(float(sums_X.var(correction=0)), rel=0.3, abs=1e-9)


def test_between_the_grid_s_counts_moments_are_linear() -> None:
    counts = gdpo.grid(256)
    assert (counts[0], counts[-1], sorted(set(counts))) == (1, 256, counts)
    line_BC = -3.0 * torch.tensor([counts], dtype=torch.float64)
    torch.testing.assert_close(gdpo._between(counts, line_BC), -3.0 * torch.arange(1.0, 257.0, dtype=torch.float64)[None])
    assert gdpo.grid(3) == [1, 2, 3]


def test_held_out_texts_share_nothing_with_those_of_training(tmp_path: Path) -> None:
    gdpo.write_texts(tmp_path / "texts.jsonl", 64)
    train, held = ((tmp_path / name).read_text().splitlines() for name in ("texts.jsonl", "texts.held-out.jsonl"))
    assert len(train) > 7 * len(held) > 700
    shown = "\n".join(json.loads(line)["prompt"] + json.loads(line)["answer"] for line in train)
    assert not [line for line in held if json.loads(line)["answer"] in shown]


def test_statistics() -> None:
    draws_RP = 3.0 + torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    variance, norm = statistics.moments(draws_RP)
    assert variance == pytest.approx(2.0, rel=0.1)
    assert norm == pytest.approx(18.0, rel=0.05)
    vectors_NP, weight_RN = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, :, :3]
    by_sums = statistics.moments_of_sums(weight_RN, vectors_NP @ vectors_NP.t())
    assert by_sums == pytest.approx(statistics.moments(weight_RN @ vectors_NP))
    assert statistics.moments(torch.tensor([[1.0], [-1.0]]))[1] == -1.0, "unbiased, so it may be below 0"
    found = statistics.ratio(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    assert (found["value"], found["low"], found["high"]) == (0.5, 0.5, 0.5)
    wide = statistics.ratio(torch.tensor([1.0, 2.0, 3.0]))
    assert wide["low"] < wide["value"] == 2.0 < wide["high"]
    assert statistics.spread(1.0, torch.full((5,), torch.nan))["low"] < -1e8, "no rule decides by what is not known"
    x = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert float(egspo.rank_correlation(x, x.exp())) == pytest.approx(1.0)
    assert float(egspo.rank_correlation(x, -x)) == pytest.approx(-1.0)
    assert [report.two_digits(v) for v in (0, 0.0123, 123.4, 2e-7, 3e9)] == ["0", "0.012", "123", "2.0e-07", "3.0e+09"]
