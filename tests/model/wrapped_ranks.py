"""Run by test_wrapped.py: optimizer steps in every wrapper, by `headless` and by plain cross-entropy on logits.

python -m tests.model.wrapped_ranks OUT SIZE CASE...: ranks are forked; what each of them found is saved to OUT.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dllm_kernels import accumulate, elbo_loss, fit_passes, headless
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.integrations import verl
from dllm_kernels.model.sharding import OLD_GLOO
from dllm_kernels.objectives import BGPO
from tests.plans import plan_of
from tests.tiny import eurobert

V, STEPS = 101, 3
OLD = not hasattr(FSDPModule, "set_gradient_divide_factor")  # torch up to 2.7


def model_of(head, lora=None):
    """`lora`: the dtype of a model with adapters, in float32 as peft starts them.

    Both of their matrices random, as in float64, make steps that float32 does not determine: cross-entropy with the rows of
    each batch in another order ends 7e-6 away from itself.
    """
    torch.manual_seed(0)
    model = eurobert(vocab=V, hidden=16, dtype=torch.float32, tie_word_embeddings=head == "tied")
    if head == "bias":
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.linspace(-1, 1, V))
    if head == "frozen":
        model.get_output_embeddings().requires_grad_(False)
    if lora is not None:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=lora == torch.float32)
        model = peft.get_peft_model(model, config).to(lora)
    return model


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def fsdp2(model, reshard=None, factor=None, replicas=1, head_apart=False, **policy):
    size = dist.get_world_size()
    sizes = (size,) if replicas == 1 else (replicas, size // replicas)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("shard",) if replicas == 1 else ("replicate", "shard"))
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**policy)}
    if reshard is not None:
        options["reshard_after_forward"] = reshard
    inside = {**options, "mp_policy": MixedPrecisionPolicy(**{**policy, "output_dtype": None})}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, **inside)
    if head_apart:
        fully_shard(inner.get_output_embeddings(), **inside)
    fully_shard(model, **options)
    if factor is not None:
        model.set_gradient_divide_factor(factor)
        model.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def deepspeed(model, stage, micros=1, **more):
    import deepspeed as theirs

    # it would compile kernels that gloo does without, for minutes
    theirs.ops.__compatible_ops__.update(dict.fromkeys(theirs.ops.__compatible_ops__, False))
    theirs.init_distributed(dist_backend="gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micros,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    return theirs.initialize(model=model, optimizer=optimizer, config=config | more)[0]


# name: (wrapper, head, dtype with LoRA, micro-batches per step, largest difference of parameters)
CASES = {
    "ddp": (ddp, "untied", None, 1, 1e-6),
    "ddp tied": (ddp, "tied", None, 1, 1e-6),
    "ddp bias, unused": (functools.partial(ddp, find_unused_parameters=True), "bias", None, 1, 1e-6),
    "ddp static": (functools.partial(ddp, static_graph=True), "untied", None, 1, 1e-6),
    "ddp views, accumulation": (functools.partial(ddp, gradient_as_bucket_view=True), "untied", None, 2, 1e-6),
    "ddp frozen, unused": (functools.partial(ddp, find_unused_parameters=True), "frozen", None, 1, 1e-6),
    "ddp lora": (ddp, "tied", torch.float32, 1, 1e-6),
    "ddp lora fp64": (ddp, "tied", torch.float64, 1, 1e-6),
    "fsdp2": (fsdp2, "untied", None, 1, 1e-6),
    "fsdp2 tied, resharded": (functools.partial(fsdp2, reshard=True), "tied", None, 1, 1e-6),
    "fsdp2 bias, not resharded": (functools.partial(fsdp2, reshard=False), "bias", None, 1, 1e-6),
    "fsdp2 head apart": (functools.partial(fsdp2, head_apart=True), "untied", None, 1, 1e-6),
    "fsdp2 factor": (functools.partial(fsdp2, factor=5.0), "untied", None, 1, 1e-6),
    "fsdp2 accumulation": (fsdp2, "untied", None, 2, 1e-6),
    "fsdp2 tied, accumulation": (fsdp2, "tied", None, 2, 1e-6),
    "fsdp2 frozen": (fsdp2, "frozen", None, 1, 1e-6),
    "fsdp2 lora": (fsdp2, "untied", torch.float32, 1, 1e-6),
    "fsdp2 lora fp64": (fsdp2, "untied", torch.float64, 1, 1e-6),
    "fsdp2 replicas": (functools.partial(fsdp2, replicas=2), "untied", None, 1, 1e-6),
    "fsdp2 bf16": (
        functools.partial(fsdp2, param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32),
        "untied",
        None,
        1,
        0.08,  # twice the gradient would be 0.11 off
    ),
}
if OLD:  # does not tell which factor was set, nor sum in float64: refused; gloo does not average over replicas
    del CASES["fsdp2 factor"], CASES["fsdp2 lora fp64"], CASES["fsdp2 replicas"]
FSDP2 = hasattr(torch.cpu.Stream, "record_event")  # that of torch 2.6 wants streams that a CPU has not
if not FSDP2:
    CASES = {name: settings for name, settings in CASES.items() if not name.startswith("fsdp2")}
DEEPSPEED = {
    "deepspeed 0": (functools.partial(deepspeed, stage=0), "untied", None, 1, 1e-6),
    "deepspeed 0 bias, accumulation": (functools.partial(deepspeed, stage=0, micros=2), "bias", None, 2, 1e-6),
    "deepspeed 1 tied": (functools.partial(deepspeed, stage=1), "tied", None, 1, 1e-6),
    "deepspeed 1 accumulation": (functools.partial(deepspeed, stage=1, micros=2), "untied", None, 2, 1e-6),
    "deepspeed 2": (functools.partial(deepspeed, stage=2), "bias", None, 1, 1e-6),
    "deepspeed 2 tied, accumulation": (functools.partial(deepspeed, stage=2, micros=2), "tied", None, 2, 1e-6),
    "deepspeed 2 frozen": (functools.partial(deepspeed, stage=2), "frozen", None, 1, 1e-6),
    "deepspeed 2 lora": (functools.partial(deepspeed, stage=2), "untied", torch.float32, 1, 1e-6),
    "deepspeed 2 bf16": (functools.partial(deepspeed, stage=2, bf16={"enabled": True}), "untied", None, 1, 0.08),
}


def batch(rank, step, micro):
    """(noisy ids, attention mask, target, masked, p_mask): other data and other lengths on every rank."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + micro)
    length = 5 + rank + step
    target = torch.randint(0, V - 2, (2, length), generator=generator)
    attention = torch.ones_like(target)
    attention[1, length - 2 :] = 0
    masked = (torch.rand(target.shape, generator=generator) < 0.6) & (attention == 1)
    if (rank, step) == (1, 1):
        masked[:] = False  # a rank without a single hidden token
    return target.masked_fill(masked, V - 1), attention, target, masked, torch.tensor(0.6)


def plain_loss(model, ids, attention, target, masked, p_mask):
    logits = model(input_ids=ids, attention_mask=attention).logits
    loss = F.cross_entropy(logits[masked], target[masked], reduction="none") / p_mask
    return loss.sum() / target.numel() + 0.0 * logits.sum()


def headless_loss(body, ids, attention, target, masked, p_mask):
    return elbo_loss(body(ids, attention_mask=attention), body.weight, target, masked, p_mask, **body.options)


def one_step(model, optimizer, step, micros, ours, syncing):
    engine = model if hasattr(model, "backward") else None  # DeepSpeed's has the optimizer and counts micro-batches
    if engine is None:
        optimizer.zero_grad()
    for micro in range(micros):
        with syncing(model, micro == micros - 1):
            case = batch(dist.get_rank(), step, micro)
            with headless(model) if ours else nullcontext() as body:
                loss = headless_loss(body, *case) if ours else plain_loss(model, *case)
                loss.backward() if engine is None else engine.backward(loss)
        if engine is not None:
            engine.step()
    if engine is None:
        optimizer.step()


def syncing(model, now):
    if hasattr(model, "backward"):
        return nullcontext()
    if hasattr(model, "no_sync"):
        return nullcontext() if now else model.no_sync()
    model.set_requires_gradient_sync(now)
    return nullcontext()


def whole(model):
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def rl_case():
    plan = plan_of([5, 4, 6, 3, 5], samples=3)
    return plan, Batch({"advantages": torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0])})


class _BreaksError(Exception):
    pass


def _break(*_):
    raise _BreaksError


def accumulated(model, broken=False):
    """`.grad` after `accumulate` of one batch over all ranks, the first of which holds more than the others."""
    plan, batch = rl_case()
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(0, 5) if size == 1 else slice(0, 4) if rank == 0 else slice(4, 5) if rank == 1 else slice(0, 0)
    if broken:  # every rank meets the error: one that does not would wait for the others
        mine = [slice(0, 1), slice(1, 2), slice(3, 4), slice(4, 5)][rank]
    module = getattr(model, "module", model)
    hook = module.register_forward_hook(_break) if broken else None
    try:
        accumulate(model, plan.cut(sequences=mine), BGPO, batch.cut(sequences=mine), denominator=5.0)
    except _BreaksError:
        assert hook is not None
        hook.remove()
    return {n.removeprefix("module."): None if p.grad is None else _full(p.grad) for n, p in model.named_parameters()}


def _full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def rate(name):
    """FSDP2 of torch up to 2.8 sums over gloo where it should average: a smaller rate makes the same steps of it.

    Twice or four times as far, fp32 does not determine five steps to 1e-6: cross-entropy itself ends 2e-6 from fp64.
    """
    return 0.1 / (dist.get_world_size() if name.startswith("fsdp2") and OLD_GLOO else 1)


def case(name):
    """Largest differences: parameters after the steps, gradients of `accumulate` from one process, what follows it."""
    wrap, head, lora, micros, _ = (CASES | DEEPSPEED)[name]
    models, optimizers = {}, {}
    for ours in (True, False):
        models[ours] = wrap(model_of(head, lora))
        trained = [p for p in models[ours].parameters() if p.requires_grad]
        optimizers[ours] = None if name in DEEPSPEED else torch.optim.SGD(trained, lr=rate(name), momentum=0.5)
    start = whole(models[True])

    def run(steps):
        for step in steps:
            for ours in (True, False):
                one_step(models[ours], optimizers[ours], step, micros, ours, syncing)
        return worst(whole(models[True]), whole(models[False]))

    found = {"steps": run(range(STEPS)), "moved": worst(whole(models[True]), start)}
    if name in DEEPSPEED:
        return found
    alone = model_of(head, lora)
    alone.load_state_dict(dict(whole(models[True]).items()), strict=False)
    plan, of_all = rl_case()
    accumulate(alone, plan, BGPO, of_all, denominator=5.0)
    want = {n: p.grad for n, p in alone.named_parameters()}
    optimizers[True].zero_grad()
    got = accumulated(models[True])
    assert {n for n in got if got[n] is not None} == {n for n in want if want[n] is not None}
    found["accumulate"] = worst({n: g for n, g in got.items() if g is not None}, want)
    twice = accumulated(models[True])
    found["accumulate twice"] = worst({n: g / 2 for n, g in twice.items() if g is not None}, want)
    before = accumulated(models[True], broken=True)
    if isinstance(models[True], DistributedDataParallel):
        found["after an error"] = worst({n: g for n, g in before.items() if g is not None}, twice)
    found["then"] = run(range(STEPS, STEPS + 2))
    return found


def worst(got, want):
    """The largest difference, of values above 1 relative to the largest of their tensor."""
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max().clamp_min(1.0)) for name in got)


class InBackward:
    """An optimizer that steps as soon as a gradient is there."""

    def __init__(self, model):
        self.optimizers = {p: torch.optim.SGD([p], lr=rate("fsdp2")) for p in model.parameters()}
        for parameter in self.optimizers:
            parameter.register_post_accumulate_grad_hook(self.hook)

    def hook(self, parameter):
        self.optimizers[parameter].step()
        parameter.grad = None

    def zero_grad(self):
        """Nothing is left."""

    step = zero_grad


def in_backward():
    models = {ours: fsdp2(model_of("bias")) for ours in (True, False)}
    start = whole(models[True])
    optimizers = {ours: InBackward(model) for ours, model in models.items()}
    for step in range(STEPS):
        for ours, model in models.items():
            one_step(model, optimizers[ours], step, 1, ours, syncing)
    found = {ours: whole(model) for ours, model in models.items()}
    return {
        "steps": worst(found[True], found[False]),
        "moved": worst({"": found[True]["lm_head.weight"]}, {"": start["lm_head.weight"]}),
    }


def reference():
    """LoRA on the head, its reference the model without adapters: from plain cross-entropy in DDP, in one context a step."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    found = {}
    for kind in ("plain", "ddp", *(["fsdp2"] if FSDP2 else [])):
        torch.manual_seed(1)
        model = peft.get_peft_model(model_of("untied"), config)
        start = whole(model)
        inner, model = model, fsdp2(model) if kind == "fsdp2" else ddp(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=rate(kind), momentum=0.5)
        for step in range(STEPS):
            optimizer.zero_grad()
            data = batch(dist.get_rank(), step, 0)
            with nullcontext() if kind == "plain" else headless(model) as body:
                work = functools.partial(plain_loss, model) if kind == "plain" else functools.partial(headless_loss, body)
                with torch.no_grad(), inner.disable_adapter():
                    before = work(*data)
                (work(*data) * (1 + before)).backward()
            optimizer.step()
        found[kind] = whole(model)
    differences = {kind: worst(found[kind], found["plain"]) for kind in found}
    return differences | {"moved": worst(found["plain"], start)}


def patched():
    """Differences of parameters: a forward that returns log-probs, patched before it was wrapped, and logits in the wrapper."""
    found = {}
    for kind in ("ddp", *(["fsdp2"] if FSDP2 else [])):
        models = {ours: model_of("tied") for ours in (True, False)}
        start = whole(models[True])
        verl.patch_forward(models[True])
        for ours, model in models.items():
            models[ours] = wrapped = (fsdp2 if kind == "fsdp2" else ddp)(model)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=rate(kind))
            for step in range(STEPS):
                ids, attention, target, masked, p_mask = data = batch(dist.get_rank(), step, 0)
                if ours:
                    given = {"attention_mask": attention, "labels": target.masked_fill(~masked, -100)}
                    loss = -wrapped(input_ids=ids, **given).log_probs.sum() / p_mask / target.numel()
                else:
                    loss = plain_loss(wrapped, *data)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        found[kind] = worst(whole(models[True]), whole(models[False])), worst(whole(models[True]), start)
    return found


def fitted():
    """What `fit_passes` finds, the last rank without a sequence, and the gradient of a step after it."""
    plan, of_all = rl_case()
    mine = slice(0, 0 if dist.get_rank() else None)
    plan, of_mine = plan.cut(sequences=mine), of_all.cut(sequences=mine)
    found = {"plain": (fit_passes(model_of("untied"), rl_case()[0], BGPO, memory_budget=1 << 30), None, True)}
    for kind in ("ddp", *(["fsdp2"] if FSDP2 else [])):
        for looks in (False, True):
            model, drawn = (fsdp2 if kind == "fsdp2" else ddp)(model_of("untied")), torch.get_rng_state()
            fits = [fit_passes(model, plan, BGPO, memory_budget=1 << 30) for _ in range(2 * looks)]
            same = torch.equal(drawn, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
            accumulate(model, plan, BGPO, of_mine, sequences_per_pass=2)
            gradients = {name: _full(p.grad) for name, p in model.named_parameters()}
            found[kind, looks] = fits[-1] if fits else None, gradients, same
    return found


def two_dimensions():
    """Two groups of FSDP2, each rank's blocks split over two by tensor parallelism: differences of parameters from
    cross-entropy on logits there, and from one process; how far they moved; the sentence of `accumulate`.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    mine = mesh["data"].get_local_rank()
    columns = {f"model.layers.*.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
    models = {}
    for ours in (True, False):
        models[ours] = model_of("untied")
        parallelize_module(models[ours], mesh["tensor"], columns | {"model.layers.*.mlp.down_proj": RowwiseParallel()})
        fully_shard(models[ours], mesh=mesh["data"])
    start, models["alone"] = whole(models[True]), model_of("untied")
    for kind, model in models.items():
        averages = kind == "alone" or not OLD_GLOO
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if averages else 0.05)
        for step in range(STEPS):
            optimizer.zero_grad()
            if kind == "alone":
                (sum(plain_loss(model, *batch(data, step, 0)) for data in range(2)) / 2).backward()
            else:
                with headless(model) if kind else nullcontext() as body:
                    case = batch(mine, step, 0)
                    (headless_loss(body, *case) if kind else plain_loss(model, *case)).backward()
            optimizer.step()
    found = whole(models[True])
    differences = {str(kind): worst(found, whole(models[kind])) for kind in (False, "alone")}
    return differences, worst(found, start), _error(lambda: accumulated(models[True]))


def refusals():
    """The sentence with which each of these is refused."""
    plan, of_all = rl_case()
    ids = torch.zeros(1, 3, dtype=torch.int64)

    def inside(model):
        with headless(model) as body:
            return body(ids)

    def late():
        with headless(sharded) as body:
            loss = headless_loss(body, *batch(0, 0, 0))
        loss.backward()

    def stepped():
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
        with headless(sharded) as body:
            for step in range(2):
                headless_loss(body, *batch(0, step, 0)).backward()
                optimizer.step()

    def waiting():
        sharded.set_requires_gradient_sync(False)
        with headless(sharded) as body:
            headless_loss(body, *batch(0, 0, 0)).backward()
        sharded.set_requires_gradient_sync(True)
        accumulate(sharded, plan, BGPO, of_all, denominator=5.0)

    def tensor_parallel(split):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(model_of("untied"), mesh, {split: ColwiseParallel(output_layouts=Replicate())})

    def same_data():
        """The same step on every rank is that of one; `accumulate` would sum it over them."""
        model, alone, case = tensor_parallel("model.layers.*.mlp.gate_proj"), model_of("untied"), batch(0, 0, 0)
        with headless(model) as body:
            headless_loss(body, *case).backward()
        plain_loss(alone, *case).backward()
        for (name, got), want in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(_full(got.grad), want.grad, atol=1e-6), name
        accumulate(model, plan, BGPO, of_all)

    only_head = model_of("untied")
    only_head.model.requires_grad_(False)
    wrapped_head = ddp(only_head)
    wrapped, sharded = ddp(model_of("untied")), fsdp2(model_of("untied")) if FSDP2 else None
    flat = FullyShardedDataParallel(model_of("untied"), use_orig_params=True, device_id=torch.device("cpu"))
    with torch.no_grad():
        inside(wrapped.module)
    if FSDP2:
        inside(sharded)
    tries = {
        "beside ddp": lambda: inside(wrapped.module),
        "beside ddp, frozen body": lambda: inside(wrapped_head.module),
        "fsdp1": lambda: inside(flat),
        "inside fsdp1": lambda: inside(flat.module),
        "composed": lambda: accumulate(replicate(model_of("untied")), plan, BGPO, of_all, denominator=5.0),
        "data parallel": lambda: inside(torch.nn.DataParallel(model_of("untied"))),
        "head of tensor parallelism": lambda: inside(tensor_parallel("lm_head")),
        "tensor parallel body": same_data,
    }
    if FSDP2:
        tries |= {"late": late, "stepped": stepped, "waiting": waiting}
        tied = fsdp2(model_of("tied"))
        InBackward(tied)
        tries["tied, in backward"] = lambda: inside(tied)
    return {name: _error(attempt) for name, attempt in tries.items()}


def deepspeed_refusals():
    plan, of_all = rl_case()
    engine, third = deepspeed(model_of("untied"), stage=2), deepspeed(model_of("untied"), stage=3)

    def inside(model):
        with headless(model) as body:
            return headless_loss(body, *batch(0, 0, 0))

    tries = {
        "beside": lambda: inside(engine.module),
        "stage 3": lambda: inside(third),
        "accumulate": lambda: accumulate(engine, plan, BGPO, of_all, denominator=5.0),
        "backward of its own": lambda: inside(engine).backward(),
    }
    return {name: _error(attempt) for name, attempt in tries.items()}


def _error(attempt):
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


def _rank(rank, size, store, names, out):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}  # DeepSpeed looks there
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = {}
    for name in names:
        kinds = {
            "refusals": refusals,
            "in backward": in_backward,
            "reference": reference,
            "fitted": fitted,
            "patched": patched,
            "two dimensions": two_dimensions,
            "deepspeed refusals": deepspeed_refusals,
        }
        found[name] = kinds[name]() if name in kinds else case(name)
        gc.collect()
    torch.save(found, f"{out}.{rank}")
    dist.barrier()
    os._exit(0)  # some wrappers wait for each other when they are freed


if __name__ == "__main__":
    out, size, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(r, size, f"{folder}/store", names, out)) for r in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"a rank of {size} failed")
        torch.save([torch.load(Path(f"{out}.{r}"), weights_only=False) for r in range(size)], out)
