"""In DDP, under FSDP2 and in DeepSpeed's engine, an optimizer step by `headless` is the one that plain cross-entropy on logits
makes in the same wrapper, before and after `accumulate`, which sums over the ranks and leaves the wrapper as it found it.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from dllm_kernels import headless
from tests.model.wrapped_ranks import CASES, DEEPSPEED, FSDP2
from tests.tiny import eurobert

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.timeout(1200),
]
QUICK = [name for name in ("ddp bias, unused", "fsdp2 tied, accumulation") if name in CASES]


def run(folder, size, names):
    command = [sys.executable, "-m", "tests.model.wrapped_ranks", str(folder / "out"), str(size), *names]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1150, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out", weights_only=False)


def check(ranks, names):
    for found in ranks:
        for name in names:
            largest = (CASES | DEEPSPEED)[name][-1]
            steps = found[name]
            assert steps["moved"] > 0.02, name
            assert all(difference < largest for key, difference in steps.items() if key != "moved"), (name, steps)


def check_fits(ranks):
    """`fit_passes` under a wrapper finds what it finds without one, on all ranks, and the step after it is as before."""
    for found in (rank["fitted"] for rank in ranks):
        plain = found["plain"][0]
        for kind in ("ddp", *(["fsdp2"] if FSDP2 else [])):
            (_, want, _), (fit, got, same) = found[kind, False], found[kind, True]
            assert fit == plain
            assert same
            assert all(torch.equal(want[name], got[name]) for name in want)


def check_refusals(found, said):
    assert found.keys() == said.keys()
    for name, pattern in said.items():
        assert found[name] is not None, name
        assert re.search(pattern, found[name]), (name, found[name])


def test_steps_in_ddp_and_fsdp2_equal_plain_cross_entropy_and_what_cannot_be_right_is_refused(tmp_path):
    ranks = run(tmp_path, 2, [*QUICK, *(["in backward"] if FSDP2 else []), "reference", "fitted", "patched", "refusals"])
    check(ranks, QUICK)
    check_fits(ranks)
    assert all(difference < 1e-6 < 0.02 < moved for difference, moved in ranks[0]["patched"].values())
    *differences, moved = ranks[0]["reference"].values()
    assert max(differences) < 1e-6 < 0.1 < moved
    said = {
        "beside ddp": r"inside its DistributedDataParallel",
        "beside ddp, frozen body": r"inside its DistributedDataParallel",
        "fsdp1": r"FullyShardedDataParallel.*FSDP2",
        "inside fsdp1": r"FullyShardedDataParallel",
        "composed": r"composable replicate",
        "data parallel": r"DataParallel.*use DistributedDataParallel",
        "head of tensor parallelism": r"fully_shard.*where its head is sharded.*vocab_group=",
        "tensor parallel body": r"fully_shard.*alone for accumulate.*tensor parallelism hold the same data",
    }
    if FSDP2:
        said |= {"late": r"backward must run inside", "waiting": r"not reduced yet"}
        said["stepped"] = r"no optimizer may step"
        said["tied, in backward"] = r"tied head with an optimizer in backward"
        assert ranks[0]["in backward"]["steps"] < 1e-6
        assert ranks[0]["in backward"]["moved"] > 0.02
    check_refusals(ranks[0]["refusals"], said)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_steps_in_every_setting_of_a_wrapper_equal_plain_cross_entropy(tmp_path, kind, size):
    names = [name for name in CASES if name.startswith(kind)]
    check(run(tmp_path, size, names), names)


@pytest.mark.slow
@pytest.mark.skipif(not FSDP2, reason="FSDP2 of torch 2.6 wants streams that a CPU has not")
def test_steps_under_fsdp2_and_tensor_parallelism_equal_plain_cross_entropy_and_one_process(tmp_path):
    for differences, moved, said in (found["two dimensions"] for found in run(tmp_path, 4, ["two dimensions"])):
        assert all(difference < 1e-6 for difference in differences.values()), differences
        assert moved > 0.02
        assert re.search(r"alone for accumulate", str(said))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed")
@pytest.mark.parametrize("size", [2, 4])
def test_steps_in_deepspeed_equal_plain_cross_entropy_and_what_cannot_be_right_is_refused(tmp_path, size):
    ranks = run(tmp_path, size, [*DEEPSPEED, "deepspeed refusals"])
    check(ranks, list(DEEPSPEED))
    said = {
        "beside": r"inside its DeepSpeedEngine",
        "stage 3": r"ZeRO stage 3.*stage 1 or 2",
        "accumulate": r"DeepSpeedEngine for accumulate",
        "backward of its own": r"must be engine.backward",
    }
    check_refusals(ranks[0]["deepspeed refusals"], said)


@pytest.mark.skipif(not FSDP2, reason="torch 2.6 cannot compile the masks of transformers 5")
def test_ten_contexts_of_a_compiled_model_are_one_graph():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(eurobert(), backend=backend)
    for _ in range(10):
        with headless(compiled) as body:
            body(torch.tensor([[1, 2, 3]])).sum().backward()
    assert len(graphs) == 1
