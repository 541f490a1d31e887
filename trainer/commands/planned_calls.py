"""The model calls of a run, and what each holds and computes, before any weight is loaded.

The model is built of fake tensors, which have shapes and no memory, and one forward and backward of a micro-batch runs over
them while the bytes that are alive and the operations are counted; so any modelling code is measured as it is, checkpointing
and adapters too. What the head takes is `dllm_kernels.explain`'s.

Neither data nor hub are needed: where a task's files are not on this machine, prompts are taken to be as long as
`prompt.max_length` allows; of published models the sizes are known. The plan says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dllm_kernels import explain, make_mask_plan
from dllm_kernels.objectives import RECIPES

from ..config import RlConfig, RunConfig
from ..distributed import Ranks
from ..models import compat, lora
from ..models.codec import Codec
from ..models.loading import Loaded, from_scratch, recognise
from ..models.published_sizes import PUBLISHED
from ..tasks import Task, make_task
from ..train.algorithms import choose_algorithm
from ..train.setup import Setup

_EXAMPLES = 256  # whose prompts are measured
_PROMPT = 512  # tokens, where nothing says how long prompts are


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
    flops: int  # of the body's products, forward and, where it trains, backward
    head_flops: int  # of the head's

    @property
    def peak(self) -> int:
        return max(self.activations, self.kept + self.head)

    @property
    def peak_with_logits(self) -> int:
        return max(self.activations, self.kept + self.logits)


@dataclass(frozen=True)
class Rows:
    """Scored tokens of the passes of an update over some sequences."""

    most: int  # of one pass
    total: int
    together: int  # samples of a pass
    samples: int  # K


def planned_task(config: RunConfig) -> tuple[Task, list[str]]:
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


def prompt_tokens(setup: Setup, assumed: list[str]) -> int:
    """Of the longest prompt, with what follows its completion; adds to `assumed` where it is not known."""
    if setup.task.train and setup.loaded.tokenizer is not None:
        examples = setup.task.train[:_EXAMPLES]
        suffixes = setup.codec.suffixes(examples)
        longer = [0] * len(examples) if suffixes is None else [len(suffix) for suffix in suffixes]
        return max(len(prompt) + more for prompt, more in zip(setup.codec.prompts(examples), longer, strict=True))
    longest = setup.config.prompt.max_length
    assumed.append(
        f"prompts are taken to have {longest or _PROMPT} tokens, "
        + ("as prompt.max_length allows" if longest else "a guess; prompt.max_length says how long they are")
    )
    return longest or _PROMPT


# --- the model, without weights ---------------------------------------------------------------------------------------


def idle_parameters(config: RunConfig) -> int:
    """Of experts that a token does not go through, which the skeleton leaves out; known of published models."""
    sizes = PUBLISHED.get(str(config.model.checkpoint).lower())
    return 0 if sizes is None else sizes.idle


def skeleton(config: RunConfig, task: Task, ranks: int, *, fake: bool = True) -> tuple[Setup, list[str]]:
    """What `prepare` makes, of fake tensors or of real ones with random values; and what is assumed."""
    settings, options = config.model, config.model.lora
    sizes = PUBLISHED.get(str(settings.checkpoint).lower())
    assumed = []
    with FakeTensorMode() if fake else nullcontext(), torch.random.fork_rng(devices=[]):
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
            with _stay() if fake else nullcontext():
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


def works_of(setup: Setup, ranks: int, prompt_tokens: int) -> list[Work]:
    """The model calls of a run that hold most, phase by phase."""
    config, task = setup.config, setup.task
    tokens = prompt_tokens + setup.length
    works = []
    if config.sft.steps:
        share = -(-config.sft.batch // ranks)
        sequences = min(share, config.sft.micro_batch or share)
        late = sequences * (setup.length + 1) // 2  # one mask of any level each
        seen = trained_tokens(setup, prompt_tokens, 1)
        works.append(measure_call(setup, "sft", sequences, seen, late, trains=True, again=sequences < share))
    if config.rl.updates:
        share = -(-config.rl.prompts * config.rl.group // ranks)
        budget = config.rl.memory_budget  # with samples_per_pass=auto: as much as it holds, at least one sequence
        sequences = min(share, config.rl.micro_batch or share) if budget is None else 1
        scored = rows_of(setup, sequences)
        if setup.facts.block_length is None:
            sequences *= scored.together
        seen = trained_tokens(setup, prompt_tokens, scored.together)
        work = measure_call(setup, "rl gradient", sequences, seen, scored.most, trains=True, again=True)
        works.append(work if budget is None else replace(work, activations=max(work.activations, budget << 20)))
    own = config.rollout.engine == "ours"  # else rollouts hold nothing here
    generated = [("evaluation", config.evaluation.batch)] if own else []
    if config.rl.updates and own:
        generated.append(("rl rollout", config.rl.prompts * config.rl.group))
    held = max((len(test) for test in task.tests.values()), default=0 if task.train else config.evaluation.batch)
    for name, batch in generated:
        share = -(-min(batch, held if name == "evaluation" else batch) // ranks)
        sequences = min(share, config.rollout.micro_batch or share)
        rows = sequences * min(setup.length, config.rollout.block_length or setup.length)
        if sequences:
            works.append(measure_call(setup, name, sequences, tokens, rows, trains=False))
    return works


def trained_tokens(setup: Setup, prompt: int, samples: int) -> int:
    """S; of a block-causal model S + k C', a clean copy and a noisy one for each of k samples, from the completion's block on."""
    block, S = setup.facts.block_length, prompt + setup.length
    return S if block is None else S + samples * (setup.length + prompt % block)


def rows_of(setup: Setup, sequences: int) -> Rows:
    """Scored tokens of so many sequences, all samples of an update, a few sequences' masks standing for all."""
    config, L, block = setup.config.rl, setup.length, setup.facts.block_length
    recipe = RECIPES[config.algorithm]
    if recipe.trajectory is not None:
        options = choose_algorithm(config, L, max(1, setup.steps)).options
        decided = recipe.trajectory.tokens(options, L, setup.steps)
        if block is not None:  # a sample has a state of every block
            decided *= -(-L // block)
        decided = min(decided, L)
        samples = -(-L // decided) if recipe.trajectory.number is None else recipe.trajectory.number(options, L, setup.steps)
        together = min(_together(config), samples)
        return Rows(sequences * min(L, together * decided), sequences * min(samples * decided, samples * L), together, samples)
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
    together = min(_together(config), config.samples)
    counts_K = plan.counts.sum(1)
    return Rows(max(int(part.sum()) for part in counts_K.split(together)), int(counts_K.sum()), together, config.samples)


def _together(config: RlConfig) -> int:
    """Samples of a pass. With auto that depends on bytes which a plan does not measure: the least, which each budget holds."""
    return 1 if config.samples_per_pass == "auto" else config.samples_per_pass


# --- one call -----------------------------------------------------------------------------------------------------------


def measure_call(setup: Setup, name: str, sequences: int, tokens: int, rows: int, *, trains: bool, again: bool = False) -> Work:
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
        flops=alive.flops,
        head_flops=cost.flops,
    )


@contextmanager
def _identity(head: nn.Module) -> Iterator[None]:
    """As under `headless`, which looks at values: the head hands on what it gets. A head that is an embedding is no call."""
    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


_ATTENTION = "_scaled_dot_product_flash_attention"
# of attention on a CPU, which the registry lacks
_FLOPS = {
    getattr(torch.ops.aten, f"{_ATTENTION}_for_cpu{suffix}"): flop_registry[getattr(torch.ops.aten, _ATTENTION + suffix)]
    for suffix in ("", "_backward")
}


class _Alive(TorchDispatchMode):
    """Bytes of the storages that were made within the context and still live; operations of the products in it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket) or _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
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
