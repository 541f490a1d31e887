"""Who does what; what needs several processes is in tests/model/test_sharded.py."""

import socket
import subprocess
import sys

import pytest
import torch
from dllm_trainer import distributed
from dllm_trainer.distributed import OtherRankError, Ranks, clip_gradients, find_blocks, layers, shard, start
from dllm_trainer.errors import UserError
from dllm_trainer.models.loading import load

from tests.tiny import eurobert
from tests.trainer.models.tiny_checkpoints import write


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 16])
def test_shares_are_even_contiguous_and_together_everything(count, size):
    shares = [list(range(count))[Ranks(rank, size).share(count)] for rank in range(size)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = start()
    assert (ranks.rank, ranks.size, ranks.group, ranks.is_first) == (0, 1, None, True)
    values = torch.arange(3)
    assert ranks.gather(values) == (values, slice(0, 3))
    assert ranks.tell("x") == ["x"]
    assert ranks.total(2) == 2.0
    ranks.wait()


def test_alone_nothing_is_sharded_and_errors_are_what_they_are():
    model = eurobert()
    assert shard(model, Ranks()) is model
    assert type(model).__name__ == "EuroBertForMaskedLM"
    with pytest.raises(KeyError), Ranks().together():
        raise KeyError("x")
    with pytest.raises(KeyError), distributed.one_fails_all_stop(Ranks()):
        raise KeyError("x")


class Second(Ranks):
    """Rank 1 of two, of which rank 0 has failed with a sentence."""

    def tell(self, value):
        return ["the server died", value]


def test_of_several_ranks_that_fail_with_a_sentence_the_first_tells_it():
    with pytest.raises(OtherRankError, match=r"^rank 0: the server died$"), Second(1, 2).together():
        raise UserError("the server died too")
    with pytest.raises(OtherRankError, match=r"^rank 0: the server died$"), Second(1, 2).together():
        pass
    with pytest.raises(KeyError), Second(1, 2).together():  # a bug is never hidden
        raise KeyError("x")


def test_clipping_returns_the_norm_before():
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.full((2, 2), 2.0)
    assert clip_gradients(model, 1.0) == pytest.approx(4.0)
    assert float(model.weight.grad.norm()) == pytest.approx(1.0)


def test_the_blocks_are_the_outermost_list_with_most_parameters(tmp_path):
    for kind, path in (("llada", "model.transformer.blocks"), ("llada2", "model.layers")):  # not the experts inside
        write(kind, tmp_path / kind)
        assert find_blocks(load(tmp_path / kind, trust_remote_code=True).model)[0] == path
    with pytest.raises(UserError, match=r"model must keep its transformer blocks in a torch\.nn\.ModuleList, Linear has none"):
        find_blocks(torch.nn.Linear(2, 2))


def test_the_layers_of_every_outermost_list_are_sharded_one_by_one():
    model = torch.nn.Module()
    model.encoder = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Dropout()])  # no parameters: nothing to shard
    model.decoder = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))])
    assert layers(model) == [model.encoder[0], model.decoder[0]]


def torchrun(mode):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run([*command, "-m", "tests.trainer.torchrun_job", mode], capture_output=True, text=True, timeout=800)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_ends_them_all_when_one_fails():
    done = torchrun("go")
    assert (done.returncode, done.stdout.strip()) == (0, "2 3.0"), done.stderr[-2000:]
    failed = torchrun("fail")
    assert failed.returncode != 0
    assert "dllm-kernels: the loss became nan" in failed.stderr
    assert failed.stdout == ""


@pytest.mark.parametrize("address", ["taken", "missing", "not a number"])
def test_ranks_that_cannot_meet_say_so_in_a_sentence(address, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        port = {"taken": str(taken.getsockname()[1]), "not a number": "x", "missing": None}[address]
        monkeypatch.delenv("MASTER_PORT", raising=False)
        if port is not None:
            monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=r"^rank 0 cannot meet the others at 127\.0\.0\.1:"):
            distributed.start()
