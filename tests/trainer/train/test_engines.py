"""Rollouts of a server: the server has the weights of the update, and what is learned is what is learned from our own."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import ConfigError, GuardError, UserError
from dllm_trainer.records.checkpoints import latest
from dllm_trainer.tasks import make_task
from dllm_trainer.train import engines
from dllm_trainer.train.engines import OwnEngine, engine_of
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.rl import rl_updates
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from safetensors.torch import load_file

from dllm_kernels import noise
from dllm_kernels.integrations.foreign_rollouts import Gap
from tests.integrations.sglang_server import HANG_UP, DiffusionServer, serving
from tests.tiny import checkpoint
from tests.trainer.conftest import TINY, lines, new_run, resumed, tiny_config
from tests.trainer.train.test_processes import torchrun

BLOCKS = ["model.facts.topology=block_causal", "model.facts.block_length=4", "model.facts.attention_mask=float"]
SHORT = ["sft.steps=3", "sft.save_every=10", "rl.updates=2", "rl.save_every=10", "rl.gap_every=1"]
FEW = ["evaluation.probe_every_sft=0", "evaluation.probe_every_rl=0", "task.test_puzzles=2", "rl.prompts=2"]
FEW += ["rl.group=8"]  # random weights differ between versions of torch: in groups of 2 some had no signal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "m", alphabet="01234=")


@pytest.fixture
def server(folder: Path) -> DiffusionServer:
    return DiffusionServer(folder, block=4, mask_id=7, threshold=0.5, eos_id=9)


@pytest.fixture
def url(server: DiffusionServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def keys(folder: Path, url: str, *more: str) -> list[str]:
    served = ["rollout.engine=sglang", f"rollout.url={url}", "rollout.retries=0", "rollout.timeout=60"]
    return [f"model.checkpoint={json.dumps(str(folder))}", *BLOCKS, *SHORT, *served, *FEW, *more]


def setup_of(out: Path, folder: Path, url: str, *more: str) -> Setup:
    config = tiny_config(out, *keys(folder, url, *more))
    return prepare(config, make_task(config.task, seed=config.seed), Ranks())


def peaked(setup: Setup) -> Setup:
    """With weights, not those that the server was started with, of which tokens depend on what stands around them."""
    with torch.no_grad():
        for parameter in setup.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(-12.0)
    return setup


def learn(setup: Setup) -> list[dict[str, float]]:
    return list(rl_updates(setup, make_optimizer(setup.trained, setup.config.rl)))


def updates_of(server: DiffusionServer) -> list[Any]:
    return [body for path, body in server.asked if path == "/update_weights_from_disk"]


def test_a_run_of_sft_and_rl_has_its_weights_at_the_server_whenever_they_changed(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    new_run(tmp_path / "run", *keys(folder, url, "rollout.logp=true")).execute()
    rows = lines(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["sft"] * 3 + ["rl"] * 2
    for row in rows[3:]:
        assert row["on_policy_gap"] < 1e-4, "log-probs of the server are those of the weights of this update"
        assert row["grad_norm"] > 0
        assert (row["server_reloads"], math.isfinite(row["surprise"])) == (0, True)
    versions = [body["weight_version"] for body in updates_of(server)]
    assert [version.rpartition("-")[2] for version in versions] == ["1", "2", "3"], "after SFT and each update, not in between"
    kinds = [path for path, _ in server.asked if path != "/get_model_info"]
    first, second, third = (i for i, path in enumerate(kinds) if path == "/update_weights_from_disk")
    assert kinds[first + 1 : second].count("/generate") == 2 * 2 + 1, "two sets in two ways, and the first update's rollouts"
    assert kinds[third + 1 :].count("/generate") == 2 * 2
    weights = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    served = server.model.state_dict()
    assert all(torch.equal(served[name], weight) for name, weight in weights.items())
    assert not (tmp_path / "run" / "rollout_weights").exists(), "removed at the end"
    assert "noise of the server" in (tmp_path / "run" / "report.md").read_text()


def test_greedy_answers_are_those_of_our_own_engine(server: DiffusionServer, url: str, folder: Path, tmp_path: Path) -> None:
    setup = peaked(setup_of(tmp_path, folder, url))
    examples, ids = setup.task.train[:4], noise.sequence_ids(list("abcd"))
    greedy = setup.config.rollout.model_copy(update={"temperature": 0.0})
    told = engine_of(setup).generate(examples, ids, decoding=greedy)
    own = {"engine": "ours", "sampler": "llada2", "threshold": 0.5, "block_length": 4}
    ours = OwnEngine(setup).generate(examples, ids, decoding=greedy.model_copy(update=own))
    assert torch.equal(told.completion_BL, ours.completion_BL)
    assert torch.equal(told.commit_step_BL, ours.commit_step_BL)
    assert torch.equal(told.sequence_ids_B, ours.sequence_ids_B)


def test_algorithms_that_replay_states_have_log_probs_of_each(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    """The server does not tell them, so they are scored in every update, whether a check is due or not."""
    setup = setup_of(tmp_path, folder, url, "rl.algorithm=egspo", "rl.gap_every=0", "rl.inner_iterations=2")
    setup.reference = copy.deepcopy(setup.model).requires_grad_(False)
    records = learn(setup)
    assert len(records) == 2
    for record in records:
        assert record["grad_norm"] > 0
        assert record["rollout_logp"] < 0
        assert "on_policy_gap" not in record
        assert abs(record["surprise"]) < 0.5
    assert len(updates_of(server)) == 2


def test_ids_alone_train_what_draws_its_own_masks(server: DiffusionServer, url: str, folder: Path, tmp_path: Path) -> None:
    server.step_maps = False
    more = ["rollout.step_maps=false", "rl.gap_every=0", "rollout.stop_at_eos=true"]
    for record in learn(setup_of(tmp_path, folder, url, *more)):
        assert record["grad_norm"] > 0
        assert not {"rollout_logp", "surprise", "on_policy_gap"} & record.keys()


def test_a_server_that_was_started_anew_gets_the_weights_again(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    setup = setup_of(tmp_path, folder, url, "rollout.logp=true", "rollout.retries=1")
    updates = rl_updates(setup, make_optimizer(setup.trained, setup.config.rl))
    next(updates)

    def restart(answer: Any) -> Any:  # after the second update's weights were loaded
        server.model, server.info = server._read(folder), {**server.info, "weight_version": "default"}
        return answer

    server.faults = [None, restart, HANG_UP]
    record = next(updates)
    assert record["server_reloads"] == 1
    assert record["on_policy_gap"] < 1e-4


def test_a_server_that_dies_ends_the_run_with_a_sentence_and_a_saved_state(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    run = new_run(tmp_path / "run", *keys(folder, url))
    step = run.folder.log

    def dies_after_the_first_update(record: Any) -> None:
        step(record)
        if record["phase"] == "rl":
            server.faults = [HANG_UP] * 9

    run.folder.log = dies_after_the_first_update  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"rollout\.url: http://127.* did not answer POST /update_weights_from_disk in 1 tries"):
        run.execute()
    saved = latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert (saved.state["phase"], saved.state["step"]) == ("rl", 1)
    left, server.faults = next((tmp_path / "run" / "rollout_weights").iterdir()), []
    number = len(updates_of(server))
    again = resumed(tmp_path / "run")
    log, first = again.folder.log, []

    def look(record: Any) -> None:
        log(record)
        first.append((server.info["model_path"], left.exists()))

    again.folder.log = look  # type: ignore[method-assign]
    again.execute()
    assert [path for path, _ in first] == [updates_of(server)[number]["model_path"]], "the weights of the resumed policy"
    assert not first[0][1], "and not both"
    assert not (tmp_path / "run" / "rollout_weights").exists()


def ranked(folder: Path, url: str, out: Path, *more: str) -> list[str]:
    """The arguments of a run of several ranks: three prompts twice, so a group lies on two of them."""
    own = [key for key in TINY if not key.startswith("rollout.")]
    return ["demo", *own, *keys(folder, url, "rl.prompts=3", "tensorboard=false", *more), "--out", str(out)]


@pytest.mark.slow
def test_ranks_ask_for_their_own_prompts_and_the_weights_reach_the_server_once(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    answer, left = server.answer, [0]

    def loses_the_weights(path: str, body: Any) -> tuple[int, Any]:  # before either rank has its answer
        if path == "/generate" and server.info["weight_version"].endswith("-2"):
            left[0] += 1
            if left[0] == 1:
                server.info = {**server.info, "weight_version": "default"}
        return answer(path, body)

    server.answer = loses_the_weights  # type: ignore[method-assign]
    done = torchrun(2, *ranked(folder, url, tmp_path / "two", "rollout.logp=true"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    versions = [body["weight_version"].rpartition("-")[2] for body in updates_of(server)]
    assert versions == ["1", "2", "2", "3"], "once whenever they changed, and once more as the server had lost them"
    rows = [row for row in lines(tmp_path / "two") if row["phase"] == "rl"]
    assert [row["server_reloads"] for row in rows] == [0, 1]
    assert all(row["on_policy_gap"] < 1e-4 for row in rows)
    assert not (tmp_path / "two" / "rollout_weights").exists()
    asked = [body["input_ids"] for path, body in server.asked if path == "/generate"]
    again = asked[10:12]  # two sets in two ways, and one update, before it lost them
    assert sorted(again) == sorted(asked[12:14]), "both asked again"
    del asked[10:12]
    alone = DiffusionServer(folder, block=4, mask_id=7, threshold=0.5, eos_id=9)
    with serving(alone) as address:
        new_run(tmp_path / "one", *keys(folder, address, "rl.prompts=3")).execute()
    whole = [body["input_ids"] for path, body in alone.asked if path == "/generate"]
    assert len(asked) == 2 * len(whole)
    for number, prompts in enumerate(whole):
        shares = asked[2 * number : 2 * number + 2]
        assert {len(share) for share in shares} == {len(prompts) // 2}
        assert sorted(shares[0] + shares[1]) == sorted(prompts)


@pytest.mark.slow
def test_a_server_that_dies_while_ranks_wait_ends_them_all_with_one_sentence_and_a_saved_state(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    answer = server.answer

    def dies(path: str, body: Any) -> tuple[int, Any]:
        if path == "/update_weights_from_disk" and server.info["weight_version"].endswith("-1"):
            server.faults = [None, *[HANG_UP] * 99]  # after it was asked whether it has the second update's weights
        return answer(path, body)

    server.answer = dies  # type: ignore[method-assign]
    done = torchrun(2, *ranked(folder, url, tmp_path / "two", "rollout.retries=1"), cwd=tmp_path)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("dllm-kernels: ")]
    assert len(told) == 1, done.stderr[-4000:]
    assert f"rollout.url: {url} did not answer POST /generate in 2 tries" in told[0]
    assert "Traceback" not in done.stderr.partition(told[0])[0]
    saved = latest(tmp_path / "two" / "checkpoints")
    assert saved is not None
    assert (saved.state["phase"], saved.state["step"]) == ("rl", 1)


def test_a_server_that_is_not_there_is_told_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.url: http://127\.0\.0\.1:9 did not answer GET /get_model_info.*refused"):
        setup_of(tmp_path, folder / "nowhere", "http://127.0.0.1:9")


def test_tokens_of_another_policy_are_refused(server: DiffusionServer, url: str, folder: Path, tmp_path: Path) -> None:
    """A server that says that it loaded the weights and did not."""
    server._update = lambda body: (  # type: ignore[method-assign]
        server.info.update(weight_version=body["weight_version"]),
        (200, {"success": True, "message": ""}),
    )[1]
    for more, message in (
        ([], r"the server's tokens are .* nats a token less likely to the model than it expects of its own"),
        (["rollout.logp=true"], r"log-probs are off by .*the engine has other weights"),
    ):
        with pytest.raises(GuardError, match=message):
            learn(peaked(setup_of(tmp_path, folder, url, *more)))


def test_a_server_that_ignores_the_temperature_is_refused(
    server: DiffusionServer, url: str, folder: Path, tmp_path: Path
) -> None:
    """As SGLang's dLLM decoding did before it sampled."""
    server.greedy = True
    with pytest.raises(GuardError, match="every group consists of identical rollouts: the members of a group share"):
        learn(peaked(setup_of(tmp_path, folder, url)))


def test_a_token_that_our_policy_never_draws_is_refused(server: DiffusionServer, url: str, folder: Path, tmp_path: Path) -> None:
    every = "model.facts.suppress=[0,1,2,3,4]"
    with pytest.raises(UserError, match=r"rollout\.url: .* with token \d, which is suppressed here and so has probability 0"):
        learn(setup_of(tmp_path, folder, url, every, "rl.gap_every=0"))


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_log_prob_that_is_not_finite_is_no_chance(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """As heads on a GPU make them, which checks no values: its standard error is infinite too."""
    setup = setup_of(tmp_path, folder, url)
    sampled = engine_of(setup).generate(setup.task.train[:2], noise.sequence_ids(list("ab")))
    broken = replace(sampled, commit_logp_BL=torch.full_like(sampled.commit_logp_BL, value))
    monkeypatch.setattr(engines, "score_rollout", lambda *_, **__: (broken, Gap(math.nan, math.nan, -1, 0)))
    with pytest.raises(GuardError, match="less likely to the model than it expects of its own"):
        engine_of(setup).check(sampled, due=True, replayed=False)


def test_a_bidirectional_model_is_refused(server: DiffusionServer, url: str, folder: Path, tmp_path: Path) -> None:
    given = [key for key in keys(folder, url) if not key.startswith("model.facts.")]
    config = tiny_config(tmp_path, *given)
    with pytest.raises(UserError, match=r"rollout\.engine=sglang is for block-causal models \(SDAR, LLaDA2\)"):
        prepare(config, make_task(config.task, seed=config.seed), Ranks())


CONTRADICTIONS = {
    "rollout.url=null": "url must be given with engine sglang, such as http://node7:30000, got None",
    "rollout.url=node7:30000": "url must be http:// or https://, a host and a port.*got 'node7:30000'",
    "rollout.sampler=sdar": "sampler must be left out with engine sglang, whose server decodes as it was launched to, got sdar",
    "rollout.steps=4": "steps must be left out with engine sglang",
    "rollout.threshold=0.9": "threshold must be left out with engine sglang",
    "rollout.cache=true": "cache must be left out with engine sglang",
    "rollout.micro_batch=2": "micro_batch must be left out with engine sglang",
    "rollout.stop_at_eos=true": "stop_at_eos must be false with step_maps",
    "rollout.step_maps=false": "rl.gap_every must be 0 with rollout.step_maps=false",
    "rollout.step_maps=false rollout.logp=true": "logp must be false without step_maps",
    "rollout.step_maps=false rl.gap_every=0 rl.algorithm=trace_rl": "rollout.step_maps must be true for rl.algorithm trace_rl",
    "rl.algorithm=egspo_sa": "rl.algorithm must be another than egspo_sa with rollout.engine=sglang",
    "model.lora.rank=2": "model.lora.rank must be 0 with rollout.engine=sglang",
    "rollout.engine=vllm": "rollout.engine must be 'ours' or 'sglang', got 'vllm'",
    "rollout.engine=[a]": "rollout.engine must be 'ours' or 'sglang'",
    "rollout.timeout=0": "rollout.timeout must be greater than 0",
}


@pytest.mark.parametrize("given", CONTRADICTIONS)
def test_keys_that_contradict_a_server_are_refused(tmp_path: Path, given: str) -> None:
    known = ["rollout.engine=sglang", "rollout.url=http://x"]
    with pytest.raises(ConfigError, match=CONTRADICTIONS[given]):
        tiny_config(tmp_path, *known, *given.split())


def test_keys_of_a_server_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url must be left out with engine ours, as it is of engine sglang, got http://x"):
        tiny_config(tmp_path, "rollout.url=http://x")


def test_a_layer_that_chooses_another_engine_leaves_the_keys_of_the_first_out(tmp_path: Path) -> None:
    served = tiny_config(tmp_path, "rollout.engine=sglang", "rollout.url=http://x")
    assert (served.rollout.steps, served.rollout.sampler) == (None, "llada"), "the demo's steps are gone"
    text = served.to_yaml()
    assert load_config(base=text, base_name="x").rollout == served.rollout
    own = load_config(overrides=["rollout.engine=ours", "rollout.steps=16", "rollout.block_length=16"], base=text)
    assert (own.rollout.url, own.rollout.steps) == (None, 16)


def test_what_lies_beside_a_checkpoint_asks_no_server(tmp_path: Path) -> None:
    text = tiny_config(tmp_path, "rollout.engine=sglang", "rollout.url=http://x").to_yaml()
    with pytest.raises(ConfigError, match=r"c\.yaml says rollout\.url=http://x, which would send prompts and weights there"):
        load_config(base=text, base_name="c.yaml", base_calls=[])
    assert load_config(overrides=["rollout.url=http://y"], base=text, base_calls=[]).rollout.url == "http://y"
    own = ["rollout.engine=ours", "rollout.steps=16", "rollout.block_length=16"]
    assert load_config(overrides=own, base=text, base_calls=[]).rollout.url is None
