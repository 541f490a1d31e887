"""`explain`: which plan a head call takes, why, and what it costs in matrix products and memory, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import backends, checks
from dllm_kernels.backends.contract import NO_LOW, STATISTICS, HeadOptions, Low, weight_sum_bytes
from dllm_kernels.backends.divergence.problem import KINDS
from dllm_kernels.backends.triton import roofline
from dllm_kernels.head import distil, plans, several
from dllm_kernels.head.distil import Teacher
from dllm_kernels.head.distil_cost import Sizes
from dllm_kernels.head.expectation import Wants
from dllm_kernels.head.expectation_cost import Sizes as ExpectationSizes
from dllm_kernels.head.expected_embedding import check_embedding
from dllm_kernels.head.forward_backward import Needs
from dllm_kernels.head.options import autocast_operands, check_arguments

_MB = 1e6


@dataclass(frozen=True)
class Cost:
    """What `explain` returns; `str()` of it is a paragraph. Bytes are what a call needs beside its arguments."""

    plan: str
    why: str
    backend: str
    rows: int
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype
    forward_gemms: int  # of 2 N H V operations each
    backward_gemms: int
    flops: int  # of both, matrix products alone
    passes: int  # over the logits
    traffic_bytes: int  # what the products must read and write at least, once each
    workspace_bytes: int  # what a call works in; the C++ engine keeps it for the next one
    stored_bytes: int  # held between forward and backward
    gradient_bytes: int
    output_bytes: int
    peak_bytes: int  # the most that lives at one time, gradients and outputs included
    phases: tuple[roofline.Phase, ...]  # of the call on a GPU
    weight_sum_bytes: int = 0  # fp32 in which a 16-bit weight's gradient is added up, where it is not rounded at once

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte that has to move."""
        return self.flops / max(self.traffic_bytes, 1)

    def seconds(self, gflops: float, gbytes: float | None = None) -> float:
        """The roofline: no implementation is faster on a machine of `gflops` GFLOP/s and, where given, `gbytes` GB/s."""
        checks.number("gflops", gflops, above=0)
        compute = self.flops / gflops / 1e9
        if gbytes is None:
            return compute
        return max(compute, self.traffic_bytes / checks.number("gbytes", gbytes, above=0) / 1e9)

    def on(self, device: str) -> roofline.Bound:
        """The roofline of the Triton backend's phases on an "A100", "H100", "H200" or "MI300": a prediction, in seconds.

        Example:
            >>> cost = explain(rows=1024, hidden_size=4096, vocabulary=126464, dtype=torch.bfloat16, wants_gradient=False)
            >>> f"{1e3 * cost.on('H200').seconds:.2f} ms"
            '1.07 ms'
        """
        if self.dtype == torch.float64:
            raise ValueError("a roofline is for float32, bfloat16 and float16, got torch.float64")
        return roofline.bound(self.phases, device, self.dtype.itemsize)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"plan {self.plan!r} on the backend {self.backend!r}: {self.why}.\n"
            f"N={self.rows} rows, H={self.hidden_size}, V={self.vocabulary}, {name}: "
            f"{self.forward_gemms} matrix products of 2NHV operations in forward, {self.backward_gemms} in backward, "
            f"{self.flops / 1e9:.4g} GFLOP in {self.passes} pass{'es' if self.passes > 1 else ''} over the logits; "
            f"{self.intensity:.3g} operations per byte that has to move.\n"
            f"Memory beside the arguments: peak {self.peak_bytes / _MB:.4g} MB; workspace {self.workspace_bytes / _MB:.4g} MB, "
            f"stored for backward {self.stored_bytes / _MB:.4g} MB, gradients {self.gradient_bytes / _MB:.4g} MB, "
            f"outputs {self.output_bytes / _MB:.4g} MB. "
            f"Full logits in fp32 would take {4 * self.rows * self.vocabulary / _MB:.4g} MB each time they are copied."
        )


def explain(
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    ids: Tensor | int | None = None,
    rows: Tensor | int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
    want: Sequence[str] = ("logp",),
    want_top: int = 0,
    plan: str | None = None,
    hidden_size: int | None = None,
    vocabulary: int | None = None,
    dtype: torch.dtype = torch.float32,
    trainable_head: bool = False,
    coef_known: bool = False,
    wants_gradient: bool = True,
    device: str | torch.device = "cpu",
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_size: int | None = None,
    kind: str = "forward_kl",
    reduction: str = "mean",
    embedding: Tensor | None = None,
    embedding_size: int | None = None,
) -> Cost:
    """Which plan `score_tokens` takes, why, and what it costs. Nothing runs and no value is read.

    Two forms. With the arguments of `score_tokens`, which may live on the meta device and then take no memory; or with
    numbers: `rows` (N), `ids` (M, beside a target), `hidden_size`, `vocabulary`, `dtype`, and what wants a gradient:
    `wants_gradient`, `trainable_head`, `coef_known`. `want`, `want_top` and `plan` belong to both; `device` is where it
    will run, for numbers and meta tensors. The peak counts forward and backward with an upstream gradient of 1, and a
    `.grad` that is empty before.

    With `teacher_hidden` and `teacher_weight`, in place of a target, or with the width `teacher_size` beside numbers, it is
    `distillation_loss` that is explained, of that `kind` and `reduction`; a product with the teacher's head has its own width.

    With `embedding`, in place of a target (of a tied one the weight itself), or with its width `embedding_size` beside numbers,
    it is `expected_embedding`, where with numbers `trainable_head` means weight and embedding.

    Raises ValueError or TypeError as `score_tokens` does, and for a plan that cannot run.

    Example:
        >>> cost = explain(rows=4096, hidden_size=4096, vocabulary=126464, dtype=torch.bfloat16)
        >>> cost.plan, cost.forward_gemms, cost.backward_gemms
        ('unit', 2, 0)
        >>> hidden = torch.empty(2, 512, 1024, device="meta", requires_grad=True)
        >>> weight, target = torch.empty(50000, 1024, device="meta"), torch.zeros(1024, dtype=torch.int64, device="meta")
        >>> cost = explain(hidden, weight, target, coef=torch.empty(1024, device="meta"))
        >>> print(str(cost).split(" on ")[0])
        plan 'coef'
        >>> cost = explain(rows=256, hidden_size=1024, vocabulary=126464, trainable_head=True, teacher_size=4096, kind="jsd")
        >>> cost.plan, cost.forward_gemms, cost.backward_gemms
        ('coef', 4, 0)
        >>> cost = explain(rows=256, hidden_size=2816, vocabulary=262144, embedding_size=2816, dtype=torch.bfloat16)
        >>> cost.plan, cost.forward_gemms, cost.backward_gemms
        ('recompute', 2, 3)
    """
    checks.names("want", want, STATISTICS)
    distils = teacher_hidden is not None or teacher_weight is not None or teacher_size is not None
    expects = embedding is not None or embedding_size is not None
    if distils:
        checks.choice("kind", kind, KINDS)
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if distils or expects:
        if distils and expects:
            raise TypeError("a teacher and an embedding are of two calls, got both")
        if plan is not None or ids is not None or want_top:
            raise TypeError(f"plan, ids and want_top go with a target, got {'a teacher' if distils else 'an embedding'}")
    R, need_down, need_up = 0, False, False
    if hidden is None and weight is None and target is None:
        for name, given in (("rows", rows), ("ids", ids)):
            if isinstance(given, Tensor):
                raise TypeError(f"{name} must be an int where no tensors are given, got a Tensor")
        T = 1 + (0 if ids is None else checks.count("ids", ids, 0))
        options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab)
        N = checks.count("rows", rows, 0)
        M, H, V = N, checks.count("hidden_size", hidden_size), checks.count("vocabulary", vocabulary)
        checks.choice("dtype", dtype, checks.FLOATS)
        need_hidden, need_weight, need_bias = wants_gradient, wants_gradient and trainable_head, False
        indexed = False
        if low_rank is not None:
            raise TypeError("low_rank goes with hidden, weight and target, got numbers instead")
        if distils:
            K, teacher_dtype = checks.count("teacher_size", teacher_size), dtype
        if expects:
            D, embedding_dtype, need_embedding = checks.count("embedding_size", embedding_size), dtype, need_weight
    elif hidden is None or weight is None or (target is ids is None and not (want_top or distils or expects)):
        raise TypeError("explain takes hidden, weight and target together, or none of them and numbers instead")
    else:
        tied = weight
        hidden, weight = autocast_operands(hidden, weight)
        if isinstance(rows, int) or isinstance(ids, int):
            raise TypeError("rows and ids must be tensors where hidden is one, got int")
        options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
        N = hidden.numel() // max(1, hidden.shape[-1]) if rows is None else rows.numel()
        if not (distils or expects):
            N = several.check(hidden, target, ids, rows)
        check_arguments(hidden, weight, rows, N, options)
        (V, H), dtype, T = weight.shape, hidden.dtype, (target is not None) + (0 if ids is None else ids.shape[1])
        M, indexed = hidden.numel() // H, rows is not None
        coef_known = coef is not None or entropy_coef is not None
        grad = torch.is_grad_enabled()
        need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
        need_bias = grad and bias is not None and bias.requires_grad
        if low_rank is not None:
            down, up, _ = low_rank
            R, need_down, need_up = len(down), grad and down.requires_grad, grad and up.requires_grad
        if not hidden.is_meta:
            device = hidden.device
        if distils:
            if teacher_hidden is None or teacher_weight is None:
                raise TypeError("teacher_hidden and teacher_weight go together, beside hidden and weight")
            other = autocast_operands(teacher_hidden, teacher_weight)
            distil.check_teacher(hidden, weight, Teacher(*other, None, None, kind, 0.5), valid_vocab)
            K, teacher_dtype = other[0].shape[-1], other[0].dtype
        if expects:
            if embedding is None:
                raise TypeError("embedding_size goes with numbers, got it beside hidden and weight: give the embedding")
            D, embedding_dtype, need_embedding = H, None, False
            if embedding is not tied:
                embedding = autocast_operands(hidden, embedding)[1]
                check_embedding(hidden, weight, embedding)
                D, embedding_dtype, need_embedding = embedding.shape[1], embedding.dtype, grad and embedding.requires_grad

    needs = Needs(need_hidden, need_weight, need_bias, bool(R) and (need_hidden or need_down), need_up)
    if expects:
        where, low_dtype = torch.device(device), None if low_rank is None else low_rank[1].dtype
        counts, all_needs = (N, M, H, D, R, V, valid_vocab or V), Wants(needs, need_embedding)
        of_call = ExpectationSizes(*counts, dtype, embedding_dtype, low_dtype, all_needs, indexed, where)
        found = of_call.cost("reference" if dtype == torch.float64 else backends.for_device(where).NAME)
        found["flops"] += 2 * (1 + need_hidden + need_down) * M * H * R  # of s h A^T and its gradients
        return Cost(**found)
    if distils:
        trains = need_weight or need_bias or need_up
        chosen = distil.choose(need_hidden or need_down or trains, trains, reduction != "none")
        where, low_dtype = torch.device(device), None if low_rank is None else low_rank[1].dtype
        sizes = Sizes(N, M, H, K, R, V, valid_vocab or V, dtype, teacher_dtype, low_dtype, needs, indexed, where, kind, chosen)
        found = sizes.cost("reference" if dtype == torch.float64 else backends.for_device(where).NAME)
        found["flops"] += 2 * (1 + need_hidden + need_down) * M * H * R  # of s h A^T and its gradients
        return Cost(**found)
    several.check_want_top(want_top, V, options)
    more = ids is not None or want_top > 0
    recorded = plans.recorded(want, coef_known, more)
    wants = need_hidden or need_weight or need_bias or need_down or need_up
    late = more or ("lse" in want and wants and not coef_known)
    chosen = plans.choose(
        plan,
        wants_gradient=recorded and wants,
        head_trains=recorded and (need_weight or need_bias or need_up),
        coef_known=coef_known,
        operand_bytes=N * V * dtype.itemsize,
        several=late,
        best=want_top,
    )
    if chosen == "forward":
        need_hidden = need_weight = need_bias = need_down = need_up = False
    backend = backends.for_device(torch.device(device))
    vectors, need_rows = plans.late_vectors((*want, "logp") if late else want), need_hidden or need_down
    forward_gemms, backward_gemms = plans.gemms(chosen, need_dhidden=need_rows, need_dweight=need_weight, vectors=vectors)
    low_gemms = sum(plans.gemms(chosen, need_dhidden=need_rows, need_dweight=need_up, vectors=vectors))
    low_flops = 2 * low_gemms * N * R * V + 2 * (1 + need_hidden + need_down) * M * H * R  # the latter before and after

    item, statistic = dtype.itemsize, max(4, dtype.itemsize)

    def workspace(gradient: bool, best: int = want_top) -> int:
        second = gradient and vectors == 2 and chosen in ("unit", "keep")  # vectors or operands of the entropy beside logp's
        needs: Any = {"gradient": gradient, "dhidden": need_rows, "second": second, "dweight": need_weight}
        low = NO_LOW if low_rank is None else Low(R, low_rank[1].dtype, need_up)
        return backend.workspace_bytes(N, H, V, dtype, **needs, several=T + want_top - best if late else None, best=best, low=low)

    named = {*want, "lse", *(("logp",) if coef_known or ids is not None else ())}
    outputs = N * sum(8 if name == "top_id" else statistic * (T if name == "logp" else 1) for name in named)
    outputs += N * want_top * (8 + statistic)
    compact, scattered = need_rows * N * (H * item + R * statistic), need_hidden * M * H * item
    head, casting = need_weight * V * H * item, 0
    sum_bytes = getattr(backend, "weight_sum_bytes", weight_sum_bytes)
    sums = sum_bytes(N, H, V, dtype, stored=chosen == "keep") if need_weight else 0
    head_buffer = head + sums
    gradients = scattered + head + need_bias * V * item
    if low_rank is not None:  # the operand of the rows and its gradient, which hidden's gradient is then added to
        gradients += sum(need * x.numel() * x.element_size() for need, x in zip((need_down, need_up), low_rank[:2]))
        outputs += M * R * statistic
        head_buffer += need_up * V * R * statistic
        casting += need_up * V * R * low_rank[1].element_size() * (low_rank[1].dtype.itemsize != statistic)
    # with an adapter, what A brings to dH comes beside it when the vectors of the rows may have gone
    rest = casting + max(scattered if indexed else 0, 2 * scattered - compact if R else 0)
    # a workspace counts to the end: the C++ engine keeps it from call to call, because fresh pages are expensive
    if chosen == "forward":
        space, stored = workspace(False), 0
        peak = outputs + space
    elif chosen == "unit":
        space, stored = workspace(True), vectors * compact
        peak = outputs + stored + space + scattered
    elif chosen == "coef":
        space, stored = workspace(need_rows or need_weight or need_bias or need_up), compact + head
        peak = outputs + compact + head_buffer + space + rest
    else:
        # the likeliest ids are found in the forward pass, and are targets in backward
        space = max(workspace(False), workspace(True, 0)) if want_top else workspace(True)
        stored = vectors * N * V * item if chosen == "keep" else 8 * N * want_top
        peak = outputs + stored + compact + head_buffer + space + rest
    why = plans.why(chosen, forced=plan is not None, several=late, best=want_top)
    if R and backend.NAME == "triton" and (chosen != "forward" or item != 2):
        why += "; the adapter's product is added to each chunk of logits, which is one more pass over it"
    reads = forward_gemms + backward_gemms
    traffic = reads * (N * H + V * H) * item + (outputs + gradients)
    return Cost(
        plan=chosen,
        why=why,
        backend=backend.NAME,
        rows=N,
        hidden_size=H,
        vocabulary=V,
        dtype=dtype,
        forward_gemms=forward_gemms,
        backward_gemms=backward_gemms,
        flops=2 * (forward_gemms + backward_gemms) * N * H * V + low_flops,
        passes=2 if chosen == "recompute" else 1,
        traffic_bytes=traffic,
        workspace_bytes=space,
        stored_bytes=stored,
        gradient_bytes=gradients,
        output_bytes=outputs,
        peak_bytes=peak,
        phases=roofline.phases(
            chosen, N, H, V, item, dhidden=need_rows, dweight=need_weight, vectors=vectors, rank=R, dlow=need_up
        ),
        weight_sum_bytes=sums,
    )
