"""A checkpoint is whole or not there; a run that goes on from one ends where it would have ended."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import UserError
from dllm_trainer.records.checkpoints import Checkpoints, latest, load
from dllm_trainer.records.manifest import DamagedCheckpoint
from dllm_trainer.records.states import load_state
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig

from tests.tiny import eurobert
from tests.trainer.records import checkpoint_ranks


def optimizer_of(model, steps=1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def saved(folder, *steps, **options):
    """Checkpoints of a tiny model at these steps."""
    checkpoints = Checkpoints(folder, **options)
    model = eurobert(hidden=8, layers=1, dtype=torch.float32)
    optimizer = optimizer_of(model)
    for step in steps:
        checkpoints.save(step, model, None, optimizer, state={"phase": "rl"}, metrics={"reward": float(step % 4)})
    return checkpoints, model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(folder, *jobs):
    command = [sys.executable, "-m", "tests.trainer.records.checkpoint_ranks", str(folder), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out")


# --- what a checkpoint is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_reads_it_under_the_original_names(tmp_path, tied):
    model = eurobert(hidden=8, layers=1, dtype=torch.float32, tie_word_embeddings=tied)
    path = Checkpoints(tmp_path / "a").save(7, model, None, optimizer_of(model))
    model.save_pretrained(tmp_path / "b")
    read = AutoModelForMaskedLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    files = [f"{folder}/model.safetensors" for folder in (path, tmp_path / "b")]
    from safetensors import safe_open

    assert set(safe_open(files[0], "pt").keys()) == set(safe_open(files[1], "pt").keys())
    assert json.loads((path / "config.json").read_text())["architectures"] == ["EuroBertForMaskedLM"]


def test_adapters_are_saved_in_the_layout_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        eurobert(hidden=8, layers=1, dtype=torch.float32),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    path = Checkpoints(tmp_path).save(1, model, None, optimizer_of(model))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names(path))
    assert "model.safetensors" not in names(path)
    read = peft.PeftModel.from_pretrained(eurobert(hidden=8, layers=1, dtype=torch.float32), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from .{helper} import SIZE

class OddConfig(PretrainedConfig):
    model_type = "odd"

class OddModel(PreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(SIZE, SIZE)
        self.post_init()
    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A cache of remote code that knows nothing of what other tests loaded, which Python keeps by name."""

    def taken_out():
        names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    kept = taken_out()
    monkeypatch.syspath_prepend(tmp_path / "cache")  # before the one that other tests put there
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    yield
    taken_out()
    sys.modules.update(kept)


@pytest.mark.usefixtures("own_modules")
def test_remote_code_travels_with_its_weights(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "modeling_odd.py").write_text(CODE.format(helper="sizes_odd"))
    (source / "sizes_odd.py").write_text("SIZE = 3\n")
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForMaskedLM": "modeling_odd.OddModel"}
    (source / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto_map}))
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    assert isinstance(config, PretrainedConfig)
    torch.save({"layer.weight": torch.ones(3, 3), "layer.bias": torch.ones(3)}, source / "pytorch_model.bin")
    model = AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=True)
    path = Checkpoints(tmp_path / "run").save(1, model, None, optimizer_of(model))
    assert {"modeling_odd.py", "sizes_odd.py", "config.json", "model.safetensors"} <= set(names(path))
    read = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True)
    assert torch.equal(read.layer.weight, model.layer.weight)


def test_step_metrics_and_state_come_back(tmp_path):
    saved(tmp_path, 3, 6)
    found = latest(tmp_path)
    assert (found.step, found.metrics, found.state) == (6, {"reward": 2.0}, {"phase": "rl"})
    assert found.path == tmp_path / "step-00000006"


def test_nothing_saved_is_nothing_found(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None


def test_a_state_before_the_first_step_makes_none(tmp_path):
    """Asking torch for the state of a fresh optimiser makes a step, of which a resumed run would have one
    more.
    """
    model = eurobert(hidden=8, layers=1, dtype=torch.float32)
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Checkpoints(tmp_path).save(0, model, None, fresh)
    assert not fresh.state
    again = torch.optim.AdamW(model.parameters(), lr=1e-2)
    load_state(latest(tmp_path).path / "state", model, again)
    assert not again.state


# --- what is kept -------------------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, 6, keep_last=2, keep_best=1, metric="reward")
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000006"]
    saved(tmp_path / "small", 1, 2, 3, 5, 6, keep_last=1, keep_best=2, metric="reward", smaller_is_better=True)
    assert names(tmp_path / "small") == ["step-00000001", "step-00000005", "step-00000006"]


def test_a_step_saved_twice_leaves_the_first_until_the_second_is_there(tmp_path):
    saved(tmp_path, 2, 2, 10)
    assert names(tmp_path) == ["step-00000002.1", "step-00000010"]
    assert latest(tmp_path).step == 10


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="metric must be given"):
        Checkpoints(tmp_path, keep_best=1)


# --- damage -------------------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "a bit of the weights flipped": lambda path: flip(path / "model.safetensors"),
    "weights truncated": lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1]),
    "a bit of the optimiser's state flipped": lambda path: flip(path / "state" / "rank-00000.safetensors"),
    "a file lost": lambda path: (path / "state" / "rank-00000.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:99]),
    "state changed by hand": lambda path: (path / "trainer_state.json").write_text("{}"),
}


def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path):
    saved(tmp_path / "whole", 1, 2)
    for number, (name, damage) in enumerate(DAMAGE.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        newest = folder / "step-00000002"
        assert latest(folder).path == newest
        damage(newest)
        with pytest.raises(DamagedCheckpoint, match=newest.name):
            load(newest)
        with pytest.warns(UserWarning, match="step-00000002.*trying the one before it") as seen:
            assert latest(folder).step == 1, name
        assert len(seen) == 1


def test_where_all_is_damaged_nothing_starts_anew_in_silence(tmp_path):
    saved(tmp_path, 1)
    flip(tmp_path / "step-00000001" / "model.safetensors")
    with pytest.warns(UserWarning, match="checksum"), pytest.raises(UserError, match=r"none of its 1 checkpoint"):
        latest(tmp_path)


def test_what_was_being_written_is_not_found_and_is_cleared_away(tmp_path):
    checkpoints, model = saved(tmp_path, 1)
    half = tmp_path / ".step-00000002.part"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    assert latest(tmp_path).step == 1
    checkpoints.save(2, model, None, optimizer_of(model))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints, model = saved(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, model, None, optimizer_of(model))
    assert latest(tmp_path).step == 1


def test_a_library_that_cannot_write_is_a_write_error(tmp_path, monkeypatch):
    checkpoints, model = saved(tmp_path, 1)

    def full(*_, **__):
        raise RuntimeError("[enforce fail] write failed\nmore")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match=r"write failed$"):
        checkpoints.save(2, model, None, optimizer_of(model))
    assert latest(tmp_path).step == 1


def test_a_state_of_another_model_is_refused_in_a_sentence(tmp_path):
    checkpoints, _ = saved(tmp_path, 1)
    other = eurobert(hidden=8, layers=2, dtype=torch.float32)
    with pytest.raises(UserError, match="does not fit this model"):
        load_state(checkpoints.latest().path / "state", other, optimizer_of(other))


# --- going on -----------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_bit_for_bit_where_it_would_have_ended(tmp_path):
    whole = checkpoint_ranks.train(Ranks(), tmp_path, save=(2, 4))
    resumed = checkpoint_ranks.train(Ranks(), tmp_path, resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    start = dict(eurobert(vocab=101, hidden=16, dtype=torch.float32).named_parameters())
    assert not any(torch.equal(start[name], whole[name]) for name in whole)


def check_ranks(found, savers):
    whole = found.pop("whole run")
    for size, weights in found.items():
        for name in whole:
            if size == savers:
                assert torch.equal(weights[name], whole[name]), (size, name)
            else:
                torch.testing.assert_close(weights[name], whole[name], rtol=1e-4, atol=1e-5)


def check_kills(found, kills):
    assert found["kills"] == kills
    assert found["reached"] == sorted(found["reached"]), "no step that was saved is ever lost"
    assert len(set(found["reached"])) > kills // 4, "killed at different moments"
    assert all(torch.equal(found["final"][name], tensor) for name, tensor in found["in peace"].items())


@pytest.mark.slow
def test_ranks_resume_bit_for_bit_and_a_run_killed_at_random_moments_ends_where_one_in_peace_does(tmp_path):
    ranks, kills = run(tmp_path, "ranks:2:2,0", "kill:3:0")
    assert set(ranks) == {"whole run", 2, 0}
    check_ranks(ranks, 2)
    check_kills(kills, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("savers", "resumers"), [(0, "0,2"), (4, "4,2,1"), (1, "4,1")])
def test_any_number_of_ranks_resumes_what_any_other_saved(tmp_path, savers, resumers):
    check_ranks(run(tmp_path, f"ranks:{savers}:{resumers}")[0], savers)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_where_one_in_peace_does(tmp_path):
    check_kills(run(tmp_path, "kill:20:1")[0], 20)
