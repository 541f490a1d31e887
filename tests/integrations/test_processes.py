"""Two processes of another's trainer, under DDP, take the steps of one, and those of plain cross-entropy in the same wrapper."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2800)]  # every run imports the trainer anew in each process
ROOT = Path(__file__).resolve().parents[2]


def run(kind: str, world: int, out: Path, **options) -> tuple[torch.Tensor, object]:
    out.mkdir()
    common = {"OMP_NUM_THREADS": "1"}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.integrations.ranks", kind, str(out), json.dumps(options)]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    logs = [out / f"rank{rank}" for rank in range(world)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | common | place, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for place, log in zip(places, logs, strict=True)
    ]
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(codes), "\n".join(log.read_text()[-2000:] for log in logs)
    return torch.load(out / "found", weights_only=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"ddp_find_unused_parameters": False, "reduction": "sequence", "samples": 2, "law": "antithetic"}],
    ids=["unused parameters are looked for", "and are not"],
)
def test_sft_of_transformers(options, tmp_path):
    one = run("sft", 1, tmp_path / "one", **options)
    two = run("sft", 2, tmp_path / "two", **options)
    plain = run("sft", 2, tmp_path / "plain", plain=True, **options)
    assert_close(two[0], one[0], rtol=0, atol=1e-6)
    assert_close(two[0], plain[0], rtol=0, atol=1e-6)
    assert two[1] == pytest.approx(one[1], abs=1e-6), "seven sequences: one is there twice, and counted once"


def test_sft_of_a_block_causal_model(tmp_path):
    one, two = (run("sft", world, tmp_path / str(world), causal_block=2, law="exact") for world in (1, 2))
    assert_close(two[0], one[0], rtol=0, atol=1e-6)
    assert two[1] == pytest.approx(one[1], abs=1e-6)


@pytest.mark.parametrize("algorithm", ["bgpo", "rspo"])
def test_grpo_of_trl(algorithm, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'dllm-kernels[integrations]'")
    checkpoint(tmp_path / "model", alphabet="01234=")
    options = {"algorithm": algorithm, "max_steps": 2, "learning_rate": 0.01}
    one, two = (run("grpo", world, tmp_path / str(world), **options) for world in (1, 2))
    assert_close(two[0], one[0], rtol=0, atol=1e-5)
    assert two[1] == pytest.approx(one[1], abs=1e-5)
