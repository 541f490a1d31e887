"""BGPO against the number of Monte-Carlo samples n_t: peak memory, seconds, and equal gradients, on a small EuroBERT.

Off-policy, so that coefficients depend on the scores; every token masked with probability 0.5, so that samples are alike
and n_t is all that changes (under BGPO's own law the largest of more samples is larger). Three ways to one gradient:

    ours        `accumulate`: one sample at a time
    ours (loop) `bgpo_loss` in a loop written by hand
    full graph  pure PyTorch as the published sequence-level trainers (d1, GDPO, ESPO) score: logits of every position,
                an fp32 log-softmax over the completion, the graphs of all samples alive until one backward

The model, masks, noise, old scores and advantages are the same, and a gradient off the float64 one fails the run.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.registry import Case, Contestant, Prepared, Result, Row, Runner, Settings, Suite, relative_error
from dllm_kernels import MaskPlan, accumulate, bgpo_loss, headless, make_mask_plan
from dllm_kernels.accumulation import score_samples
from dllm_kernels.objectives import BGPO, Batch

SAMPLES = (1, 2, 4, 8, 16, 32)
SIZES = {"B": 2, "S": 64, "L": 48, "H": 64, "V": 32768}
TINY = {"B": 2, "S": 12, "L": 8, "H": 16, "V": 64}
TOLERANCE = {"float32": {"loss": 1e-4, "gradient": 1e-4}, "bfloat16": {"loss": 0.2, "gradient": 0.1}}


@dataclass(frozen=True)
class _Inputs:
    model: nn.Module
    plan: MaskPlan
    old_elbo_BK: Tensor
    advantages_B: Tensor
    prompt: int

    def result(self, loss: Tensor) -> Result:
        return {"loss": loss.detach()} | {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def _inputs(sizes: Mapping[str, int], dtype: torch.dtype) -> _Inputs:
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    B, S, L, H, V, K = (sizes[key] for key in ("B", "S", "L", "H", "V", "K"))
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=2 * H,
        num_hidden_layers=2,
        num_attention_heads=max(1, H // 32),
        num_key_value_heads=max(1, H // 32),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=V - 1,
    )
    model = EuroBertForMaskedLM(config).to(dtype)
    input_ids_BS = torch.randint(3, V - 1, (B, S))
    completion_mask_BS = torch.zeros(B, S, dtype=torch.bool)
    completion_mask_BS[:, S - L :] = True
    plan = make_mask_plan(
        input_ids_BS,
        completion_mask_BS,
        law="bernoulli",
        t=0.5,
        samples=K,
        seed=1,
        sequence_ids=torch.arange(B),
        mask_id=V - 1,
    )
    old_elbo_BK = score_samples(model, plan) + 0.3 * torch.randn(B, K)
    advantages_B = torch.linspace(-1.0, 1.0, B)
    return _Inputs(model, plan, old_elbo_BK, advantages_B, S - L)


def cases(settings: Settings) -> list[Case]:
    shape = {**(TINY if settings.tiny else SIZES), **settings.shape}
    largest = shape.pop("K", 2 if settings.tiny else SAMPLES[-1])
    return [
        Case(
            name=f"n_t={n}",
            sizes={**shape, "K": n},
            tiny={**TINY, "K": min(n, 2)},
            setup=functools.partial(_setup, dtype=settings.torch_dtype),
            flops=0.0,
            tolerance=TOLERANCE["float32" if settings.dtype == "float32" else "bfloat16"],
        )
        for n in SAMPLES
        if n <= largest
    ]


def _setup(sizes: Mapping[str, int], *, dtype: torch.dtype) -> Prepared:
    x = _inputs(sizes, dtype)
    return Prepared(
        (
            Contestant("ours", "ours", functools.partial(_accumulate, x), note="accumulate"),
            Contestant("ours (loop)", "ours", functools.partial(_loop, x), note="bgpo_loss by hand"),
            Contestant("full graph", "peer", functools.partial(_full_graph, x), note="all n_t graphs kept"),
        ),
        _Oracle(x),
        sum(p.nbytes for p in x.model.parameters()),
    )


def _accumulate(x: _Inputs) -> Runner:
    batch = Batch({"advantages": x.advantages_B}, {"old_sample_elbo": x.old_elbo_BK})

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        return x.result(accumulate(x.model, x.plan, BGPO, batch).loss)

    return run


def _loop(x: _Inputs) -> Runner:
    K = x.plan.shape[0]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        with headless(x.model) as body:
            for k in range(K):
                one = x.plan.cut(samples=slice(k, k + 1))
                loss = bgpo_loss(
                    body(one.noisy_ids[0]),
                    body.weight,
                    one.input_ids_BS,
                    one.masked[0],
                    one.weight_KB[0][:, None],
                    x.old_elbo_BK[:, k],
                    x.advantages_B,
                    samples=K,
                )
                loss.backward()
                total += loss.detach()
        return x.result(total)

    return run


def bgpo_in_pytorch(elbo_BK: Tensor, old_elbo_BK: Tensor, advantages_B: Tensor) -> Tensor:
    """BGPO's loss in four lines (arXiv 2510.11683), independent of the library's."""
    d_BK, A_B1 = elbo_BK - old_elbo_BK, advantages_B[:, None]
    ratio_BK = torch.where(A_B1 >= 0, 1 + d_BK, torch.exp(torch.where(A_B1 >= 0, 0.0, d_BK)))
    return -(A_B1 * ratio_BK).mean(1).mean()


def _full_graph(x: _Inputs) -> Runner:
    plan, prompt = x.plan, x.prompt
    target_BL1 = plan.input_ids_BS[:, prompt:, None]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        elbos = []
        for k in range(plan.shape[0]):
            one = plan.cut(samples=slice(k, k + 1))
            logits_BSV = x.model(input_ids=one.noisy_ids[0]).logits
            logp_BL = logits_BSV[:, prompt:].float().log_softmax(-1).gather(-1, target_BL1)[..., 0]
            elbos.append((logp_BL * one.masked[0, :, prompt:]).sum(-1) * one.weight_KB[0])
        loss = bgpo_in_pytorch(torch.stack(elbos, 1), x.old_elbo_BK, x.advantages_B)
        loss.backward()
        return x.result(loss)

    return run


class _Oracle:
    """Errors against pure PyTorch in float64, one sample at a time."""

    def __init__(self, x: _Inputs) -> None:
        self.x = x

    @functools.cached_property
    def true(self) -> Result:
        x = self.x
        model, (K, B, S) = copy.deepcopy(x.model).double(), x.plan.shape
        model.zero_grad(set_to_none=True)
        body, weight_VH = model.get_submodule("model"), model.get_parameter("lm_head.weight")
        total = torch.zeros((), dtype=torch.float64)
        for k in range(K):
            one = x.plan.cut(samples=slice(k, k + 1))
            rows = one.rows
            hidden_MH = body(input_ids=one.noisy_ids[0]).last_hidden_state.view(B * S, -1)
            logp_N = (hidden_MH[rows.index] @ weight_VH.t()).log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
            elbo_B = logp_N.new_zeros(B).index_add(0, rows.sequence, logp_N) * one.weight_KB[0]
            loss = bgpo_in_pytorch(elbo_B[:, None], x.old_elbo_BK[:, k : k + 1].double(), x.advantages_B.double()) / K
            loss.backward()
            total += loss.detach()
        return {"loss": total} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def __call__(self, result: Result) -> dict[str, float]:
        if result.keys() != self.true.keys():
            raise ValueError(f"gradients of {sorted(result.keys() ^ self.true.keys())} are missing or unexpected")
        names = [name for name in self.true if name != "loss"]
        return {
            "loss": float((result["loss"].double() - self.true["loss"]).abs()),
            "gradient": relative_error([result[n] for n in names], [self.true[n] for n in names]),
        }


# LLaDA-8B in bf16 with the paper's 512-token responses (ALGORITHMS.md section 5; prompt of 512 assumed)
PAPER = {"V": 126464, "S": 1024, "L": 512, "H": 4096}
PUBLISHED = {1: "fits", 2: "fits", 4: "fits (math); out of memory for code", 8: "out of memory", 16: "out of memory (follows)"}


def arithmetic() -> list[dict[str, Any]]:
    """Head tensors per sequence and policy update at the paper's size, in GiB: computed, not measured."""
    V, S, L, H = (PAPER[key] for key in ("V", "S", "L", "H"))
    gib, masked = 1 << 30, L // 2  # mean number of masked tokens
    # per sample: bf16 logits [S, V], the zero buffer of that size that the port fills, the masked rows' fp32 log-softmax
    per_sample = 2 * S * V * 2 + masked * V * 4
    # whatever n_t is: the GPU workspace, an fp32 dW, one sample's unit vectors and hidden gradient
    ours = (512 << 20) + 4 * H * V + 2 * masked * H + 2 * S * H
    return [
        {
            "n_t": n,
            "full graph GiB": round(n * per_sample / gib, 2),
            "ours GiB": round(ours / gib, 2),
            "published, 80 GB GPUs": verdict,
        }
        for n, verdict in PUBLISHED.items()
    ]


def summary(rows: Sequence[Row]) -> str:
    by = {(row["contestant"], row["sizes"]["K"]): row for row in rows if row["status"] == "ok"}
    measured = sorted(n for name, n in by if name == "ours" and by[name, n]["memory_mib"])
    if not measured or ("full graph", measured[-1]) not in by:
        return "bgpo: ours or the full graph did not run at the largest n_t"
    # from 2 on: only the first backward has no earlier gradients to be added to
    first, last = next((n for n in measured if n > 1), measured[0]), measured[-1]
    parts = [f"extra memory from n_t = {first} to {last}"]
    for name in ("ours", "full graph"):
        low, high = by[name, first]["memory_mib"], by[name, last]["memory_mib"]
        parts.append(f"{name} {low:.0f} to {high:.0f} MiB ({high / low - 1:+.0%})" if low and high else f"{name} unknown")
    ratio = by["ours", last]["to_baseline"]
    if ratio:
        parts.append(f"time at n_t = {last}: {ratio:.2f} x the full graph's")
    equal = max(row["errors"]["gradient"] for row in by.values())
    return "; ".join(parts) + f"; gradients equal to {equal:.0e}"


SUITE = Suite(
    name="bgpo",
    title="BGPO: peak memory and time against the number of Monte-Carlo samples n_t",
    cases=cases,
    baseline="full graph",
    error_columns=("loss", "gradient"),
    shape_keys=("B", "S", "L", "H", "V", "K"),
    summary=summary,
    plot=plots.curves_over_n_t,
    arithmetic=arithmetic,
    arithmetic_title="head tensors per sequence in the paper's setting (LLaDA-8B, bf16; its micro-batch is not published)",
    preload=("transformers.models.eurobert.modeling_eurobert",),
)
