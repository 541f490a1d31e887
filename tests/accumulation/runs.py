"""An objective's gradient by `accumulate`, and by plain autograd over all rows."""

from dllm_kernels import accumulate
from tests import oracle
from tests.tiny import gradients


def run(model, plan, objective, batch, **options):
    """(report, gradients) of one call of `accumulate`."""
    model.zero_grad()
    report = accumulate(model, plan, objective, batch, **options)
    return report, gradients(model)


def full_graph(model, plan, objective, batch, denominator):
    """(loss, gradients) where every row runs, in one graph."""
    model.zero_grad()
    loss = objective.contributions(oracle.plan_logps(model, plan), plan, batch) / denominator
    loss.backward()
    return float(loss.detach()), gradients(model)
