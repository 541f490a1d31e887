"""What only a GPU can tell of the Triton backend, beside the head suite: graphs, synchronisation, memory, equal tokens."""

from __future__ import annotations

import pytest
import torch

from dllm_kernels import noise, sample_tokens, score_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; benchmarks/gpu.sh runs it there")

MB = 2**20


def inputs(rows=300, width=64, vocabulary=3001, dtype=torch.bfloat16, device="cuda"):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=g) * 2.5 / width**0.5).to(device, dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=g).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [32, 300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_cpu(dtype, rows, temperature):
    hidden, weight, _ = inputs(rows, dtype=dtype)
    zero = torch.zeros((), dtype=torch.int64)
    key = noise.row_bits(1, noise.Stream.TOKEN, zero, zero, torch.arange(rows))
    here = sample_tokens(hidden, weight, key.cuda(), temperature=temperature, suppress=(7,))
    there = sample_tokens(hidden.cpu(), weight.cpu(), key, temperature=temperature, suppress=(7,))
    assert (here.token.cpu() != there.token).sum() <= 1  # two perturbed logits within 1e-5
    same = here.token.cpu() == there.token
    torch.testing.assert_close(here.logp.cpu()[same], there.logp[same], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(here.entropy.cpu(), there.entropy, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["every other column", "misaligned", "transposed"])
def test_a_weight_that_no_descriptor_fits_gives_the_statistics_of_one_that_does(layout):
    hidden, weight, target = inputs()
    views = {
        "every other column": lambda: weight.repeat_interleave(2, 1)[:, ::2],
        "misaligned": lambda: torch.cat([weight[:, :1], weight], 1)[:, 1:],
        "transposed": lambda: weight.t().contiguous().t(),
    }
    whole, view = score_tokens(hidden, weight, target), score_tokens(hidden, views[layout](), target)
    torch.testing.assert_close(whole.logp, view.logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["forward", "unit", "coef", "sample"])
def test_a_captured_call_replays_with_new_inputs(plan):
    hidden, weight, target = inputs()
    key = torch.arange(len(target), device="cuda")

    def call():
        if plan == "forward":
            return score_tokens(hidden, weight, target).logp
        if plan == "sample":
            return sample_tokens(hidden, weight, key, suppress=(7,)).token
        leaf = hidden.detach().requires_grad_()
        if plan == "coef":
            score_tokens(leaf, weight, target, coef=torch.ones_like(target, dtype=torch.float32)).weighted_sum.backward()
        else:
            score_tokens(leaf, weight, target).logp.sum().backward()
        return leaf.grad

    call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    hidden.mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, call())


@pytest.mark.parametrize("plan", ["forward", "unit", "keep", "recompute", "coef", "sample"])
def test_nothing_waits_for_the_gpu(plan):
    hidden, weight, target = inputs()
    leaf, head = hidden.requires_grad_(plan != "forward"), weight.requires_grad_(plan in ("keep", "recompute", "coef"))
    coef = torch.ones(len(target), device="cuda")

    def call():
        if plan == "sample":
            sample_tokens(hidden.detach(), weight.detach(), target)
        elif plan == "coef":
            score_tokens(leaf, head, target, coef=coef).weighted_sum.backward()
        else:
            scores = score_tokens(leaf, head, target, plan=plan)
            if plan != "forward":
                scores.logp.backward(coef)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", ["forward", "unit", "coef"])
def test_memory_beside_the_results_is_the_workspace(plan):
    rows, width, vocabulary = 4096, 512, 126464
    hidden, weight, target = inputs(rows, width, vocabulary)
    leaf = hidden.requires_grad_(plan != "forward")
    coef = torch.ones(rows, device="cuda")

    def call():
        leaf.grad = None
        if plan == "coef":
            score_tokens(leaf, weight, target, coef=coef).weighted_sum.backward()
        else:
            scores = score_tokens(leaf, weight, target, plan=plan)
            if plan == "unit":
                scores.logp.backward(coef)

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    stored = 0 if plan == "forward" else 4 * rows * width  # the vectors and the gradient, 2 bytes each
    assert torch.cuda.max_memory_allocated() - before <= 512 * MB + stored + 32 * MB
