"""The configuration: defaults that load, overrides that reach their key, and sentences for everything else."""

from pathlib import Path

import pytest
from dllm_trainer.config import RolloutConfig, RunConfig, allowed_keys, load_config, shipped_configs
from dllm_trainer.errors import ConfigError
from omegaconf import OmegaConf

from dllm_kernels.rollouts.samplers import SAMPLERS


def test_the_demo_s_config_says_what_is_trained_and_how_and_leaves_what_other_models_need() -> None:
    shipped = OmegaConf.to_container(OmegaConf.create(shipped_configs()["demo"].read_text()))
    assert isinstance(shipped, dict)
    flat = {f"{name}.{key}" for name, value in shipped.items() if isinstance(value, dict) for key in value}
    assert flat | set(shipped) <= set(allowed_keys())
    assert {"task", "model", "sft", "rl", "rollout", "evaluation"} <= set(shipped)
    resolved = load_config().model_dump()
    for section in ("sft", "rl", "rollout", "evaluation"):
        required = {name for name, field in type(getattr(load_config(), section)).model_fields.items() if field.is_required()}
        assert required <= set(shipped[section]), f"{section} leaves a default to chance"
    assert set(resolved["task"]) > set(shipped["task"])


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_resolves_and_describes_itself(name: str) -> None:
    file = shipped_configs()[name]
    assert file.read_text().startswith("# ")
    config = load_config(Path(name))
    assert config == load_config(file)


def test_a_task_of_another_kind_leaves_the_keys_of_the_first_behind(tmp_path: Path) -> None:
    config = load_config(overrides=["task.kind=countdown", "task.target_max=20", "rl.reward=valid"])
    assert config.task.kind == "countdown"
    assert config.task.target_max == 20
    file = tmp_path / "mine.yaml"
    file.write_text("task: {kind: file, train: mine.jsonl}\n")
    assert load_config(file).task.kind == "file"
    back = load_config(file, ["task.kind=sudoku", "task.train_puzzles=7"])
    assert (back.task.kind, back.task.train_puzzles, back.task.clues_min) == ("sudoku", 7, 6)


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("seed: 5\nrl: {updates: 7, lr: 1e-4}\n")
    config = load_config(file, ["rl.updates=9", "rollout.temperature=0.7"])
    assert (config.seed, config.rl.updates, config.rl.lr, config.rollout.temperature) == (5, 9, 1e-4, 0.7)
    assert config.rl.group == load_config().rl.group


def test_the_resolved_config_loads_to_itself(tmp_path: Path) -> None:
    config = load_config(overrides=["seed=9", "rl.lr=0.000025", "sft.law=bernoulli"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_every_option_of_every_sampler_has_a_key_and_reaches_it() -> None:
    keys = set(RolloutConfig.model_fields)
    for sampler in SAMPLERS.values():
        assert set(sampler.options) <= keys, sampler.name
    config = load_config(
        overrides=["rollout.sampler=remdm", "rollout.block_length=null", "rollout.remasking=null", "rollout.eta=0.3"]
    )
    assert config.rollout.resolved().options["eta"] == 0.3
    assert config.rollout.generate_options(8, None)["eta"] == 0.3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rl.update=3", r"unknown config key rl\.update: the nearest is rl\.updates; allowed in rl: .*rl\.group"),
        ("updates=3", r"unknown config key updates: the nearest is rl\.updates; allowed at the top level: seed, .*out"),
        ("sead=3", r"unknown config key sead: the nearest is seed"),
        ("modle.heads=3", r"unknown config key modle: the nearest is model"),
        ("rl.updates.more=3", r"unknown config key rl\.updates\.more: the nearest is rl\.updates"),
        ("rl=3", r"rl is a section and takes keys such as .*rl\.updates.*, got 3"),
        ("rl.updates=-1", r"rl\.updates must be greater than or equal to 0, got -1"),
        ("rl.updates=many", r"rl\.updates must be a valid integer, got 'many'"),
        ("rl.lr=1.5", r"rl\.lr must be less than 1, got 1\.5"),
        ("rl.lr=.nan", r"rl\.lr must be .*, got nan"),
        ("seed=4294967296", r"seed must be less than or equal to 4294967295, got 4294967296"),
        ("threads=100000", r"threads must be less than or equal to \d+, got 100000"),
        ("threads=0", r"threads must be greater than or equal to 1, got 0"),
        ("seed=true", r"seed must be a valid integer, got True"),
        ("seed=null", r"seed must be a valid integer, got None"),
        ("rl.reward=''", r"rl\.reward must have at least 1 character, got ''"),
        ("sft.betas=[0.9]", r"sft\.betas must have 2 entries, got \[0\.9\]"),
        ("task.clues_min=12", r"task: clues_min must not exceed clues_max=9, got 12"),
        ("model.heads=5", r"model: hidden_size must be a multiple of 2 x heads = 10, got 64"),
        (
            "rollout.length=16 rollout.block_length=1 rollout.steps=8",
            r"rollout: steps must be a multiple of the 16 blocks",
        ),
        ("rollout.sampler=lama", r"rollout: sampler must be one of 'llada', .*, got 'lama'"),
        ("rollout.remasking=low", r"rollout: remasking must be one of 'low_confidence', 'random', got 'low'"),
        ("rollout.threshold=0.9", r"rollout: threshold is no option of sampler='llada', whose options are remasking"),
        ("task.kind=chess", r"task\.kind must be 'sudoku', .* or 'pairs', got 'chess'"),
        ("task.kind=3", r"task\.kind must be .*, got 3"),
        ("task.kind=file", r"task\.train is missing"),
        ("task.kind=countdown task.clues_min=5", r"task\.clues_min is no key of this kind of task, got 5"),
        ("task.kind=countdown task.numbers=[]", r"task\.numbers must have 1 entries, got \[\]"),
        ("model.facts=3", r"model\.facts must be a valid dictionary, got 3"),
        ("model.dtype=float16", r"model\.dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ("model.four_bit=true", r"model: four_bit is for a checkpoint"),
        ("rl.law=trace", r"rl: law trace is for the trajectories of .*egspo.*, got algorithm bgpo"),
        ("rl.algorithm=egspo rl.law=exact", r"rl: law must be trace for algorithm egspo, got exact"),
        ("rl.group=1", r"rl\.group must be greater than or equal to 2, got 1"),
        (
            "rl.algorithm=egspo rl.options.step_selection=best",
            r"rl\.options of egspo: step_selection must be one of 'entropy', 'uniform', 'random', got 'best'",
        ),
        ("rl.algorithm=d2 rl.options.segments=0", r"rl\.options of d2: segments must be at least 1, got 0"),
        ("rl.algorithm=d2 rl.options.segments=2.5", r"rl\.options of d2: segments must be an integer, got 2\.5"),
        ("rl.algorithm=dmpo rl.options.alpha=-2", r"rl\.options of dmpo: alpha must be above 0, 0 or -1, got -2"),
        ("rl.algorithm=espo rl.options.beta=yes", r"rl\.options of espo: beta must be a finite number, got "),
        (
            "rl.algorithm=egspo_sa rl.options.stepwize=1",
            r"rl\.options of egspo_sa: stepwize is unknown: the nearest is stepwise; allowed: .*, selected_steps, ",
        ),
        ("rl.options.beta=1", r"rl\.options of bgpo: beta is unknown: the nearest is dual_clip; allowed: window"),
        ("rl.selected_steps=4", r"unknown config key rl\.selected_steps: it is rl\.options\.selected_steps, of egspo, egspo_sa"),
        ("rl.stepwise=1", r"unknown config key rl\.stepwise: it is rl\.options\.stepwise, of egspo_sa"),
        ("rl.shrink=1", r"unknown config key rl\.shrink: it is rl\.options\.shrink, of trace_rl"),
        ("checkpoints.keep_last=0", r"checkpoints\.keep_last must be greater than or equal to 1, got 0"),
        ("rollout.temperature=0", r"rollout\.temperature must be above 0 for reinforcement learning"),
        ("rl.updates", r"an override has the form key=value .*, got 'rl\.updates'"),
        ("rl.updates=[1", r"config is not readable"),
        ("sft.schedule_options=[]", r"^sft\.schedule_options is a mapping of names to values, got the list \[\]$"),
        ("sft.betas={}", r"^sft\.betas is a single value or a list, got the mapping \{\}$"),
        ("rl.updates=${nothing}", r"config is not readable"),
    ],
)
def test_a_mistake_is_told_with_the_key_what_came_and_what_is_allowed(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(overrides=override.split())
    assert "\n" not in str(caught.value)


def test_an_unreadable_config_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys, got a list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "number.yaml").write_text("3\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys, got a number"):
        load_config(tmp_path / "number.yaml")
    (tmp_path / "text.yaml").write_text("abc\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys, got text"):
        load_config(tmp_path / "text.yaml")
    (tmp_path / "latin.yaml").write_bytes("# \xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "broken.yaml").write_text("rl: {updates: \n")
    with pytest.raises(ConfigError, match="config is not readable"):
        load_config(tmp_path / "broken.yaml")


def test_the_schema_can_be_printed() -> None:
    assert RunConfig.model_json_schema()["additionalProperties"] is False


def test_an_option_whose_partner_a_run_gives_is_no_error_of_the_config() -> None:
    config = load_config(overrides=["rl.algorithm=trace_rl", "rl.options.mode=sdar"])
    assert config.rl.options == {"mode": "sdar"}


def test_options_of_an_algorithm_go_where_a_later_layer_chooses_another() -> None:
    base = load_config(overrides=["rl.algorithm=egspo", "rl.options.selected_steps=4"])
    assert base.rl.options == {"selected_steps": 4}
    assert load_config(base=base.to_yaml()).rl.options == {"selected_steps": 4}
    assert load_config(base=base.to_yaml(), overrides=["rl.algorithm=bgpo"]).rl.options == {}
    again = load_config(base=base.to_yaml(), overrides=["rl.algorithm=gdpo", "rl.options.mode=code"])
    assert again.rl.options == {"mode": "code"}
