"""rl.samples_per_pass=auto: found once within a run, kept in its state, used again after a resume."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dllm_trainer.errors import ConfigError, Stopped
from dllm_trainer.records.checkpoints import latest
from dllm_trainer.train import setup as train_setup

from tests.trainer.conftest import lines, new_run, resumed, tiny_config

FEW = ["sft.steps=2", "rl.updates=4", "rl.save_every=1", "rl.gap_every=0", "evaluation.probe_every_rl=0"]
PROBED = ("forwards", "backwards", "flops")  # the forward that was measured counts too
AUTO = ["rl.samples_per_pass=auto", "rl.samples=3", "rl.memory_budget=1", "rl.algorithm=gdpo", *FEW]


def test_an_update_is_that_of_the_cut_that_was_found_and_a_resume_does_not_look_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    fit_passes = train_setup.fit_passes
    monkeypatch.setattr(train_setup, "fit_passes", lambda *a, **k: found.append(fit_passes(*a, **k)) or found[-1])
    new_run(tmp_path / "auto", *AUTO).execute()
    (fit,) = found
    assert (fit.samples_per_pass, fit.sequences_per_pass) != (1, 16), "this cut is none that a run would take anyhow"
    cut = [f"rl.samples_per_pass={fit.samples_per_pass}", f"rl.micro_batch={fit.sequences_per_pass}"]
    both = ("auto", "numbers")
    new_run(tmp_path / "numbers", "rl.algorithm=gdpo", "rl.samples=3", *FEW, *cut).execute()
    auto, numbers = ([{k: v for k, v in line.items() if k not in PROBED} for line in lines(tmp_path / name)] for name in both)
    for a, b in zip(auto, numbers, strict=True):
        assert {k: (v, b[k]) for k, v in a.items() if v != b[k]} == {}

    cut = new_run(tmp_path / "cut", *AUTO)
    made = cut.folder.log

    def stop(record: dict[str, Any]) -> None:
        made(record)
        cut.stop.wanted = (record["phase"], record["step"]) == ("rl", 2)

    monkeypatch.setattr(cut.folder, "log", stop)
    with pytest.raises(Stopped):
        cut.execute()
    cut.folder.close()
    saved = latest(tmp_path / "cut" / "checkpoints")
    assert saved is not None
    told = {"budget": 1, "samples": fit.samples_per_pass, "sequences": fit.sequences_per_pass}
    assert json.loads((saved.path / "trainer_state.json").read_text())["state"]["passes"] == told
    looked = len(found)
    resumed(tmp_path / "cut").execute()
    assert len(found) == looked
    assert lines(tmp_path / "cut") == lines(tmp_path / "auto")


def test_until_it_is_found_one_sample_of_one_sequence_goes_at_a_time(tmp_path: Path) -> None:
    loaded = SimpleNamespace(suppressed=(), call_kwargs=lambda mask: {})
    setup: Any = SimpleNamespace(passes={}, loaded=loaded)
    told = train_setup.Setup.scoring_options(setup, None, tiny_config(tmp_path, *AUTO).rl, as_rolled_out=False)
    assert (told["sequences_per_pass"], told["samples_per_pass"]) == (1, 1)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["rl.samples_per_pass=auto"], "memory_budget must be given with samples_per_pass=auto"),
        (["rl.memory_budget=100"], "memory_budget must be given with samples_per_pass=auto, and only then"),
        (["rl.samples_per_pass=auto", "rl.memory_budget=100", "rl.micro_batch=2"], "micro_batch must be null"),
        (["rl.samples_per_pass=most"], "rl.samples_per_pass"),
    ],
)
def test_keys_that_do_not_fit_together_are_told(tmp_path: Path, keys: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny_config(tmp_path, *keys)


def test_a_budget_that_holds_not_even_one_sample_is_told_with_the_figure(tmp_path: Path) -> None:
    sizes = ["model.hidden_size=512", "model.intermediate_size=1024", "model.layers=4", "sft.steps=0", "rl.updates=1"]
    with pytest.raises(ConfigError, match=r"rl.memory_budget must be at least [\d,]+ bytes"):
        new_run(tmp_path / "run", *AUTO, *sizes, "rl.prompts=2", "rl.group=2").execute()
