"""Run by test_kernels.py in a process of its own with TRITON_INTERPRET=1: what the head suite does not ask of the kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from dllm_kernels import noise
from dllm_kernels.backends import reference
from dllm_kernels.backends.contract import STATISTICS, HeadOptions, HeadProblem, LowRank
from dllm_kernels.backends.expectation import reference as passes
from dllm_kernels.backends.expectation.problem import Pull, Seen
from dllm_kernels.backends.triton import expectation, fused, head, products
from dllm_kernels.backends.triton.configs import CONFIGS
from tests.backends.problems import to_float64


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, options: bool, seed: int = 0) -> HeadProblem:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows + 3, width, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g) * 2.5 / width**0.5).to(dtype)
    target = torch.randint(vocabulary, (rows,), generator=g)
    if not options:
        return HeadProblem(hidden[:rows], weight, target)
    excluded = torch.rand(vocabulary, generator=g) < 0.2
    excluded[target] = False
    bias, temperature = torch.randn(vocabulary, generator=g), torch.rand(rows, generator=g) + 0.5
    suppress = tuple(excluded.nonzero()[:, 0].tolist())
    index = torch.randperm(rows + 3, generator=g)[:rows]
    return HeadProblem(hidden, weight, target, index, HeadOptions(bias, 3.0, temperature, suppress))


def fused_statistics_equal_the_float64_reference_with_plain_loads_and_with_descriptors() -> None:
    for (rows, width, vocabulary), dtype, options in (
        ((1, 1, 1), torch.bfloat16, False),
        ((70, 40, 193), torch.bfloat16, True),
        ((5, 33, 300), torch.float16, True),
        ((3, 64, 130), torch.float16, False),
    ):
        p = problem(rows, width, vocabulary, dtype, options=options)
        want = reference.run(to_float64(p), STATISTICS)
        found = []
        for descriptors in (False, True):
            got = {n: torch.full((rows,), -7, dtype=torch.int64 if n == "top_id" else torch.float32) for n in STATISTICS}
            fused.fused(head._plain(p), got, replace(CONFIGS["interpreter"][0], descriptors=descriptors))
            found.append(got)
            for name in STATISTICS:
                torch.testing.assert_close(got[name].to(want[name].dtype), want[name], rtol=2e-5, atol=2e-5)
        assert all(torch.equal(found[0][name], found[1][name]) for name in STATISTICS)


def with_adapter(p: HeadProblem, rank: int, dtype: torch.dtype) -> HeadProblem:
    g = torch.Generator().manual_seed(rank)
    u_MR = torch.randn(len(p.hidden_MH), rank, generator=g)
    return replace(p, low_rank=LowRank(u_MR, torch.randn(len(p.weight_VH), rank, generator=g).to(dtype)))


def an_adapter_joins_the_fused_kernel_in_fp32_and_its_gradients_need_no_fp32_operands() -> None:
    usual = products.logits_, fused.PARTS_BYTES
    for rank, own, dtype in (
        (1, torch.bfloat16, torch.bfloat16),
        (16, torch.bfloat16, torch.bfloat16),
        (19, torch.float32, torch.bfloat16),
        (5, torch.float16, torch.float16),
    ):
        p = with_adapter(problem(70, 40, 193, dtype, options=True), rank, own)
        exact = to_float64(p)
        fused.PARTS_BYTES, products.logits_ = 1, None  # several launches; and no chunk of logits
        got, key = head.run(p, STATISTICS), torch.arange(40) * 0x9E3779B97F4A7C15 >> 1
        few = replace(p, target_N=p.target_N[:40], index_N=p.index_N[:40], options=p.options.of_rows(slice(40)))
        drawn = head.sample(few, key, step=1, temperature=0.7)
        products.logits_, fused.PARTS_BYTES = usual
        want = reference.run(exact, STATISTICS)
        for name in STATISTICS:
            torch.testing.assert_close(got[name].to(want[name].dtype), want[name], rtol=2e-5, atol=2e-5)
        assert torch.equal(drawn["token"], reference.sample(to_float64(few), key, step=1, temperature=0.7)["token"])
        coef_N, found = torch.linspace(-1, 1, 70), []
        for backend, q in ((head, p), (reference, exact)):
            statistics = q.statistics_dtype
            dlow_VR = torch.ones(193, rank, dtype=statistics)
            vectors = backend.run(q, ("dhidden",), coef_N=coef_N.to(statistics), dlow_VR=dlow_VR)
            found.append((vectors["low_dhidden"].double(), dlow_VR.double() - 1))
        for ours, true in zip(*found):
            assert float((ours - true).norm() / true.norm()) < torch.finfo(dtype).eps


def draws_are_those_of_the_unscreened_reference_fused_and_by_rows() -> None:
    zero = torch.zeros((), dtype=torch.int64)
    for dtype, options, temperature in ((torch.bfloat16, True, 1.0), (torch.float16, False, 0.3), (torch.float32, True, 2.5)):
        p = problem(40, 16, 200, dtype, options=options)
        key = noise.row_bits(3, noise.Stream.TOKEN, zero, zero, torch.arange(40))
        want = reference.sample(to_float64(p), key, step=4, temperature=temperature)
        for few, own in ((64, temperature), (0, temperature), (64, torch.full((40,), temperature))):
            head.FEW_ROWS = few  # the fused kernel as for few rows and as for many, and a chunk of logits
            got = head.sample(p, key, step=4, temperature=own)
            assert torch.equal(got["token"], want["token"]), (dtype, few)
            for name in ("logp", "entropy", "lse"):
                torch.testing.assert_close(got[name].double(), want[name], rtol=2e-5, atol=2e-5)
        head.FEW_ROWS = 64
        got = head.sample(p, key, step=4, temperature=0.0)
        want = reference.sample(to_float64(p), key, step=4, temperature=0.0)
        assert torch.equal(got["token"], want["token"])
        torch.testing.assert_close(got["logp"].double(), want["logp"], rtol=2e-5, atol=2e-5)


def equal_logits_go_to_the_smallest_id_and_a_row_without_ids_ends() -> None:
    zeros = HeadProblem(torch.zeros(5, 4).half(), torch.zeros(300, 4).half(), torch.zeros(5, dtype=torch.int64))
    key = torch.arange(5)
    assert head.sample(zeros, key, step=0, temperature=0.0)["token"].tolist() == [0] * 5
    nothing = replace(zeros, options=HeadOptions(suppress=tuple(range(300))))
    for temperature in (0.0, 1.0):
        assert not head.sample(nothing, key, step=0, temperature=temperature)["lse"].isfinite().any()


def many_rows_are_launched_in_parts_with_the_same_bits() -> None:
    p = problem(150, 16, 200, torch.bfloat16, options=True)
    want = head.run(p, STATISTICS)
    fused.PARTS_BYTES = 1  # one block of rows per launch
    got = head.run(p, STATISTICS)
    assert all(torch.equal(got[name], want[name]) for name in STATISTICS)


def passes_of_soft_embeddings_round_what_16_bit_products_read() -> None:
    """On a CPU no product takes 16 bits, so that the suite does not come here: two slabs of which the second is not full."""
    g = torch.Generator().manual_seed(0)
    for rows, ids in ((5, 37), (70, 300)):
        z, pull = torch.randn(2, ids, rows, generator=g).mul_(3).unbind()
        z[3:5] = float("-inf")
        seen = [
            Seen(torch.full((rows,), float("-inf"), dtype=dtype), torch.zeros(rows, dtype=torch.float64))
            for dtype in (torch.float32, torch.float64)
        ]
        for shift in (0.0, 1.0):
            narrow, exact = torch.empty(ids, rows, dtype=torch.bfloat16), torch.empty(ids, rows, dtype=torch.float64)
            scale = expectation.soften(z + shift, seen[0], narrow)
            torch.testing.assert_close(scale.double(), passes.soften((z + shift).double(), seen[1], exact), rtol=1e-6, atol=0)
            torch.testing.assert_close(narrow.double(), exact, rtol=2.0**-8, atol=1e-37)
            torch.testing.assert_close(seen[0].sum_N, seen[1].sum_N, rtol=1e-6, atol=0)
        vectors = seen[0].top_N, (1 / seen[0].sum_N).float(), Pull(*torch.rand(3, rows, generator=g))
        wide = vectors[0].double(), vectors[1].double(), Pull(*(x.double() for x in vectors[2] if x is not None))
        got, want = torch.empty(2, ids, rows, dtype=torch.bfloat16), torch.empty(2, ids, rows, dtype=torch.float64)
        expectation.pull(z, pull, *vectors, *got)
        passes.pull(z.double(), pull.double(), *wide, *want)
        torch.testing.assert_close(got.double(), want, rtol=2.0**-8, atol=1e-6)


def everything_compiles_ahead() -> None:
    head.warmup(16, 70, torch.float32, device="cpu")


CHECKS = (
    fused_statistics_equal_the_float64_reference_with_plain_loads_and_with_descriptors,
    an_adapter_joins_the_fused_kernel_in_fp32_and_its_gradients_need_no_fp32_operands,
    draws_are_those_of_the_unscreened_reference_fused_and_by_rows,
    equal_logits_go_to_the_smallest_id_and_a_row_without_ids_ends,
    many_rows_are_launched_in_parts_with_the_same_bits,
    passes_of_soft_embeddings_round_what_16_bit_products_read,
    everything_compiles_ahead,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in CHECKS:
        check()
        print(check.__name__, flush=True)
