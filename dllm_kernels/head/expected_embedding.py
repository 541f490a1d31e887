"""The mean embedding of a head's distribution, from hidden states, without logits: "soft embeddings"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.head import expectation, expectation_ops, ops
from dllm_kernels.head import low_rank as adapter
from dllm_kernels.head.expectation_autograd import Expect
from dllm_kernels.head.options import _refuse_transforms, autocast_operands, check_arguments, make_problem


def expected_embedding(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """`softmax(logits) E`: the mean row of an embedding under the head's distribution, at each selected row of hidden.

    What a diffusion model that conditions on its own last prediction (arXiv 2208.04202) feeds back in place of one token's
    embedding. With `z_v` the final logits, as in `score_tokens`, and `p = softmax(z)`:

        `out = sum_v p_v E_v`,  `d out / d z_v = p_v (E_v - out)`

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64. weight: `[V, H]` in its dtype.
        embedding: `[V, D]`, any of these dtypes (float64 with float64 hidden states only). None: the weight itself, as where
            head and embedding are tied; an adapter of the head (`low_rank`) is no part of it then.
        rows, bias, softcap, temperature, suppress, valid_vocab, low_rank: as in `score_tokens`. Ids without probability add
            nothing, whatever weight and embedding hold there.

    Returns `[N, D]` in the embedding's dtype, of sums in float32 (float64 for float64 hidden states). A model that scales its
    embeddings scales the result likewise, in place if it likes.

    Differentiable in hidden, weight, embedding, bias, A and B, as plain PyTorch is: the weight of a tied embedding gets the sum
    of both its parts. Who wants the gradient of one part only detaches the others, `weight.detach()`. Nothing of size N x V is
    held, not for backward either, which makes the logits again: it reads hidden, weight and embedding, which must not change
    in place until then, or PyTorch raises. Two products of 2 N H V operations forward; backward two, and one more for each
    gradient that is wanted. Double backward is not supported. torch.compile and FlopCounterMode see one custom op with one
    more for its backward (`dllm_kernels.head.expectation_ops`).

    Raises ValueError or TypeError naming the argument; for a DTensor, which has to be gathered first; for a row whose logits are
    not finite on the CPU always, on a GPU under DLLM_KERNELS_VALIDATE=1.

    Example:
        >>> hidden, weight = torch.randn(2, 4, 8), torch.randn(11, 8)
        >>> soft = expected_embedding(hidden, weight, rows=torch.tensor([1, 6]), suppress=(10,), temperature=0.7)
        >>> soft.shape
        torch.Size([2, 8])
    """
    options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
    checks.require_tensor("hidden", hidden)
    table = None if embedding is weight else embedding
    hidden, weight = autocast_operands(hidden, weight)
    count = rows.numel() if isinstance(rows, Tensor) else hidden.numel() // max(1, hidden.shape[-1] if hidden.dim() else 1)
    check_arguments(hidden, weight, rows, count, options)
    if table is not None:
        _, table = autocast_operands(hidden, table)
        check_embedding(hidden, weight, table)
    if options.low_rank is not None:
        ops.observed(hidden)  # a counter at work learns the formula of the adapter's product before it runs
    pair = adapter.pair(hidden, options)
    number_N = hidden.new_empty(count)  # stands for targets, of which nothing but the number is looked at
    if ops.observed(hidden, weight, bias, pair[1], table):
        return expectation_ops.run(hidden, weight, table, number_N, rows, options, pair)
    problem = make_problem(hidden, weight, number_N, rows, options, pair)
    leaves = hidden, weight, table, bias, *pair
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        found: Tensor = Expect.apply(*leaves, problem)
        return found
    return expectation.forward(problem, table, False).expected_ND


def check_embedding(hidden: Tensor, weight: Tensor, embedding: Tensor) -> None:
    """Raise TypeError or ValueError for what is no embedding beside this head."""
    if not torch.compiler.is_compiling():
        _refuse_transforms(embedding=embedding)
    checks.dtype("embedding", embedding, checks.FLOATS)
    if type(embedding).__name__ == "DTensor":
        raise TypeError(
            "embedding must be a plain tensor, got a DTensor: "
            "gather it first, once per optimizer step, with embedding.full_tensor()"
        )
    checks.shape("embedding", embedding, [weight.shape[0], None])
    if not embedding.shape[1]:
        raise ValueError(f"embedding must have at least one column, got {list(embedding.shape)}")
    checks.same_device("embedding", embedding, "hidden", hidden)
    if embedding.dtype == torch.float64 != hidden.dtype:
        raise TypeError(f"embedding may be float64 only where hidden is, got {hidden.dtype} there")
