"""SGLang's HTTP API against a server written from its documents: tokens, states, log-probs, and whatever can go wrong."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dllm_trainer.models.loading import load

from dllm_kernels import Rollout, generate, trajectory_rows
from dllm_kernels.integrations import sglang
from dllm_kernels.integrations.foreign_rollouts import score_rollout
from dllm_kernels.integrations.sglang import OtherWeightsError, ServerError, SGLang
from tests.integrations.sglang_server import CUT, HANG_UP, DiffusionServer, serving
from tests.tiny import checkpoint

BLOCK = 4
PROMPTS = [[1, 2, 3], [4, 0, 2, 3, 1, 1, 2], [5, 5], [1, 2, 3, 4]]
FACTS = {"topology": "block_causal", "block_length": BLOCK, "attention_mask": "float"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "m", alphabet="01234=")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder, facts=FACTS)


@pytest.fixture
def server(folder: Path, loaded: Any) -> DiffusionServer:
    return DiffusionServer(folder, block=BLOCK, mask_id=loaded.facts.mask_id, threshold=0.2, eos_id=loaded.facts.eos_id)


@pytest.fixture
def client(server: DiffusionServer) -> Iterator[SGLang]:
    with serving(server) as url:
        yield SGLang(url, timeout=300.0, retries=2, backoff=0.01)


def ask(client: SGLang, loaded: Any, **options: Any) -> Rollout:
    known = {"mask_id": loaded.facts.mask_id, "vocabulary": loaded.model.config.vocab_size, "causal_block": BLOCK}
    return client.generate(PROMPTS, **{"length": 7, **known, **options})


def test_greedy_tokens_and_steps_are_those_of_generate(client: SGLang, loaded: Any) -> None:
    """Prompts of every length modulo the block; what lies between a completion and its block's end is kept."""
    told = ask(client, loaded, temperature=0.0)
    options = {"sampler": "llada2", "threshold": 0.2, "block_length": BLOCK, "suppress": loaded.suppressed}
    ours = generate(loaded.model, [torch.tensor(p) for p in PROMPTS], length=7, mask_id=loaded.facts.mask_id, **options)
    assert torch.equal(told.completion_BL, ours.completion_BL)
    assert torch.equal(told.commit_step_BL, ours.commit_step_BL)
    assert torch.equal(told.steps_B, ours.steps_B)
    assert told.unscored
    for step in range(int(ours.steps_B.max())):
        assert torch.equal(told.state_at(step)[told.attention_mask_BS], ours.state_at(step)[ours.attention_mask_BS])
    scored, gap = score_rollout(loaded.model, told, suppress=(*loaded.suppressed, loaded.facts.mask_id))
    assert gap.tokens == 0
    torch.testing.assert_close(scored.commit_logp_BL, ours.commit_logp_BL, rtol=0, atol=1e-5)


def test_drawn_tokens_have_the_log_probs_that_the_server_tells(client: SGLang, loaded: Any, server: DiffusionServer) -> None:
    told = ask(client, loaded, temperature=1.0, logp=True)
    _, gap = score_rollout(loaded.model, told, suppress=(*loaded.suppressed, loaded.facts.mask_id), bound=1e-4)
    assert gap.tokens >= 7 * len(PROMPTS)
    again = ask(client, loaded, temperature=1.0)
    assert not torch.equal(told.completion_BL, again.completion_BL), "the server draws anew"
    (_, body), *_ = [asked for asked in server.asked if asked[0] == "/generate"]
    assert {(p["temperature"], p["top_p"], p["top_k"], p["min_p"]) for p in body["sampling_params"]} == {(1.0, 1.0, -1, 0.0)}
    ends = [len(prompt) + p["max_new_tokens"] for prompt, p in zip(PROMPTS, body["sampling_params"], strict=True)]
    assert all(end % BLOCK == 0 for end in ends)


def test_ids_alone_have_no_states(client: SGLang, loaded: Any, server: DiffusionServer) -> None:
    server.step_maps = False  # refuses to be asked for them
    with pytest.raises(ServerError, match=r"HTTP 400.*return_step_maps"):
        ask(client, loaded)
    told = ask(client, loaded, step_maps=False, stop_id=loaded.facts.eos_id)
    assert (told.stepless, told.unscored, told.completion_BL.shape) == (True, True, (4, 7))
    ends = (told.completion_BL == loaded.facts.eos_id).cumsum(-1) > 0
    assert bool((told.completion_BL[ends] == loaded.facts.eos_id).all()), "filled up with EOS"
    for replay in (trajectory_rows, lambda rollout: rollout.state_at(0), lambda rollout: rollout.to_jsonl("x")):
        with pytest.raises(ValueError, match="rollout must have a step map, got one whose engine gave ids alone"):
            replay(told)


def test_weights_are_loaded_and_answers_of_others_refused(client: SGLang, loaded: Any, folder: Path, tmp_path: Path) -> None:
    assert client.model_info()["weight_version"] == "default"
    with pytest.raises(OtherWeightsError, match=r"answered with weights default, and was told to load a-1: it was started anew"):
        ask(client, loaded, version="a-1")
    before = ask(client, loaded, temperature=0.0)
    other = load(folder, facts=FACTS).model
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(-1.0)
    shutil.copytree(folder, tmp_path / "new")
    other.save_pretrained(tmp_path / "new")
    client.load(str(tmp_path / "new"), "a-1")
    after = ask(client, loaded, temperature=0.0, version="a-1")
    assert not torch.equal(before.completion_BL, after.completion_BL)
    assert score_rollout(other, after, bound=1e-4)[0].unscored is False
    with pytest.raises(ServerError, match=r"did not load the weights of /nowhere: Failed to get.*must see that folder under"):
        client.load("/nowhere", "a-2")


def test_what_passes_is_tried_again(client: SGLang, loaded: Any, server: DiffusionServer) -> None:
    server.faults = [503, HANG_UP]
    ask(client, loaded)
    assert not server.faults
    server.faults = [HANG_UP, 500, 502]
    with pytest.raises(ServerError, match=r"did not answer POST /generate in 3 tries and \d+ s \(HTTP 502.*\): the server died"):
        ask(client, loaded)


def test_a_dead_or_slow_server_is_told(server: DiffusionServer, loaded: Any) -> None:
    with serving(server) as url:
        slow = SGLang(url, timeout=0.05, retries=0)
        with server.lock, pytest.raises(ServerError, match=r"did not answer GET /get_model_info in 1 tries.*timed out"):
            slow.model_info()
    with pytest.raises(ServerError, match=r"in 2 tries.*Connection refused.*the server died, is overloaded, or is not there"):
        ask(SGLang(url, retries=1, backoff=0.01), loaded)


def test_an_answer_that_never_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes come in time, one by one: by the clock of this test half a minute passes between any two looks at it."""
    monkeypatch.setattr(sglang, "time", SimpleNamespace(monotonic=itertools.count(step=30).__next__))

    def drip(listening: socket.socket) -> None:
        connection = listening.accept()[0]
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n ")
            while connection.recv(1000):  # until the client hangs up
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        client = SGLang(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=20.0, retries=0)
        with pytest.raises(ServerError, match=r"did not answer GET /get_model_info in 1 tries.*in the middle of an answer"):
            client.model_info()


def test_an_answer_that_is_cut_short_is_asked_for_again(client: SGLang, loaded: Any, server: DiffusionServer) -> None:
    server.faults = [CUT]
    ask(client, loaded)
    assert not server.faults


def altered(**changes: Any) -> Any:
    """A fault: the first answer with other values; None leaves one out."""

    def change(answers: Any) -> Any:
        meta = {**answers[0]["meta_info"], **{key: value for key, value in changes.items() if key != "output_ids"}}
        first = {**answers[0], "meta_info": {key: value for key, value in meta.items() if value is not None}}
        if "output_ids" in changes:
            first["output_ids"] = changes["output_ids"]
        return [first, *answers[1:]]

    return change


NONSENSE = {
    "no json": (b"<html>", r"/generate must answer with JSON, got <html>: this is no SGLang server"),
    "nested": (b"[" * 100_000, r"/generate must answer with JSON, got \[\[\["),
    "another object": (b'{"error": "x"}', r"must answer each of the 4 prompts, got \{\"error\": \"x\"\}"),
    "too few": (lambda answers: answers[1:], "must answer each of the 4 prompts, got 3 answers"),
    "no meta": (lambda answers: [{"output_ids": []}] * 4, "must answer with output_ids and meta_info"),
    "text alone": (altered(output_ids=None), "output_ids, a list of token ids, got null"),
    "texts": (altered(output_ids=["a"]), r"output_ids, a list of token ids, got \[\"a\"\]"),
    "unknown id": (altered(output_ids=[1, 99]), "prompt 0 with token 99, of a vocabulary of 10: it serves another model"),
    "negative id": (altered(output_ids=[-1]), "prompt 0 with token -1, of a vocabulary"),
    "undecided": (altered(output_ids=[7] * 9), "with the mask token 7: a place was left undecided"),
    "short": (altered(output_ids=[1, 2]), r"prompt 0 with 2 tokens, and 9 were asked for \(finish_reason .*length"),
    "a cut prompt": (altered(prompt_tokens=2), "answered a prompt of 2 tokens where prompt 0 of 3 was asked: it cuts prompts"),
    "another order": (lambda answers: answers[::-1], "a prompt of 4 tokens where prompt 0 of 3 was asked: .* another order"),
    "given up": (altered(finish_reason={"type": "abort", "message": "no memory"}), "gave up prompt 0: .*no memory"),
    "no steps": (altered(step_maps=None), "without meta_info.step_maps: it takes an SGLang with pull request 27943"),
    "few steps": (altered(step_maps=[1]), "step_maps of prompt 0 must have one entry for each of 9 tokens, got 1"),
    "from 0": (altered(step_maps=[0] * 9), "must be steps of a block, from 1 to 4, got"),
    "of the sequence": (altered(step_maps=[1, 2, 3, 4, 5, 6, 7, 8, 9]), "must be steps of a block, from 1 to 4, got"),
    "a gap": (altered(step_maps=[2] * 9), "no rollout: step_map.0. must have no gaps, but nothing is set in step 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_named(client: SGLang, loaded: Any, server: DiffusionServer, kind: str) -> None:
    fault, message = NONSENSE[kind]
    server.faults = [fault]
    with pytest.raises(ServerError, match=message):
        ask(client, loaded)
    assert len([path for path, _ in server.asked if path == "/generate"]) <= 1, "and is not asked for again"


def test_a_token_that_is_suppressed_here_is_named(client: SGLang, loaded: Any) -> None:
    token = int(ask(client, loaded, temperature=0.0).completion_BL[0, 0])
    with pytest.raises(ServerError, match=f"prompt 0 with token {token}, which is suppressed here and so has probability 0"):
        ask(client, loaded, temperature=0.0, suppress=(token,))


def test_log_probs_of_other_tokens_are_named(client: SGLang, loaded: Any, server: DiffusionServer) -> None:
    for told in (None, [[-0.1, 3, None]], "none", [[-0.1, 3, None]] * 9):
        server.faults = [altered(output_token_logprobs=told)]
        with pytest.raises(ServerError, match=r"output_token_logprobs of prompt 0 must be \(log-prob, id, text\) of each token"):
            ask(client, loaded, logp=True)


def test_versions_that_only_the_model_info_tells_are_looked_up(client: SGLang, loaded: Any, server: DiffusionServer) -> None:
    server.info["weight_version"] = "a-1"
    server.faults = [altered(weight_version=None)]
    ask(client, loaded, version="a-1")
    assert [path for path, _ in server.asked] == ["/generate", "/get_model_info"]
    server.faults = [altered(weight_version=None), lambda info: {**info, "weight_version": "b"}]
    with pytest.raises(OtherWeightsError, match="answered with weights b, and was told to load a-1"):
        ask(client, loaded, version="a-1")
    server.faults = [None, lambda info: {}]
    with pytest.raises(OtherWeightsError, match="answered with weights null"):
        client.load(server.info["model_path"], "a-2")


NO_ADDRESS = ("node7:30000", "http://", "http://[::1", "http://node7:port", "http://node7:70000", "http://node 7", "http://x/\n")


def test_arguments_are_checked(client: SGLang, loaded: Any) -> None:
    for options, message in (
        *(({"url": url}, f"url must be http:// or https://, a host.* got {re.escape(repr(url))}") for url in NO_ADDRESS),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"backoff": 0.0}, "backoff"),
    ):
        with pytest.raises(ValueError, match=message):
            SGLang(**{"url": "http://x", **options})
    with pytest.raises(ValueError, match="stop_id must be None with step_maps, got 9"):
        ask(client, loaded, stop_id=9)
    with pytest.raises(ValueError, match="logp must be False without step_maps"):
        ask(client, loaded, logp=True, step_maps=False)
