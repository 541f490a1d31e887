"""The micro-batches (cuts) of a mask plan, and the rows of each that go through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.masks.layout import Layout
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.masks.tails import check_removed
from dllm_kernels.model.headless import Body
from dllm_kernels.model.layouts import block_diffusion


@dataclass(frozen=True)
class Selection:
    """Selected rows of a cut, and the pairs (sample, sequence) that hold them: what model and head get.

    Of a block-diffusion plan a row may predict tokens of several samples: it goes through the head once.
    """

    ids: Tensor  # [pairs, S]; of block diffusion [sequences, S + k C']
    model_kwargs: dict[str, Tensor]
    index_M: Tensor  # flat into ids, distinct
    target_M: Tensor
    layout: Layout | None = None

    def merged(self, coef_N: Tensor) -> Tensor:
        """Coefficients of the selected tokens, summed over those that share a row."""
        if self.layout is None:
            return coef_N
        return coef_N.new_zeros(len(self.index_M)).index_put_((self.layout.row_N,), coef_N, accumulate=True)

    def spread(self, logp_M: Tensor) -> Tensor:
        """Log-probs of the rows as those of the selected tokens; differentiable."""
        return logp_M if self.layout is None else logp_M[self.layout.row_N]

    def hidden(self, body: Body) -> Tensor:
        if self.layout is not None:
            return block_diffusion(body, self.layout, self.model_kwargs)
        return body(self.ids, **self.model_kwargs)


@dataclass(frozen=True)
class Cut:
    samples: slice
    sequences: slice
    plan: MaskPlan
    batch: Batch
    model_kwargs: dict[str, Tensor]

    @property
    def key(self) -> tuple[int, int]:
        return self.samples.start, self.sequences.start

    def select(self, keep_N: Tensor | None = None) -> Selection:
        """The rows where `keep_N` (default: all), and the pairs (sample, sequence) that hold such a row."""
        if self.plan.block_BS is not None:
            layout = self.plan.layout(keep_N=keep_N)
            return Selection(layout.ids_RT, self.model_kwargs, layout.index_M, layout.target_M, layout)
        K, B, S = self.plan.shape
        ids = self.plan.noisy_ids.view(K * B, S)
        expanded = {
            name: tensor[None].expand(K, *tensor.shape).reshape(K * B, *tensor.shape[1:])
            for name, tensor in self.model_kwargs.items()
        }
        rows = self.plan.rows
        if keep_N is None:
            keep_N = torch.ones_like(rows.index, dtype=torch.bool)
        pair_N = (rows.sample * B + rows.sequence)[keep_N]
        present = torch.zeros(K * B, dtype=torch.bool, device=ids.device).index_fill_(0, pair_N, True)
        pairs = present.nonzero()[:, 0]
        index_N, target_N = rows.index[keep_N], rows.target[keep_N]
        if len(pairs) < K * B:
            place = present.cumsum(0) - 1
            index_N = index_N - (pair_N - place[pair_N]) * S  # a shifted row belongs to the same sequence
            ids, expanded = ids[pairs], {name: tensor[pairs] for name, tensor in expanded.items()}
        return Selection(ids, expanded, index_N, target_N)


@dataclass(frozen=True)
class Cuts:
    """The cuts of a plan, samples outermost: all sequences of one sample come before the next sample."""

    plan: MaskPlan
    batch: Batch
    model_kwargs: dict[str, Tensor]
    samples_per_pass: int
    sequences_per_pass: int

    def __iter__(self) -> Iterator[Cut]:
        K, B, _ = self.plan.shape
        for k in range(0, K, self.samples_per_pass):
            for b in range(0, B, self.sequences_per_pass):
                samples = slice(k, min(k + self.samples_per_pass, K))
                sequences = slice(b, min(b + self.sequences_per_pass, B))
                yield Cut(
                    samples,
                    sequences,
                    self.plan.cut(samples=samples, sequences=sequences),
                    self.batch.cut(samples=samples, sequences=sequences),
                    {name: tensor[sequences] for name, tensor in self.model_kwargs.items()},
                )

    def of(self, sequences: slice | Tensor) -> Cuts:
        """The cuts of a subset of the sequences."""
        return Cuts(
            self.plan.cut(sequences=sequences),
            self.batch.cut(sequences=sequences),
            {name: tensor[sequences] for name, tensor in self.model_kwargs.items()},
            self.samples_per_pass,
            self.sequences_per_pass,
        )


def in_step(cuts: Cuts, body: Body, runs: Callable[[Cut], bool], *, backward: bool = False, last: bool = False) -> Iterator[Cut]:
    """The cuts, for a loop that calls the model (and backward) once for each cut where `runs` is true.

    Ranks that share a model must call it equally often: they agree on the number beforehand, and a rank with
    fewer cuts makes idle calls at the end. last: the last of these backwards reduces the gradients that were
    kept unsharded so far.
    """
    shards = body.shards
    if shards is None:
        yield from cuts
        return
    running = {cut.key for cut in cuts if runs(cut)}
    left = shards.most(len(running))
    idle = left - len(running)
    for cut in cuts:
        if cut.key in running:
            left -= 1
            shards.before_call(backward=backward, reduce=last and left == 0)
        yield cut
    for left in reversed(range(idle)):
        shards.before_call(backward=backward, reduce=last and left == 0)
        body.idle(cuts.plan.shape[2], cuts.model_kwargs, backward=backward)


def make_cuts(
    plan: MaskPlan,
    batch: Batch,
    model_kwargs: dict[str, Tensor] | None,
    samples_per_pass: int,
    sequences_per_pass: int | None,
) -> Cuts:
    """Raises ValueError or TypeError naming the argument."""
    model_kwargs = model_kwargs or {}
    for name, tensor in model_kwargs.items():
        checks.require_tensor(name, tensor)
        checks.shape(name, tensor, [plan.shape[1], *([None] * (tensor.dim() - 1))])
        checks.same_device(name, tensor, "the plan", plan.input_ids_BS)
    check_removed(plan.removed_BS, model_kwargs.get("attention_mask"))
    checks.count("samples_per_pass", samples_per_pass)
    sequences_per_pass = plan.shape[1] if sequences_per_pass is None else checks.count("sequences_per_pass", sequences_per_pass)
    return Cuts(plan, batch, model_kwargs, samples_per_pass, max(1, sequences_per_pass))
