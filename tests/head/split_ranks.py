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
        self.weight[[33, 24, 36]] = self.weight[[7, 10, 10]]  # equal logits on several ranks
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


def several(head, want_top, known):
    """Ids of a row, on any rank and twice, and the likeliest ones, equal ones among them."""
    ids = torch.randint(3, 20, (N, 4), generator=torch.Generator().manual_seed(6))
    ids[:, 1], ids[:, 3] = head.target, 31
    found = []
    for group in (None, head.group):
        leaves = head.leaves(group is not None)
        for name in ("bias", "up"):  # equal logits need equal ones
            leaves[name].data.zero_() if name == "bias" else leaves[name].data.fill_(0.1)
        coef = torch.randn(N, 5, generator=torch.Generator().manual_seed(7))
        more = {"coef": coef, "entropy_coef": head.entropy_coef} if known else {}
        scores = score_tokens(
            leaves["hidden"], leaves["weight"], head.target, ids=ids, want_top=want_top, rows=head.rows,
            want=("logp", "lse", "top_logp", "top_id"), vocab_group=group, **more, **head.options(leaves, head.temperature),
        )  # fmt: skip
        loss = scores.weighted_sum
        if not known:
            loss = (coef[:, 0] * scores.logp + 0.2 * scores.lse).sum() + (coef[:, 1:] * scores.ids_logp).sum()
            if want_top:
                loss = loss + (scores.best_logp * (1 + torch.arange(want_top))).sum()
        loss.backward()
        found.append((scores, loss.detach(), leaves))
    (whole, loss, whole_leaves), (split, split_loss, split_leaves) = found
    for name in ("logp", "ids_logp", "lse", "top_logp", *(("best_logp",) if want_top else ())):
        head.same(name, getattr(split, name), getattr(whole, name))
    assert torch.equal(split.top_id, whole.top_id)
    if want_top:
        assert torch.equal(split.best_id, whole.best_id)
        assert bool((split.best_logp.diff(dim=1) <= 0).all())
    head.same("loss", split_loss, loss)
    for name, leaf in split_leaves.items():
        if leaf.numel():
            head.same(name, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, whole_leaves[name].grad)


def likeliest_alone(head):
    mine = head.leaves(True)
    arguments = {"want_top": 3, "rows": head.rows, "suppress": EXCLUDED}
    found = score_tokens(mine["hidden"], mine["weight"], vocab_group=head.group, **arguments)
    whole = score_tokens(head.hidden, head.weight, **arguments)
    assert found.logp is None
    assert torch.equal(found.best_id, whole.best_id)


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
    for loss in ("mean", "sequence", "smooth mean", "smooth none", "bgpo", "bgpo off-policy"):
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
                if loss.startswith("smooth"):  # of logits that are linear in the weight
                    more |= {"softcap": None, "label_smoothing": 0.2}
                reduction = loss.split()[-1]
                value = elbo_loss(leaves["hidden"], leaves["weight"], target, masked, 0.5, reduction=reduction, **more).sum()
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


FILTERS = (
    {"top_k": 1}, {"top_k": 3}, {"top_k": 30}, {"top_k": 100}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 1 - 1e-12},
    {"min_p": 0.2}, {"min_p": 1.0}, {"top_k": 9, "top_p": 0.8}, {"top_k": 4, "top_p": 0.8, "top_p_first": True},
    {"top_k": 9, "top_p": 0.6, "min_p": 0.3},
)  # fmt: skip


def restricted_draws(head):
    key = row_bits(3, Stream.TOKEN, torch.arange(N), torch.tensor(0), torch.arange(N))
    mixed = torch.tensor([0.0, 0.3, 1.0, 2.5, 1.0, 1.0, 0.7, 3.0, 9.0])
    for filters in FILTERS:
        for temperature in (0.0, 1.5, mixed):
            leaves, mine = head.leaves(False), head.leaves(True)
            common = {"rows": head.rows, "temperature": temperature, **filters}
            whole = sample_tokens(leaves["hidden"], leaves["weight"], key, **common, **head.options(leaves))
            split = sample_tokens(mine["hidden"], mine["weight"], key, **common, **head.options(mine), vocab_group=head.group)
            assert torch.equal(split.token, whole.token), (filters, temperature)
            head.same("logp", split.logp, whole.logp)


def draws_among_equals(head):
    """All logits are equal, so which ids are left is known: the smallest that are not excluded."""
    rows, weight = 40, head.weight[head.ids].clone()
    key = row_bits(4, Stream.TOKEN, torch.arange(rows), torch.tensor(0), torch.arange(rows))
    for dtype in (torch.float32, torch.float64):
        hidden = torch.zeros(rows, H, dtype=dtype)
        for filters, left in (({"top_k": 21}, 21), ({"top_p": 0.5}, 16), ({"top_p": 0.51}, 17), ({"min_p": 1.0}, 32)):
            more = {**filters, "suppress": (0, 1, 2, 21, 22)}  # 32 ids are left
            split = sample_tokens(hidden, weight.to(dtype), key, vocab_group=head.group, **more).token
            assert torch.equal(split, sample_tokens(hidden, head.weight.to(dtype), key, **more).token), filters
            assert int(split.max()) <= sorted(set(range(V)) - {0, 1, 2, 21, 22})[left - 1]


def ranks_without_an_id(head):
    """They put nothing of their own into a result, rows that nobody scores included, and `backward` runs there too."""
    rows, target = torch.arange(1, 2 * L), torch.arange(2 * L - 1) % 3
    suppress = tuple(range(SIZES[dist.get_world_size(head.group)][0], V))  # all but the first rank's
    masked = torch.ones(2, L, dtype=torch.bool)
    masked[0, 0] = False
    for trained in (("weight",), ("up",), ("hidden", "down")):
        for smoothing in (None, 0.2):
            found = []
            for group in (None, head.group):
                leaves = {name: x if name in trained else x.detach() for name, x in head.leaves(group is not None).items()}
                hidden = leaves["hidden"].clone()
                hidden[0, 0] = torch.nan
                common = {"suppress": suppress, "vocab_group": group, "low_rank": (leaves["down"], leaves["up"], 0.5)}
                if smoothing is None:
                    loss = score_tokens(hidden, leaves["weight"], target, rows=rows, **common).logp.sum()
                else:
                    common["label_smoothing"] = smoothing
                    loss = elbo_loss(hidden, leaves["weight"], torch.ones(2, L).long(), masked, 0.5, **common)
                loss.backward()
                found.append((loss.detach(), leaves))
            (whole, whole_leaves), (split, split_leaves) = found
            head.same("loss", split, whole)
            for name in trained:
                if split_leaves[name].numel():
                    head.same(name, split_leaves[name].grad, whole_leaves[name].grad)


def refusals(head):
    mine, group = head.leaves(True), head.group
    call = lambda hidden=head.hidden, weight=mine["weight"], target=head.target, **more: score_tokens(  # noqa: E731
        hidden, weight, target, rows=head.rows, **{"vocab_group": group, **more}
    )
    with pytest.raises(TypeError, match="vocab_group must be a torch"):
        call(vocab_group="tp")
    with pytest.raises(ValueError, match=r"target must hold ids in 0\.\.36, got 37"):
        call(target=torch.full((N,), 37))
    with pytest.raises(ValueError, match=r"target or ids must not hold .* id 20 has probability 0"):
        call(ids=torch.full((N, 2), 20), suppress=(20,))
    with pytest.raises(ValueError, match=r"suppress must hold ids in 0\.\.36, got 99"):
        call(suppress=(99,))
    with pytest.raises(ValueError, match="got different first rows"):
        call(hidden=head.hidden + dist.get_rank(group))
    with pytest.raises(ValueError, match="plan must not be 'coef'"):
        call(plan="coef", coef=head.coef)
    with pytest.raises(ValueError, match=r"want_top must be in 0\.\.37"):
        call(want_top=38)
    with pytest.raises(ValueError, match="take_dweight must be None"):
        call(take_dweight=print)
    with pytest.raises(ValueError, match="want must be empty with vocab_group"):
        sample_tokens(head.hidden, mine["weight"], head.target, rows=head.rows, want=("margin",), vocab_group=group)


def what_one_rank_refuses(head):
    """Every rank raises it, none waits for the one that raised, and the next call is right."""
    group, last = head.group, dist.get_world_size(head.group) - 1
    mine, wrong = head.leaves(True), dist.get_rank(head.group) == last
    weight = mine["weight"].detach()
    outs = {"dweight_out": torch.zeros(len(weight) + wrong, H)}
    key = row_bits(3, Stream.TOKEN, torch.arange(N), torch.tensor(0), torch.arange(N))
    score = lambda weight=weight, **more: score_tokens(head.hidden, weight, head.target, rows=head.rows, **more)  # noqa: E731
    draw = lambda weight=weight, **more: sample_tokens(head.hidden, weight, key, rows=head.rows, **more)  # noqa: E731
    back = lambda **more: head_backward(head.hidden, weight, Rows(head.rows, head.target), head.coef, **more)  # noqa: E731
    masked = torch.ones(2, L, dtype=torch.bool)
    loss = lambda **more: elbo_loss(head.hidden, weight, torch.ones(2, L).long(), masked, 0.5, **more)  # noqa: E731
    bad = weight.double() if wrong else weight
    broken = weight * torch.nan if wrong else weight
    bias = {"bias": torch.zeros(len(weight) + wrong)}
    for call, more, kind, sentence in (
        (score, {"weight": bad}, TypeError, "weight must have hidden's dtype"),
        (score, {"weight": broken}, ValueError, "must give finite logits"),
        (score, {"weight": broken, "want_top": 2}, ValueError, "must give finite logits"),
        (score, bias, ValueError, "bias must have shape"),
        (score, {"want": ("entropy", "no") if wrong else ("entropy",)}, ValueError, "want must be one of"),
        (score, {"coef": head.coef[: N - wrong]}, ValueError, "coef must have shape"),
        (draw, {"weight": bad}, TypeError, "weight must have hidden's dtype"),
        (draw, {"top_k": 0 if wrong else 1}, ValueError, "top_k must be at least 1"),
        (draw, bias, ValueError, "bias must have shape"),
        (back, outs, ValueError, "dweight_out must have shape"),
        (loss, {"label_smoothing": 0.1, **bias}, ValueError, "bias must have shape"),
    ):
        with pytest.raises(kind, match=rf"{sentence}.* \(rank {last} of vocab_group\)"):
            call(vocab_group=group, **more)
    with pytest.raises(ValueError, match="suppress and valid_vocab must be equal on all ranks"):
        score(suppress=(0,) if wrong else (1,), vocab_group=group)
    whole = score_tokens(head.hidden, head.weight, head.target, rows=head.rows).logp
    head.same("logp", score(vocab_group=group).logp, whole)


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
    restricted_draws(head)
    several(head, 5, known=False)
    gradients_in_buffers(head)
    head = Head(dist.group.WORLD, SIZES[world])
    score(head, frozen=False, coef=False)
    score(head, frozen=False, coef=True)
    score(head, frozen=False, coef=False, want=("logp", "entropy"), plan="recompute")
    score(head, frozen=True, coef=False)
    gradients_in_buffers(head)
    losses(head)
    draws(head)
    several(head, 20, known=False)
    several(head, 0, known=True)
    likeliest_alone(head)
    restricted_draws(head)
    draws_among_equals(head)
    ranks_without_an_id(head)
    refusals(head)
    what_one_rank_refuses(head)
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
