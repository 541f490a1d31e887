"""Who divides a gradient: the loop, a loss of your own, head and body alike; nobody, in `accumulate`, but its denominator."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dllm_kernels import accumulate, elbo_loss, headless
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives import BGPO
from tests.plans import plan_of
from tests.tiny import eurobert

V, MASK = 101, 100


def loss_of(model, micro, ours):
    generator = torch.Generator().manual_seed(micro)
    ids = torch.randint(3, 10, (2, 6), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.5
    masked[:, 0] = True
    noisy = ids.masked_fill(masked, MASK)
    if not ours:
        return (F.cross_entropy(model(input_ids=noisy).logits[masked], ids[masked], reduction="none") / 0.5).sum() / ids.numel()
    with headless(model) as body:
        return elbo_loss(body(noisy), body.weight, ids, masked, torch.tensor(0.5), **body.options)


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def rl(micro):
    """A half of a batch, as the loop would hand it over."""
    half = slice(2 * micro, 2 * micro + 2)
    plan, batch = plan_of([5, 4, 6, 3], samples=3), Batch({"advantages": torch.tensor([1.0, -0.5, 2.0, -1.0])})
    return plan.cut(sequences=half), BGPO, batch.cut(sequences=half)


def test_accelerate_divides_a_loss_by_its_steps_of_accumulation_and_accumulate_by_its_denominator_alone():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = eurobert(vocab=V, dtype=torch.float32)
    found = {}
    for kind in ("ours", "plain", "accumulate"):
        prepared = accelerator.prepare(model)
        model.zero_grad()
        for micro in range(2):
            with accelerator.accumulate(prepared):
                if kind == "accumulate":
                    accumulate(prepared, *rl(micro), denominator=4.0)
                else:
                    accelerator.backward(loss_of(prepared, micro, kind == "ours"))
        assert accelerator.sync_gradients
        found[kind] = grads(model)
    close = {"rtol": 0, "atol": 5e-6}  # of gradients up to 2.5; MKL without AVX-512 is off by 1e-6
    assert_close(found["ours"], found["plain"], **close)
    model.zero_grad()
    (sum(loss_of(model, micro, False) for micro in range(2)) / 2).backward()
    assert_close(found["ours"], grads(model), **close)
    model.zero_grad()
    plan, batch = plan_of([5, 4, 6, 3], samples=3), Batch({"advantages": torch.tensor([1.0, -0.5, 2.0, -1.0])})
    accumulate(model, plan, BGPO, batch)
    assert_close(found["accumulate"], grads(model), **close)


def test_a_scaler_scales_a_loss_and_accumulate_takes_its_scale_in_the_denominator():
    model = eurobert(vocab=V, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = [p.detach().clone() for p in model.parameters()]

    def step(work, scaled):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        optimizer.zero_grad()
        work(scaled)
        if scaled:
            assert max(float(g.abs().max()) for g in grads(model)) > 10, "they are scaled"
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def by_loss(scaled):
        loss = loss_of(model, 0, True)
        (scaler.scale(loss) if scaled else loss).backward()

    def by_accumulate(scaled):
        scaler.scale(torch.zeros(()))  # a scaler makes its scale when it is first used
        accumulate(model, *rl(0), denominator=2.0 / (scaler.get_scale() if scaled else 1.0))

    for work in (by_loss, by_accumulate):
        found = step(work, True)
        assert_close(found, step(work, False), rtol=0, atol=1e-6)
        assert any(not torch.equal(one, other) for one, other in zip(found, start, strict=True))
