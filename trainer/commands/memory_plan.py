"""`dllm-kernels plan`: what a run will hold in memory, term by term, before any weight is loaded.

The model is built of fake tensors, which have shapes and no memory, and one forward and backward of a micro-batch runs over
them while the bytes that are alive are counted; so any modelling code is measured as it is, checkpointing and adapters too.
What the head takes is `dllm_kernels.explain`'s. The framework is this process, with the task's texts.

Neither data nor hub are needed: where a task's files are not on this machine, prompts are taken to be as long as
`prompt.max_length` allows; of published models the sizes are known. The plan says so.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_kernels import explain, make_mask_plan
from dllm_kernels.objectives import RECIPES

from ..config import RunConfig
from ..distributed import Ranks
from ..errors import UserError, first_line
from ..models import compat, lora
from ..models.codec import Codec
from ..models.loading import Loaded, from_scratch, parameter_count, recognise
from ..models.published_sizes import PUBLISHED
from ..records.environment import resident_bytes
from ..tasks import Task, make_task
from ..train.run import Run  # what a run imports counts as its framework
from ..train.setup import Setup

__all__ = ["Run", "describe_plan"]

_EXAMPLES = 256  # whose prompts are measured
_PROMPT = 512  # tokens, where nothing says how long prompts are
_GPU_BASE = 600 << 20  # CUDA's context and libraries; an estimate


@dataclass(frozen=True)
class Work:
    """One model call of a phase, and what it holds beside weights, gradients, optimiser and reference."""

    name: str
    sequences: int
    tokens: int  # of a sequence
    rows: int  # through the head
    activations: int  # the most that is alive in the body's forward and backward
    kept: int  # of them, while the head runs
    head: int  # the head's workspace, outputs and gradients
    logits: int  # what full logits, their log-softmax and its gradient would take instead
    trains: bool

    @property
    def peak(self) -> int:
        return max(self.activations, self.kept + self.head)

    @property
    def peak_with_logits(self) -> int:
        return max(self.activations, self.kept + self.logits)


def describe_plan(config: RunConfig, *, ranks: int = 1) -> str:
    """The run's memory per rank, as text. Raises UserError, with the figures, for a run that the device cannot hold."""
    torch.set_num_threads(config.threads)
    if config.tensorboard:
        importlib.import_module("torch.utils.tensorboard")
    task, assumed = _task(config)
    resident = resident_bytes() or 0
    setup, known = _skeleton(config, task, ranks)
    assumed += known
    tokens = _prompt_tokens(setup, assumed)
    model = setup.trained
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _GPU_BASE if device == "cuda" else resident
    trained = [p for p in model.parameters() if p.requires_grad]
    terms = {
        "framework and data": base,
        "weights": _bytes(model.parameters()) // ranks,
        "gradients": _bytes(trained) // ranks,
        "optimiser": 2 * _bytes(trained) // ranks,
        "reference policy": 0,
    }
    if config.rl.updates and RECIPES[config.rl.algorithm].wants_reference(config.rl.options):
        if config.rl.teacher is not None:
            terms["reference policy"] = _stored(config.rl.teacher) // ranks
        elif not config.model.lora.rank:
            terms["reference policy"] = terms["weights"]
    works = _works(setup, ranks, tokens)
    worst = max(works, key=lambda work: work.peak)
    if device == "cpu":  # the optimiser's states are made in what the first step's activations left, which then need new pages
        terms["heap fragmentation"] = min(terms["optimiser"], worst.activations)
    if ranks > 1:
        terms["gathered layers"] = _gathered(model, config)
    total = sum(terms.values()) + worst.peak
    capacity = _capacity(device)
    lines = [
        f"{parameter_count(model):,} parameters, {sum(p.numel() for p in trained):,} trained; {device}, {ranks} rank(s)",
        "",
        *(f"{name:<22}{_mb(value)}" for name, value in terms.items() if value),
        f"{'activations and head':<22}{_mb(worst.peak)}   {worst.name}: {worst.sequences} x {worst.tokens} tokens",
        f"{'predicted peak':<22}{_mb(total)}   of {_mb(capacity).strip()}",
        "",
        f"{'call of the model':<22}{'sequences':>10}{'tokens':>8}{'rows':>9}{'activations':>14}{'head':>14}{'full logits':>14}",
    ]
    for work in works:
        figures = "".join(f"{_mb(value):>14}" for value in (work.activations, work.head, work.logits))
        lines.append(f"{work.name:<22}{work.sequences:>10}{work.tokens:>8}{work.rows:>9}{figures}")
    full = sum(terms.values()) + max(work.peak_with_logits for work in works)
    lines += ["", f"with full logits in place of our kernels: {_mb(full).strip()}", *assumed]
    if total > capacity:
        largest = max([*terms.items(), ("activations and head", worst.peak)], key=lambda item: item[1])
        raise UserError(
            f"this run needs {_mb(total).strip()} on each of {ranks} rank(s) and the {device} has {_mb(capacity).strip()}; "
            f"most of it, {_mb(largest[1]).strip()}, are {largest[0]}: lora.rank, gradient_checkpointing, micro_batch and "
            "more ranks take less"
        )
    return "\n".join(lines)


def _task(config: RunConfig) -> tuple[Task, list[str]]:
    """The task, or one of its lengths alone where its data or packages are not here; and what is assumed."""
    wanted = config.task
    sources = [source for name in ("train", "test") if (source := getattr(wanted, name, None)) is not None]
    sources += getattr(wanted, "tests", {}).values()
    missing = [source for source in sources if not Path(source).is_file()]
    package = {"reasoning_gym": "reasoning_gym", "math": "math_verify"}.get(wanted.kind)
    if package is not None and find_spec(package) is None:
        missing.append(f"the package {package.replace('_', '-')}")
    if not missing:
        return make_task(wanted, seed=config.task_seed), []
    length = getattr(wanted, "completion_length", None) or 256
    any_text = "".join(map(chr, range(32, 127)))
    bpe = getattr(wanted, "style", "words") == "bpe"
    task = Task(
        name=wanted.kind,
        train=(),
        tests={},
        rewards={},
        correct=lambda examples, completions: [],
        metrics={},
        completion_length=length,
        alphabet=None if bpe else any_text,
        corpus=[any_text] if bpe else None,
        vocabulary=getattr(wanted, "vocabulary", 0),
    )
    return task, [f"not here, and not read: {', '.join(map(str, missing))}"]


def _prompt_tokens(setup: Setup, assumed: list[str]) -> int:
    """Of the longest prompt; adds to `assumed` where it is not known."""
    if setup.task.train and setup.loaded.tokenizer is not None:
        return max(map(len, setup.codec.prompts(setup.task.train[:_EXAMPLES])))
    longest = setup.config.prompt.max_length
    assumed.append(
        f"prompts are taken to have {longest or _PROMPT} tokens, "
        + ("as prompt.max_length allows" if longest else "a guess; prompt.max_length says how long they are")
    )
    return longest or _PROMPT


def is_out_of_memory(error: BaseException) -> bool:
    lacking = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in lacking)


def memory_hint(config: RunConfig, ranks: int) -> str:
    """What `plan` predicts and which keys help, for a run that ran out of memory."""
    try:
        lines = describe_plan(config, ranks=ranks).splitlines()
        peak = next(line for line in lines if line.startswith("predicted peak"))
        told = f"plan predicts a peak of {' '.join(peak.split()[2:])}"
    except Exception as error:  # the prediction must not hide what happened
        told = str(error) if isinstance(error, UserError) else first_line(error)
    return f"{told}; a smaller micro_batch of sft, rl and rollout takes less, and so does model.gradient_checkpointing"


# --- the model, without weights ---------------------------------------------------------------------------------------


def _skeleton(config: RunConfig, task: Task, ranks: int) -> tuple[Setup, list[str]]:
    """What `prepare` makes, of fake tensors; and what is assumed."""
    settings, options = config.model, config.model.lora
    sizes = PUBLISHED.get(str(settings.checkpoint).lower())
    assumed = []
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        if settings.checkpoint is None:
            loaded = from_scratch(settings, task, seed=config.seed)
        elif sizes is not None:
            model = _of_dtype(*sizes.model(), getattr(torch, settings.dtype)).eval()
            loaded = Loaded(model, None, sizes.facts())  # type: ignore[arg-type]
            assumed.append(f"{settings.checkpoint}: by its published sizes, without its own code and tokenizer")
        else:
            found = recognise(
                settings.checkpoint,
                trust_remote_code=settings.trust_remote_code,
                revision=settings.revision,
                facts=settings.facts,
            )
            hf_config, tokenizer, facts, cls = found
            model = _of_dtype(cls, hf_config, getattr(torch, settings.dtype)).eval()
            compat.adapt_forward(model, facts)
            compat.adapt_head(model, facts)
            loaded = Loaded(model, tokenizer, facts)
        prompt = config.prompt if task.train else config.prompt.model_copy(update={"few_shot": 0})
        if loaded.tokenizer is None:
            prompt = prompt.model_copy(update={"chat_template": True})
        codec = Codec(loaded, task, prompt, config.rollout.length)
        trained: nn.Module = loaded.model
        if settings.gradient_checkpointing:
            compat.checkpoint_blocks(loaded.model)
        if options.rank:
            with _stay():
                trained = lora.add_lora(loaded.model, rank=options.rank, alpha=options.alpha, targets=options.targets)
    return Setup(config, loaded, task, codec, Ranks(size=ranks), trained), assumed


def _of_dtype(cls: Any, hf_config: Any, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake tensors cannot be cast in place afterwards
    try:
        return cls(hf_config)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _stay() -> Iterator[None]:
    """peft moves its adapters, which are where and what they should be, and fake tensors cannot be moved in place."""
    to = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


def _works(setup: Setup, ranks: int, prompt_tokens: int) -> list[Work]:
    """The model calls of a run that hold most, phase by phase."""
    config, task = setup.config, setup.task
    tokens = prompt_tokens + setup.length
    works = []
    if config.sft.steps:
        share = -(-config.sft.batch // ranks)
        sequences = min(share, config.sft.micro_batch or share)
        late = sequences * (setup.length + 1) // 2  # one mask of any level each
        seen = _trained_tokens(setup, prompt_tokens, 1)
        works.append(_measure(setup, "sft", sequences, seen, late, trains=True, again=sequences < share))
    if config.rl.updates:
        share = -(-config.rl.prompts * config.rl.group // ranks)
        sequences = min(share, config.rl.micro_batch or share)
        rows, samples = _most_rows(setup, sequences)
        if setup.facts.block_length is None:
            sequences *= samples
        seen = _trained_tokens(setup, prompt_tokens, samples)
        works.append(_measure(setup, "rl gradient", sequences, seen, rows, trains=True, again=True))
    generated = [("evaluation", config.evaluation.batch)]
    if config.rl.updates:
        generated.append(("rl rollout", config.rl.prompts * config.rl.group))
    held = max((len(test) for test in task.tests.values()), default=0 if task.train else config.evaluation.batch)
    for name, batch in generated:
        share = -(-min(batch, held if name == "evaluation" else batch) // ranks)
        sequences = min(share, config.rollout.micro_batch or share)
        rows = sequences * min(setup.length, config.rollout.block_length or setup.length)
        if sequences:
            works.append(_measure(setup, name, sequences, tokens, rows, trains=False))
    return works


def _trained_tokens(setup: Setup, prompt: int, samples: int) -> int:
    """S; of a block-causal model S + k C', a clean copy and a noisy one for each of k samples, from the completion's block on."""
    block, S = setup.facts.block_length, prompt + setup.length
    return S if block is None else S + samples * (setup.length + prompt % block)


def _most_rows(setup: Setup, sequences: int) -> tuple[int, int]:
    """Scored tokens of the pass that has most (of trajectories, about what its states decide), and the samples of a pass."""
    config, L, block = setup.config.rl, setup.length, setup.facts.block_length
    recipe = RECIPES[config.algorithm]
    if recipe.trajectory is not None:
        tokens = recipe.trajectory.tokens(recipe.check(config.options), L, setup.steps)
        if block is not None:  # a sample has a state of every block
            tokens *= -(-L // block)
        samples = min(config.samples_per_pass, -(-L // tokens))
        return sequences * min(L, samples * tokens), samples
    ids = torch.zeros(sequences, L, dtype=torch.int64)
    plan = make_mask_plan(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        law=config.law,
        samples=config.samples,
        seed=setup.config.seed,
        sequence_ids=torch.arange(sequences),
        mask_id=setup.facts.mask_id,
        causal_block=block,
        **config.law_options(),
    )
    samples = min(config.samples_per_pass, config.samples)
    return max(int(part.sum()) for part in plan.counts.sum(1).split(samples)), samples


# --- one call -----------------------------------------------------------------------------------------------------------


def _measure(setup: Setup, name: str, sequences: int, tokens: int, rows: int, *, trains: bool, again: bool = False) -> Work:
    """`again`: gradients of earlier calls are there already, and are added to."""
    model: Any = setup.trained
    head = model.get_output_embeddings()
    trained = [p for p in model.parameters() if p.requires_grad]
    mode = next(iter(trained)).fake_mode  # type: ignore[attr-defined]
    wanted = setup.config.parallel.dtype == "bfloat16"
    with mode, _identity(head), torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted), torch.set_grad_enabled(trains):
        ids = torch.zeros(sequences, tokens, dtype=torch.int64)
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if trains and setup.facts.block_length is not None:  # one mask for clean and noisy copies
            inputs |= {"attention_mask": torch.zeros(sequences, 1, tokens, tokens, dtype=model.dtype), "position_ids": ids}
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if again else None
        with _Alive() as alive:
            hidden: Tensor = model(**inputs).logits
            kept = alive.now
            if trains:
                hidden.backward(torch.zeros_like(hidden))
        for parameter in trained:
            parameter.grad = None
    V, H = head.weight.shape
    head_trains = trains and head.weight.requires_grad
    cost = explain(
        rows=rows,
        hidden_size=H,
        vocabulary=V,
        dtype=hidden.dtype,
        trainable_head=head_trains,
        coef_known=trains,
        wants_gradient=trains,
    )
    # gradients are a term of their own; those that the body's backward made anew are among what was alive
    made = 0 if again else sum(p.numel() * p.element_size() for p in trained if p is not head.weight)
    logits = sequences * tokens * V * hidden.element_size()
    return Work(
        name,
        sequences,
        tokens,
        rows,
        activations=max(kept, alive.most - made * trains),
        kept=kept,
        head=max(0, cost.peak_bytes - (0 if again or not head_trains else V * H * hidden.element_size())),
        logits=logits * (3 if trains else 1),
        trains=trains,
    )


@contextmanager
def _identity(head: nn.Module) -> Iterator[None]:
    """As under `headless`, which looks at values: the head hands on what it gets. A head that is an embedding is no call."""
    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


class _Alive(TorchDispatchMode):
    """Bytes of the storages that were made within the context and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in held:  # neither counted already nor from outside
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# --- figures ----------------------------------------------------------------------------------------------------------


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _stored(teacher: str) -> int:
    """Bytes of a checkpoint's weights as they lie in its folder."""
    files = list(Path(teacher).glob("*.safetensors"))
    if not files:
        raise UserError(f"rl.teacher: the plan needs a folder with safetensors, got {teacher}")
    return sum(file.stat().st_size for file in files)


def _gathered(model: Any, config: RunConfig) -> int:
    """FSDP: two layers at a time, whole, the head, and the head's whole gradient in fp32."""
    _, blocks = compat.find_blocks(model)
    head = model.get_output_embeddings().weight
    item = 2 if config.parallel.dtype == "bfloat16" else head.element_size()
    layer = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    whole = 2 * layer if config.parallel.reshard_after_forward else sum(p.numel() for p in blocks.parameters())
    return (whole + head.numel()) * item + 4 * head.numel() * head.requires_grad


def _capacity(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mb(count: float) -> str:
    return f"{count / 2**20:>10,.1f} MiB"
