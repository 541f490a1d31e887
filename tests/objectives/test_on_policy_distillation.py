"""On-policy distillation: loops over tokens, and the exact gradient of KL(student || teacher) in expectation."""

import pytest
import torch

from dllm_kernels.objectives.on_policy_distillation import on_policy_distillation
from tests.objectives import loops
from tests.objectives.loops import F64, ragged


@pytest.mark.parametrize("epsilon", [0.2, 0.0])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 2, 3, 0]])
def test_equals_loops_over_tokens(epsilon, lengths):
    logp, old, teacher = loops.logps(4, 5)
    total, gradient, count = 0.0, [[0.0] * 5 for _ in range(4)], sum(lengths)
    for b, length in enumerate(lengths):
        for token in range(length):
            advantage = float(teacher[b, token] - old[b, token])
            value, slope = loops.surrogate(float(logp[b, token] - old[b, token]), advantage, epsilon, epsilon)
            total -= value / count
            gradient[b][token] = -slope / count
    loops.check(on_policy_distillation(logp, old, teacher, ragged(lengths, 5), epsilon=epsilon), logp, total, gradient)


def test_on_policy_the_mean_over_drawn_tokens_is_the_gradient_of_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, generator=generator, dtype=F64) for _ in range(2))
    student.requires_grad_()
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    (true,) = torch.autograd.grad((q.exp() * (q - p)).sum(), student, retain_graph=True)
    mean = torch.zeros_like(true)
    one = torch.ones(1, 1, dtype=torch.bool)
    for token in range(7):
        logp = q[token].view(1, 1)
        loss = on_policy_distillation(logp, logp.detach(), p[token].view(1, 1), one)
        mean += q[token].exp().detach() * torch.autograd.grad(loss, student, retain_graph=True)[0]
    torch.testing.assert_close(mean, true)


def test_what_is_not_scored_may_hold_anything():
    logp, old, teacher = loops.logps(4, 5)
    mask = ragged([5, 2, 3, 1], 5)
    want = torch.autograd.grad(on_policy_distillation(logp, old, teacher, mask), logp)[0]
    filled = logp.detach().masked_fill(~mask, torch.inf).requires_grad_()
    others = (x.masked_fill(~mask, torch.nan) for x in (old, teacher))
    assert torch.equal(torch.autograd.grad(on_policy_distillation(filled, *others, mask), filled)[0], want)
