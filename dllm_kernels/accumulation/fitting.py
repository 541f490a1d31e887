"""The largest micro-batch that fits a memory budget, so that couplings over samples need one pass where they can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels import checks
from dllm_kernels.accumulation.micro_batches import Selection, make_cuts
from dllm_kernels.accumulation.objective import Batch, Coupling, Objective
from dllm_kernels.head.explain import explain
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.model.headless import Body, headless
from dllm_kernels.model.layouts import check_blocks
from dllm_kernels.model.sharding import is_sharded


@dataclass(frozen=True)
class Fit:
    """What `fit_passes` found: arguments of `accumulate` and `score_samples`, and the bytes behind them."""

    samples_per_pass: int
    sequences_per_pass: int
    passes: int  # over the model, for this objective: 1 or 2
    saved_bytes: int  # that autograd keeps of such a pass's forward
    head_bytes: int  # workspace, outputs and gradient of the hidden states


def fit_passes(
    model: nn.Module,
    plan: MaskPlan,
    objective: Objective,
    batch: Batch | None = None,
    *,
    memory_budget: int,
    model_kwargs: dict[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Fit:
    """The largest cut of a plan whose forward and backward stay within a memory budget.

    An objective that couples the samples of a sequence (GDPO, ESPO, SPG, VRPO, RSPO) takes one pass over the model where a
    micro-batch holds them all, and two where it does not; so all samples of as many sequences as fit are preferred for those, and
    as many sequences as fit for the others. Bytes are those that autograd saves in a forward of the smallest cut, counted by
    `saved_tensors_hooks` (each storage once, parameters left out), times the cut, plus what `explain` says of the head; of
    block-diffusion plans, whose samples share a clean copy, cuts of 1, 2, 4 ... samples are tried, up to the first above the
    budget.

    Args:
        model, plan, model_kwargs, group: as for `accumulate`. All ranks that share the model must call this, and get the same
            answer: that of the rank which needs most.
        objective: says what it couples; `batch`: with old scores in it or without, which may decide that. None: with.
        memory_budget: bytes, beyond weights, gradients and optimizer states. The head's fp32 gradient counts among those.

    What is not counted: what gradient checkpointing recomputes of a layer in backward, fragmentation, and the vectors that two
    passes keep of a frozen head (as large as the hidden states of a block's scored rows, at most 256 MiB).

    Raises ValueError where one sample of one sequence does not fit, and TypeError for a budget that is no integer.

    Example:
        >>> from dllm_kernels import make_mask_plan
        >>> from dllm_kernels.objectives import GDPO
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> ids = torch.randint(10, (2, 6))
        >>> plan = make_mask_plan(ids, torch.ones_like(ids, dtype=torch.bool), law="exact", samples=4, seed=0,
        ...                       sequence_ids=torch.tensor([1, 2]), mask_id=10)
        >>> fit = fit_passes(model, plan, GDPO, memory_budget=1 << 20)
        >>> fit.samples_per_pass, fit.sequences_per_pass, fit.passes
        (4, 2, 1)
    """
    if not isinstance(plan, MaskPlan) or not isinstance(objective, Objective):
        raise TypeError(f"plan must be a MaskPlan, objective an Objective, got {type(plan).__name__}, {type(objective).__name__}")
    checks.count("memory_budget", memory_budget)
    check_blocks(model, plan, model_kwargs or {})
    known = batch or Batch()
    coupling = objective.coupling if batch is None or not objective.is_on_policy(known) else objective.on_policy_coupling
    with headless(model) as body, body.wrapper.aside():
        group = group or body.wrapper.group
        sizes = _Sizes(body, plan, model_kwargs or {}, group, memory_budget)
        return _largest(sizes, coupling, shared=group is not None)


def _largest(sizes: _Sizes, coupling: Coupling, *, shared: bool) -> Fit:
    K, B, budget = sizes.K, sizes.B, sizes.budget
    if sizes.needs(1, 1) > budget:
        raise ValueError(
            f"memory_budget must be at least {sizes.needs(1, 1):,} bytes, what one sample of one sequence needs, got {budget:,}"
        )
    couples = coupling in ("sequence", "batch")
    if couples and sizes.needs(K, 1) <= budget:
        samples, sequences = K, _most(B, lambda s: sizes.needs(K, s) <= budget)
    elif couples:
        samples, sequences = _most(K, lambda k: sizes.needs(k, 1) <= budget), 1
    else:
        sequences = _most(B, lambda s: sizes.needs(1, s) <= budget)
        samples = _most(K, lambda k: sizes.needs(k, sequences) <= budget)
    one = not couples or (samples == K and (coupling == "sequence" or (sequences == B and not shared)))
    return Fit(samples, sequences, 1 if one else 2, sizes.saved(samples) * sequences, sizes.head(samples, sequences))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, where all smaller ones do; 1 does."""
    low, high = 1, max(1, limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Sizes:
    """Bytes of cuts; the same on all ranks."""

    def __init__(
        self, body: Body, plan: MaskPlan, model_kwargs: dict[str, Tensor], group: dist.ProcessGroup | None, budget: int
    ) -> None:
        self.body, self.plan, self.group, self.budget = body, plan, group, budget
        self.model_kwargs = model_kwargs
        counts_KB = plan.counts
        self.K, self.B = (self._agreed(size) for size in counts_KB.shape)
        self.rows = max(1, self._agreed(int(counts_KB.max()) if counts_KB.numel() else 0))  # of a sample of a sequence
        self._known: dict[int, int] = {}

    def needs(self, samples: int, sequences: int) -> int:
        return self.saved(samples) * sequences + self.head(samples, sequences)

    def head(self, samples: int, sequences: int) -> int:
        V, H = self.body.weight.shape
        trains = self.body.parameter.requires_grad
        cost = explain(
            rows=samples * sequences * self.rows,
            hidden_size=H,
            vocabulary=V,
            dtype=self.body.weight.dtype,
            trainable_head=trains,
            coef_known=False,
            wants_gradient=True,
            device=self.body.parameter.device,
        )
        return max(0, cost.peak_bytes - (V * H * self.body.weight.dtype.itemsize + cost.weight_sum_bytes) * trains)

    def saved(self, samples: int) -> int:
        """Of one sequence, at least, where that is above the budget. Samples of a plan without blocks are sequences too."""
        if self.plan.block_BS is None:
            return samples * self._probed(1)
        below = 1  # a power of two, from which on bytes grow at most with the square
        while 2 * below <= samples and self._in_budget(below):  # none far above the budget is tried
            below *= 2
        low = self._probed(below)
        if below == samples or not self._in_budget(below):
            return low
        if samples == self.K:
            return self._probed(samples)
        above = min(self.K, 2 * below)
        high = self._probed(above)
        return low + -(-(high - low) * (samples - below) // (above - below))

    def _in_budget(self, samples: int) -> bool:
        return self._probed(samples) + self.head(samples, 1) <= self.budget

    def _probed(self, samples: int) -> int:
        if samples not in self._known:
            self._known[samples] = self._agreed(self._forward(samples))
        return self._known[samples]

    def _forward(self, samples: int) -> int:
        """Bytes that autograd saves in a forward of so many samples of the sequence that takes most."""
        if self.plan.shape[1] == 0 or len(self.plan.sample_K) == 0:
            self.body.idle(1, {}, backward=False)
            return 0
        widest_B = self.plan.completion_mask_BS.sum(-1)
        mask_BS = self.model_kwargs.get("attention_mask")
        if self.plan.block_BS is None and mask_BS is not None and mask_BS.dim() == 2:
            widest_B = -mask_BS.sum(-1)  # all are as long; of one without padding, models drop the mask
        widest = int(widest_B.argmax())
        cut = self.plan.cut(samples=slice(0, samples), sequences=slice(widest, widest + 1))
        kwargs = {name: tensor[widest : widest + 1] for name, tensor in self.model_kwargs.items()}
        if cut.block_BS is None:
            K, B, S = cut.shape
            chosen = Selection(cut.noisy_ids.view(K * B, S), kwargs, cut.rows.index, cut.rows.target)
        else:
            chosen = next(iter(make_cuts(cut, Batch(), kwargs, samples, 1))).select()
        saved, device = Saved(), self.body.parameter.device
        rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])  # for a model with dropout
        with torch.enable_grad(), rng, saved.counted():
            hidden = chosen.hidden(self.body)
        del hidden
        return saved.bytes(self.body.model)

    def _agreed(self, size: int) -> int:
        if self.group is None:
            return size
        device = self.body.parameter.device
        most = torch.tensor(size, dtype=torch.int64, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(most)


class Saved:
    """Storages that autograd saves, held here so that none is taken for another."""

    def __init__(self) -> None:
        self._held: dict[int, torch.UntypedStorage] = {}

    def counted(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def bytes(self, model: nn.Module) -> int:
        """After the forward, when FSDP has freed what it gathered, or has it for the model's parameters."""
        own = {_storage(parameter)._cdata for parameter in model.parameters()}
        return sum(storage.nbytes() for key, storage in self._held.items() if key not in own)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        self._held[storage._cdata] = storage
        return tensor.detach()  # an output that were kept as it is would hold its own graph


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.detach().to_local() if is_sharded(tensor) else tensor).untyped_storage()  # type: ignore[attr-defined]
