"""Run by test_sharded.py: the same checks in a process without ranks (size 0) and in worlds of several sizes.

python -m tests.model.sharded_ranks OUT WORK SIZE...: WORK is the name of a function here, of `Ranks`; what
rank 0 of each world returns is saved to OUT as {size: result}.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from dllm_trainer.distributed import Ranks, clip_gradients, one_fails_all_stop, shard
from dllm_trainer.errors import GuardError
from dllm_trainer.records.checkpoints import Checkpoints
from dllm_trainer.records.states import load_state
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EuroBertForMaskedLM  # noqa: F401 - imported once, before the ranks are forked

from dllm_kernels import accumulate, elbo_loss, generate, headless, noise
from dllm_kernels.accumulation.scores import adapters_off, score_samples
from dllm_kernels.model.sharding import is_sharded
from dllm_kernels.objectives import (
    BGPO,
    Batch,
    diffu_grpo_objective,
    dmpo_objective,
    egspo_sa_objective,
    gdpo_objective,
    rspo_objective,
    wd1_objective,
)
from tests.plans import plan_of
from tests.tiny import eurobert, relative_error

F64 = torch.float64
LENGTHS = [5, 4, 0, 7, 3, 6, 2]
B = len(LENGTHS)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, -0.5, 0.7, 0.0, -1.2], dtype=F64)
GROUPS = torch.tensor([3, 3, 9, 9, 9, 5, 3])
CUTS = [{}, {"samples_per_pass": 4}, {"sequences_per_pass": 2}, {"samples_per_pass": 3, "sequences_per_pass": 1}]


def model_of(kind, dtype=F64):
    model = eurobert(vocab=101, hidden=16, dtype=dtype, tie_word_embeddings=kind == "tied")
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == (kind == "tied")
    if kind == "bias":
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 101, dtype=dtype))
    if kind == "frozen":
        head.requires_grad_(False)
    return model


@functools.cache  # forked ranks find what this process made
def case(coupling, dtype=F64, **options):
    """(objective, plan, batch) of all sequences: scores of an old policy that is a little off."""
    law = {"none": "full", "token": "full", "steps": "trace"}.get(coupling, "exact")
    plan = plan_of(LENGTHS, law=law, samples=None if law == "trace" else 4, **options)
    old = model_of("untied", dtype)
    dense, sample = score_samples(old, plan, per_token=True) - 0.1, score_samples(old, plan) - 0.1
    elbo = (sample * plan.share_K.to(dtype)).sum(-1)
    weights = WEIGHTS.to(dtype)
    return {
        "none": lambda: (wd1_objective(), plan, Batch({"weights": weights, "group_ids": GROUPS})),
        "token": lambda: (diffu_grpo_objective(beta=0.0), plan, Batch({"advantages": weights}, {"old_logp": dense})),
        "sample": lambda: (BGPO, plan, Batch({"advantages": weights}, {"old_sample_elbo": sample})),
        "sequence": lambda: (gdpo_objective(), plan, Batch({"advantages": weights, "old_elbo": elbo})),
        "batch": lambda: (rspo_objective(lam=0.5), plan, Batch({"advantages": weights, "ref_elbo": elbo})),
        "batch, groups": lambda: (
            dmpo_objective(baseline="unbias"),
            plan,
            Batch({"weights": weights, "old_elbo": elbo, "group_ids": GROUPS}),
        ),
        "steps": lambda: (
            egspo_sa_objective(beta=0.0, tokens_per_step=1),
            plan,
            Batch({}, {"step_advantages": weights[:, None] * (torch.arange(plan.shape[0]) % 2), "old_sample_elbo": sample}),
        ),
    }[coupling]()


COUPLINGS = ("none", "token", "sample", "sequence", "batch", "batch, groups", "steps")


def full(tensor):
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def full_gradients(model):
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def step(model, coupling, mine, ranks, **options):
    """(loss, gradients) of one optimizer step over all ranks; each of them calls the model equally often."""
    objective, plan, batch = case(coupling)
    model.zero_grad()
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    report = accumulate(model, plan.cut(sequences=mine), objective, batch.cut(sequences=mine), **options)
    hook.remove()
    assert len(set(ranks.tell(len(calls)))) == 1
    if ranks.launched:
        assert all(is_sharded(p) and (p.grad is None or is_sharded(p.grad)) for p in model.parameters())
    return ranks.total(float(report.loss)), full_gradients(model)


SPLITS = {
    "even": lambda ranks: ranks.share(B),
    "first has all": lambda ranks: slice(None) if ranks.is_first else slice(0, 0),
    "last has most": lambda ranks: slice(1, None) if ranks.rank == ranks.size - 1 else slice(0, int(ranks.is_first)),
}
# kind of head, coupling, number of the cut, split of the batch, whether gradients are reduced once
FEW = [
    *[("untied", coupling, 0, "even", False) for coupling in COUPLINGS],
    *[("untied", coupling, 0, "first has all", False) for coupling in ("none", "sample", "sequence", "batch")],
    *[("untied", coupling, 3, "last has most", True) for coupling in ("token", "sequence", "batch, groups", "steps")],
    *[("tied", coupling, 1, "last has most", True) for coupling in ("sample", "batch")],
    ("tied", "sequence", 2, "even", False),
    ("bias", "sample", 0, "even", False),
    ("frozen", "sequence", 0, "even", False),
]
ALL = [
    (kind, coupling, cut, split, last)
    for kind in ("untied", "tied", "bias", "frozen")
    for coupling in COUPLINGS
    for cut in (range(len(CUTS)) if kind == "untied" else (0,))
    for split in (SPLITS if cut == 0 else ("even",))
    for last in (False, True)
]


def gradients(ranks, cases=ALL):
    """Losses and gradients of the first step; without ranks every case is that of the whole batch."""
    models = {kind: shard(model_of(kind), ranks) for kind in dict.fromkeys(case[0] for case in cases)}
    found = {}
    for kind, coupling, cut, split, last in cases:
        if ranks.launched and ranks.size == 1 and split != "even":
            continue  # it would be the same
        key = (kind, coupling, cut, split, last) if ranks.launched else (kind, coupling, cut)
        if key not in found:
            options = CUTS[cut] if not ranks.launched else {**CUTS[cut], "reduce_last": last}
            found[key] = step(models[kind], coupling, SPLITS[split if ranks.size > 1 else "even"](ranks), ranks, **options)
    return found


def few(ranks):
    """What make test runs."""
    found = {"gradients": gradients(ranks, FEW), "curves": curves(ranks, steps=2)}
    for work in (rollouts, supervised, gathered, half_precision, clipped, recomputed, saved, reduced_once):
        found[work.__name__] = work(ranks)
    if not ranks.launched:
        found["stopped"] = stopped()
    else:
        for work in (replicas, nothing_to_learn, gathers, an_updated_head, failures):
            found[work.__name__] = work(ranks)
    return found


def curves(ranks, steps=20):
    """Losses and the final norm of the weights, of every coupling, on recorded rollouts under fresh masks."""
    found = {}
    for coupling in COUPLINGS:
        if coupling == "steps":
            continue
        model = shard(model_of("tied" if coupling == "sample" else "untied", torch.float32), ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for iteration in range(steps):
            objective, plan, batch = case(coupling, torch.float32, iteration=iteration)
            mine = ranks.share(B)
            report = accumulate(model, plan.cut(sequences=mine), objective, batch.cut(sequences=mine))
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(ranks.total(float(report.loss)))
        found[coupling] = losses, float(torch.stack([full(p.detach()).norm() for p in model.parameters()]).norm())
    return found


def rollouts(ranks):
    """Drawn tokens of seven prompts, a few at a time: some ranks need fewer calls, or could do without a queue."""
    prompts, ids = torch.arange(B)[:, None] + torch.arange(3), noise.sequence_ids([f"rl/{i}" for i in range(B)])
    mine = ranks.share(B)
    model = shard(model_of("untied"), ranks)
    few = {"length": 8, "steps": 4, "block_length": 4, "micro_batch": 2}
    all_of_some_ranks = {"length": 8, "steps": 4, "block_length": 4, "micro_batch": 3, "eos_id": 5}
    lengths = [5, 8, 5, 8, 6, 6, 6][mine]
    uneven_in_some_ranks = {"length": lengths, "steps": 6, "sampler": "dream", "alg": "maskgit_plus"}
    found = []
    for options in (few, all_of_some_ranks, uneven_in_some_ranks):
        made = generate(model, prompts[mine], sequence_ids=ids[mine], mask_id=99, temperature=1.0, **options).completion_BL
        found.append(torch.nn.functional.pad(made, (0, 8 - made.shape[1]), value=99))
    return ranks.gather(torch.cat(found, 1))[0]


def supervised(ranks):
    """Any loss of `body.weight`, divided by what all ranks hold; ranks with equally many forwards."""
    _, plan, _ = case("none")
    plan = plan.cut(samples=slice(0, 1))
    found = {}
    for kind in ("untied", "tied"):
        model = shard(model_of(kind), ranks)
        cut = plan.cut(sequences=ranks.share(B))
        with headless(model) as body:
            hidden = body(cut.noisy_ids[0])
            options = {**body.options, "reduction": "sequence"}
            loss_B = elbo_loss(hidden, body.weight, cut.input_ids_BS, cut.scored[0], torch.tensor(0.5), **options)
            (loss_B.sum() / B).backward()
        found[kind] = full_gradients(model)
    return found


def gathered(ranks):
    """Rewards of all ranks: what the advantages of groups across ranks are made of."""
    rewards = torch.tensor([0.1, 0.7, 0.3, 0.3, 0.9, 0.5, 0.2])
    mine = rewards[ranks.share(B)]
    everyone, own = ranks.gather(mine)
    assert torch.equal(everyone[own], mine)
    return everyone


def _head_of_sft(model, plan, at_once):
    """The head's gradient of a supervised loss over all sequences, `at_once` of them to a backward."""
    model.zero_grad()
    plan = plan.cut(samples=slice(0, 1))
    with headless(model) as body:
        for first in range(0, B, at_once):
            cut = plan.cut(sequences=slice(first, first + at_once))
            options = {**body.options, "reduction": "sequence", "take_dweight": body.take_dweight}
            hidden = body(cut.noisy_ids[0])
            elbo_loss(hidden, body.weight, cut.input_ids_BS, cut.scored[0], torch.tensor(0.5), **options).sum().backward()
    return full(model.get_output_embeddings().weight.grad)


def half_precision(ranks):
    """Forward and backward in bf16 under FSDP's policy; shards and their gradients stay fp32."""
    found = {}
    for kind in ("untied", "tied"):
        model = shard(model_of(kind, torch.float32), ranks, dtype=torch.bfloat16)
        objective, plan, batch = case("sample", torch.float32)
        mine = ranks.share(B)
        accumulate(model, plan.cut(sequences=mine), objective, batch.cut(sequences=mine))
        with headless(model) as body:
            hidden = body(plan.noisy_ids[0])
            assert not ranks.launched or hidden.dtype == body.weight.dtype == torch.bfloat16
        found[kind] = full_gradients(model)
        assert all(g.dtype == torch.float32 for g in found[kind].values())
        if kind == "untied" and ranks.launched:
            model.zero_grad()
            options = {"samples_per_pass": plan.shape[0], "sequences_per_pass": 1}
            accumulate(model, plan.cut(sequences=mine), objective, batch.cut(sequences=mine), **options)
            once, often = found[kind]["lm_head.weight"], full(model.get_output_embeddings().weight.grad)
            assert relative_error(often, once) < 1e-5, "added up in fp32, however the batch is cut"
            assert relative_error(_head_of_sft(model, plan, 1), _head_of_sft(model, plan, B)) < 1e-5, "of a loss too"
    return found


def recomputed(ranks):
    """With activation checkpointing, whose second forward runs within backward."""
    model = shard(model_of("untied"), ranks).train()
    model.gradient_checkpointing_enable()
    return [step(model, "sequence", ranks.share(B), ranks, **options) for options in ({}, {"samples_per_pass": 4})]


def saved(ranks):
    """Weights and configuration as `from_pretrained` finds them."""
    model = shard(model_of("tied"), ranks)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(ranks.tell(folder)[0])
        path = Checkpoints(folder, ranks).save(1, model, None, torch.optim.AdamW(model.parameters()))
        found = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
        ranks.wait()
        return found


def adapters(ranks):
    """LoRA over a sharded model: gradients, the reference with adapters off, the files of a checkpoint."""
    import peft

    found = {}
    for kind, head in (("untied", ["lm_head"]), ("tied", [])):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", *head], init_lora_weights=False)
        model = shard(peft.get_peft_model(model_of(kind), config).double().eval(), ranks)
        found[kind, "gradients"] = step(model, "sequence", ranks.share(B), ranks)
        with adapters_off(model):
            found[kind, "reference"] = score_samples(model, case("sample")[1])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        step(model, "sequence", ranks.share(B), ranks)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(ranks.tell(folder)[0]), ranks)
            path = checkpoints.save(1, model, None, optimizer)
            load_state(checkpoints.latest().path / "state", model, optimizer, ranks)
            found[kind, "weights"] = load_file(path / "adapter_model.safetensors")
            ranks.wait()
    return found


def clipped(ranks):
    model = shard(model_of("untied"), ranks)
    step(model, "sample", ranks.share(B), ranks)
    return clip_gradients(model, 0.5), full_gradients(model)


def replicas(ranks):
    """HSDP: as many copies as ranks, or two of them on four ranks."""
    model = shard(model_of("untied"), ranks, replicas=min(2, ranks.size))
    tied = shard(model_of("tied"), ranks, replicas=min(2, ranks.size))
    mine = ranks.share(B)
    return [step(m, c, mine, ranks, reduce_last=last) for m, c, last in ((model, "sequence", False), (tied, "batch", True))]


def nothing_to_learn(ranks):
    model = shard(model_of("untied"), ranks)
    _, plan, _ = case("sample")
    mine = ranks.share(B)
    report = accumulate(model, plan.cut(sequences=mine), BGPO, Batch({"advantages": torch.zeros(B, dtype=F64)[mine]}))
    return report.forwards, float(report.loss), full_gradients(model)


class Collectives(TorchDispatchMode):
    """Names of collectives: the functional ones are DTensor's, FSDP's own are none of these."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d"):
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return self.names.count(name)


def gathers(ranks):
    """(gathers, reductions) of the head in an optimizer step of several calls; then its gradient, and that of
    one call.
    """
    model = shard(model_of("untied"), ranks)
    objective, plan, batch = case("sequence")
    mine = ranks.share(B)
    plan, batch = plan.cut(sequences=mine), batch.cut(sequences=mine)
    with Collectives() as seen, headless(model):
        score_samples(model, plan)
        for half in (slice(0, 2), slice(2, None)):
            accumulate(model, plan.cut(sequences=half), objective, batch.cut(sequences=half), denominator=float(B))
        assert model.get_output_embeddings().weight.grad is None
    return seen.count("all_gather_into_tensor"), seen.count("reduce_scatter_tensor"), full_gradients(model)


def reduced_once(ranks):
    """Gradients of a step of several blocks of sequences, of which each rank's first two have some and its last has only
    clipped ones; how often FSDP reduced, and its modules.
    """
    model = shard(model_of("untied"), ranks)
    objective, plan, batch = case("sequence")
    old_elbo = batch.per_sequence["old_elbo"] + 100.0 * torch.isin(torch.arange(B), torch.tensor([3, 6]))
    entries = {"advantages": torch.where(WEIGHTS == 0, 1.0, WEIGHTS), "old_elbo": old_elbo}
    batch, mine = Batch({**batch.per_sequence, **entries}), ranks.share(B)
    with Collectives() as seen:
        accumulate(model, plan.cut(sequences=mine), objective, batch.cut(sequences=mine), sequences_per_pass=1, reduce_last=True)
    modules = sum(isinstance(module, FSDPModule) for module in model.modules())
    return full_gradients(model), seen.count("_reduce_scatter_base_"), modules


def an_updated_head(ranks):
    """Scores before and after the head changed inside one context, and of a fresh call."""
    model = shard(model_of("untied"), ranks)
    _, plan, _ = case("sample")
    with headless(model):
        before = score_samples(model, plan)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
        after = score_samples(model, plan)
    return before, after, score_samples(model, plan)


def failures(ranks):
    """What each rank raises where the last one fails at its own work."""
    try:
        with ranks.together():
            if ranks.rank == ranks.size - 1:
                raise GuardError("a reward is nan")
    except Exception as error:
        return ranks.tell((type(error).__name__, str(error)))


def stopped():
    """(exit status, what was printed) of two ranks, one of which fails where the other waits for it."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_stopping, args=(rank, Path(folder))) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        return [(process.exitcode, (Path(folder) / str(rank)).read_text()) for rank, process in enumerate(ranks)]


def _stopping(rank, folder):
    sys.stderr = (folder / str(rank)).open("w")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, torch.device("cpu"), launched=True)
    with one_fails_all_stop(ranks):
        ranks.wait()
        if rank == 1:
            raise GuardError("the loss became nan")
        ranks.wait()


def _rank(rank, size, store, work, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    result = work(Ranks(rank, size, torch.device("cpu"), launched=True))
    if rank == 0:
        torch.save(result, out)
    dist.barrier()
    dist.destroy_process_group()


def world(work, size):
    """What rank 0 of `size` forked ranks returns; 0: this process, which is none."""
    if size == 0:
        return work(Ranks())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        context = multiprocessing.get_context("fork")  # torch is imported once
        ranks = [context.Process(target=_rank, args=(r, size, f"{folder}/store", work, out)) for r in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"a rank of {size} failed")
        return torch.load(out, weights_only=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({int(size): world(globals()[sys.argv[2]], int(size)) for size in sys.argv[3:]}, sys.argv[1])
