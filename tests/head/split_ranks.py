"""Run by test_vocab_parallel.py in a process of its own, which becomes several: a head split by vocabulary over them.

python -m tests.head.split_ranks STORE WORLD: every rank compares its results with those of the whole head.
"""

import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dllm_kernels import Rows, bgpo_loss, elbo_loss, head_backward, sample_tokens, score_tokens
from dllm_kernels.noise import Stream, row_bits

V, H, N, L = 37, 8, 9, 6
SIZES = {2: (20, 17), 4: (3, 0, 29, 5)}  # not equal, and a rank may hold nothing
EXCLUDED = (0, 1, 2, 21)  # with 4 ranks the first one's ids are all suppressed
VECTORS = ("logp", "entropy", "lse", "top_logp", "top_id")


class Head:
    """The whole head, and this rank's part of it."""

    def __init__(self, group, sizes, valid=None, dtype=torch.float32):
        g = torch.Generator().manual_seed(1)
        rank = dist.get_rank(group)
        self.group, self.ids = group, slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        draw = lambda *size: torch.randn(size, generator=g).to(dtype)  # noqa: E731
        self.hidden, self.weight = draw(2, L, H), draw(V, H)
        self.target, self.rows = torch.tensor([5, 30, 20, 19, 3, 4, 31, 20, 8]), torch.randperm(2 * L, generator=g)[:N]
        self.coef, self.entropy_coef = torch.randn(N, generator=g), torch.randn(N, generator=g)
        self.bias, self.down, self.up = draw(V), draw(2, H), draw(V, 2)
        self.temperature = torch.rand(N, generator=g) + 0.5
        self.valid = valid

    def leaves(self, split):
        """hidden, weight, bias, A, B as leaves: whole ones, or the rank's."""
        found = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "down", "up")}
        for name in ("weight", "bias", "up") if split else ():
            found[name] = found[name][self.ids]
        return {name: tensor.clone().requires_grad_() for name, tensor in found.items()}

    def options(self, leaves, temperature=None):
        adapter = leaves["down"], leaves["up"], 0.5
        found = {"softcap": 4.0, "suppress": EXCLUDED, "bias": leaves["bias"], "low_rank": adapter, "valid_vocab": self.valid}
        return found if temperature is None else {**found, "temperature": temperature}

    def same(self, name, mine, whole, tolerance=2e-5):
        if name in ("weight", "bias", "up"):
            whole = whole[self.ids]
        assert torch.allclose(mine.float(), whole.float(), rtol=tolerance, atol=tolerance), (name, mine, whole)


def score(head, *, frozen, coef, want=VECTORS, plan=None):
    found = []
    for group in (None, head.group):
        leaves = head.leaves(group is not None)
        if frozen:
            leaves = {name: leaf if name == "hidden" else leaf.detach() for name, leaf in leaves.items()}
        known = {"coef": head.coef, "entropy_coef": head.entropy_coef} if coef else {}
        scores = score_tokens(
            leaves["hidden"], leaves["weight"], head.target, rows=head.rows, want=want, vocab_group=group,
            plan=plan, **known, **head.options(leaves, head.temperature),
        )  # fmt: skip
        loss = scores.weighted_sum if coef else (head.coef * scores.logp + head.entropy_coef * scores.entropy).sum()
        if "lse" in want and not coef:
            loss = loss + 0.3 * scores.lse.square().sum()
        loss.backward()
        found.append((scores, loss.detach(), leaves))
    (whole, loss, whole_leaves), (split, split_loss, split_leaves) = found
    for name in want:
        head.same(f"{name}", getattr(split, name), getattr(whole, name))
        if name.endswith("id"):
            assert torch.equal(getattr(split, name), getattr(whole, name))
    head.same("loss", split_loss, loss)
    for name, leaf in split_leaves.items():
        if whole_leaves[name].grad is not None and leaf.numel():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # of a rank whose ids are all excluded
            head.same(name, gradient, whole_leaves[name].grad)


def gradients_in_buffers(head):
    found = []
    for group in (None, head.group):
        leaves = {name: leaf.detach() for name, leaf in head.leaves(group is not None).items()}
        outs = {name: torch.ones(leaf.shape) for name, leaf in leaves.items()}
        dhidden = head_backward(
            leaves["hidden"], leaves["weight"], Rows(head.rows, head.target), head.coef, entropy_coef=head.entropy_coef,
            dweight_out=outs["weight"], dbias_out=outs["bias"], dlow_rank_out=(outs["down"], outs["up"]), vocab_group=group,
            **head.options(leaves, head.temperature),
        )  # fmt: skip
        found.append({**outs, "hidden": dhidden})
    for name, whole in found[0].items():
        head.same(name, found[1][name], whole)


def losses(head):
    masked = torch.rand(2, L, generator=torch.Generator().manual_seed(2)) < 0.6
    target = torch.randint(4, 20, (2, L), generator=torch.Generator().manual_seed(3))
    for loss in ("mean", "sequence", "bgpo", "bgpo off-policy"):
        found = []
        for group in (None, head.group):
            leaves = head.leaves(group is not None)
            more = {"vocab_group": group, **head.options(leaves)}
            if loss.startswith("bgpo"):
                old = None if loss == "bgpo" else torch.tensor([-9.0, -12.0])
                value = bgpo_loss(
                    leaves["hidden"], leaves["weight"], target, masked, 2.0, old, torch.tensor([1.0, -0.5]), 4, **more
                )
            else:
                value = elbo_loss(leaves["hidden"], leaves["weight"], target, masked, 0.5, reduction=loss, **more).sum()
            value.backward()
            found.append((value.detach(), leaves))
        (whole, whole_leaves), (split, split_leaves) = found
        head.same("loss", split, whole)
        for name, leaf in split_leaves.items():
            if leaf.numel():
                head.same(name, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, whole_leaves[name].grad)


def draws(head):
    key = row_bits(3, Stream.TOKEN, torch.arange(N), torch.tensor(0), torch.arange(N))
    for temperature in (0.0, 0.7, 1.0, torch.arange(N) / 4):
        for step in (0, 5):
            leaves, mine = head.leaves(False), head.leaves(True)
            common = {"step": step, "rows": head.rows, "temperature": temperature}
            whole = sample_tokens(leaves["hidden"], leaves["weight"], key, **common, **head.options(leaves))
            split = sample_tokens(mine["hidden"], mine["weight"], key, **common, **head.options(mine), vocab_group=head.group)
            assert torch.equal(split.token, whole.token)
            head.same("logp", split.logp, whole.logp)
            head.same("entropy", split.entropy, whole.entropy)


def refusals(head):
    mine, group = head.leaves(True), head.group
    call = lambda hidden=head.hidden, weight=mine["weight"], target=head.target, **more: score_tokens(  # noqa: E731
        hidden, weight, target, rows=head.rows, **{"vocab_group": group, **more}
    )
    with pytest.raises(TypeError, match="vocab_group must be a torch"):
        call(vocab_group="tp")
    with pytest.raises(ValueError, match=r"target must hold ids in 0\.\.36, got 37"):
        call(target=torch.full((N,), 37))
    with pytest.raises(ValueError, match="id 20 has probability 0"):
        call(suppress=(20,))
    with pytest.raises(ValueError, match=r"suppress must hold ids in 0\.\.36, got 99"):
        call(suppress=(99,))
    with pytest.raises(ValueError, match="got different first rows"):
        call(hidden=head.hidden + dist.get_rank(group))
    with pytest.raises(ValueError, match="plan must not be 'coef'"):
        call(plan="coef", coef=head.coef)
    with pytest.raises(ValueError, match="vocab_group goes with target alone"):
        call(target=None, want_top=2)
    with pytest.raises(ValueError, match="take_dweight must be None"):
        call(take_dweight=print)
    with pytest.raises(ValueError, match="top_k, top_p, min_p and want must be left out"):
        sample_tokens(head.hidden, mine["weight"], head.target, rows=head.rows, top_k=3, vocab_group=group)
    masked = torch.ones(2, L, dtype=torch.bool)
    with pytest.raises(ValueError, match="label_smoothing must be 0 with vocab_group"):
        elbo_loss(head.hidden, mine["weight"], torch.ones(2, L).long(), masked, 0.5, label_smoothing=0.1, vocab_group=group)


def sharded_tensors(world):
    """A DTensor over just the group is this rank's rows; without a group it stays data-parallel, and so is refused here."""
    mesh = init_device_mesh("cpu", (world,))
    group = mesh.get_group()
    generator = torch.Generator().manual_seed(5)
    weight, hidden = torch.randn(V, H, generator=generator), torch.randn(4, H, generator=generator)
    target = torch.tensor([0, 36, 18, 19])
    shard = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    whole = weight.clone().requires_grad_()
    expected = score_tokens(hidden, whole, target).logp
    expected.sum().backward()
    got = score_tokens(hidden, shard, target, vocab_group=group).logp
    got.sum().backward()
    assert torch.allclose(got, expected, atol=1e-5)
    assert isinstance(shard.grad, DTensor)
    assert torch.allclose(shard.grad.full_tensor(), whole.grad, atol=1e-5)
    with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor"):
        score_tokens(hidden, shard, target)
    with pytest.raises(ValueError, match=r"placement Shard\(0\) on the one-dimensional mesh of vocab_group"):
        score_tokens(hidden, distribute_tensor(weight, mesh, [Replicate()]), target, vocab_group=group)
    if world == 4:  # data parallel x vocabulary parallel
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
        part = square["vocabulary"]
        both = distribute_tensor(weight, square, [Replicate(), Shard(0)])
        with pytest.raises(ValueError, match="on a mesh of more dimensions pass the local rows"):
            score_tokens(hidden, both, target, vocab_group=part.get_group())
        mine = weight.split(19)[part.get_local_rank()]
        batch = hidden + square["data"].get_local_rank()  # another one in each replica
        logp = score_tokens(batch, mine, target, vocab_group=part.get_group()).logp
        assert torch.allclose(logp, score_tokens(batch, weight, target).logp, atol=1e-5)


def run(rank: int, store: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    head = Head(dist.group.WORLD, SIZES[world], valid=32)  # of four ranks the last one's ids are beyond
    draws(head)
    gradients_in_buffers(head)
    head = Head(dist.group.WORLD, SIZES[world])
    score(head, frozen=False, coef=False)
    score(head, frozen=False, coef=True)
    score(head, frozen=False, coef=False, want=("logp", "entropy"), plan="recompute")
    score(head, frozen=True, coef=False)
    gradients_in_buffers(head)
    losses(head)
    draws(head)
    refusals(head)
    sharded_tensors(world)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    store, world = sys.argv[1], int(sys.argv[2])
    context = multiprocessing.get_context("fork")  # torch is imported once
    ranks = [context.Process(target=run, args=(rank, store, world)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    sys.exit(any(process.exitcode != 0 for process in ranks))
