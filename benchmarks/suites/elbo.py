"""ELBOs from K masked samples and their gradients: memory and time against K, and every mask law.

    score   per-sequence ELBOs without a gradient
    train   minus their mean, with gradients into the whole model
    law X   `score` under each law of `dllm_kernels.masks.laws`, at small sizes

    ours                 `estimate_elbo`, or `accumulate`: one sample at a time, masked rows alone
    full logits          pure PyTorch as the published trainers score: all K * B masked sequences in one
                         batch, logits of every position, an fp32 log-softmax over the completion, a gather;
                         under `train` all graphs until one backward
    one pass per sample  the same for one sample of every sequence at a time, with a backward after each

All draw their masks from the same plan within their call. The variance of the estimators is the study
`variance`.

What is off the float64 one by the published form fails the run. Operations by formula are products with
parameters. Torch's counter finds the same but for attention, which it does not know on a CPU; `Report.flops`
has the weights of norms too, 0.1 %.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plots, registry, report
from benchmarks.registry import EUROBERT, Case, Contestant, Oracle, Result, Row, Settings, Sizes, Suite, Work
from dllm_kernels import MaskPlan, accumulate, estimate_elbo, make_mask_plan
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.laws import LAWS

TINY = {"B": 2, "S": 12, "L": 8, "H": 16, "V": 64, "layers": 1}
SEED = 1
VALUES = ("elbo", "loss")  # of a result, beside gradients


def against(exact: Callable[[], Result], called: str) -> Oracle:
    """Errors against the exact result, computed on first use; its value is an ELBO or a loss."""
    exact = functools.cache(exact)

    def errors(result: Result) -> dict[str, float]:
        true = exact()
        gradient, value = registry.gradient_error(result, true, *VALUES), "loss" if "loss" in true else "elbo"
        found = {called: float((result[value].double() - true[value]).abs().max())}
        return found | ({"gradient": gradient} if len(true) > 1 else {})

    return errors


def double(x: Any) -> Any:
    """The same inputs with the model in float64."""
    return replace(x, model=copy.deepcopy(x.model).double())


def accumulated(model: nn.Module, plan: MaskPlan, objective: Objective, batch: Batch, note: str, **cut: int) -> Work:
    def run() -> Result:
        model.zero_grad(set_to_none=True)
        done = accumulate(model, plan, objective, batch, **cut)
        work.flops = float(done.flops)
        return {"loss": done.loss} | registry.gradients(model)

    work = Work(run, note=note)
    return work


SAMPLES = (1, 4, 16)
SAMPLES_IN_FULL = (1, 4, 16, 64, 256)
BOUND_AT = 16  # samples up to which a pass per sample is worth its time
_FULL = {"B": 2, "S": 64, "L": 56, "H": 32, "V": 126464, "layers": 2}
SIZES = Sizes(TINY, {"B": 1, "S": 24, "L": 20, "H": 16, "V": 126464, "layers": 1}, _FULL)
LAW_SIZES = Sizes(TINY, {"B": 2, "S": 24, "L": 16, "H": 32, "V": 2048, "layers": 1}, _FULL)
LAW_SAMPLES = {"coupled": 5, "quadrature": 6}  # odd from 3; a multiple of the nodes
OTHER_LAWS = 4
FITS = 6 << 30  # bytes of logits that full logits may hold

# minus the mean ELBO: the coefficients of the log-probs are the plan's own weights
MINUS_ELBO = Objective(
    name="minus the ELBO",
    contributions=lambda logp_N, plan, batch: -plan.score(logp_N).sum(),
    coupling="none",
    on_policy_coupling="none",
    denominator="sequences",
    old_scores=None,
)


@dataclass(frozen=True)
class Data:
    """Sequences, and what `estimate_elbo` and `make_mask_plan` take beside them."""

    input_ids_BS: Tensor
    completion_mask_BS: Tensor
    arguments: Mapping[str, Any]

    def plan(self) -> MaskPlan:
        return make_mask_plan(self.input_ids_BS, self.completion_mask_BS, **self.arguments)


def make_data(sizes: Mapping[str, int], law: str, device: str, seed: int = SEED, **options: Any) -> Data:
    B, S, L, V, K = (sizes[key] for key in ("B", "S", "L", "V", "K"))
    generator = torch.Generator().manual_seed(seed)
    input_ids_BS = torch.randint(3, V - 1, (B, S), generator=generator)
    completion_mask_BS = (torch.arange(S) >= S - L).expand(B, S).contiguous()
    if law == "block":
        options["block_length"] = max(1, L // 4)
    if law in ("trace", "segments"):  # a rollout of K steps, which decided the tokens in any order
        order_BL = torch.rand(B, L, generator=generator).argsort(-1)
        step_map_BS = torch.full((B, S), -1).masked_scatter(completion_mask_BS, order_BL * K // L)
        options["step_map_BS"] = step_map_BS.to(device)
        if law == "segments":
            options["segments"] = K
    ids_B = torch.arange(B, device=device)
    arguments = {"law": law, "samples": K, "seed": SEED, "sequence_ids": ids_B, "mask_id": V - 1, **options}
    return Data(input_ids_BS.to(device), completion_mask_BS.to(device), arguments)


@dataclass(frozen=True)
class Scoring:
    """Inputs of the suite `elbo`: everybody scores the masks of `plan`."""

    model: nn.Module
    data: Data
    plan: MaskPlan
    sizes: Mapping[str, int]
    gradients: bool

    @property
    def prompt(self) -> int:
        return self.sizes["S"] - self.sizes["L"]

    def operations(self, tokens: float, rows: float) -> float:
        return registry.operations(registry.multiplied_parameters(self.model), tokens, rows, self.sizes, gradients=self.gradients)

    def result(self, elbo_B: Tensor) -> Result:
        return {"loss": -elbo_B.mean()} | registry.gradients(self.model) if self.gradients else {"elbo": elbo_B}


def _scoring(sizes: Mapping[str, int], *, law: str, gradients: bool, dtype: torch.dtype, device: str) -> Scoring:
    model = registry.small_model(V=sizes["V"], H=sizes["H"], layers=sizes["layers"], dtype=dtype, device=device)
    data = make_data(sizes, law, device)
    return Scoring(model, data, data.plan(), sizes, gradients)


def least(sizes: Mapping[str, int], law: str, *, gradients: bool = False) -> float:
    """The body on every masked sequence that is scored, the head on its masked rows."""
    counts_KB = make_data(sizes, law, "cpu").plan().counts
    tokens = int((counts_KB > 0).sum()) * sizes["S"]
    return registry.operations(registry.body_parameters(sizes), tokens, int(counts_KB.sum()), sizes, gradients=gradients)


def cases(settings: Settings) -> list[Case]:
    """Raises ValueError for a completion longer than its sequence."""
    largest = settings.shape.get("K", 0)
    samples = [n for n in (SAMPLES_IN_FULL if settings.full or largest else SAMPLES) if n <= (largest or n)]
    sizes, law_sizes = SIZES.of(settings), LAW_SIZES.of(settings)
    if sizes["L"] > sizes["S"] or law_sizes["L"] > law_sizes["S"]:
        raise ValueError(f"--shape of elbo takes L of at most S, got {dict(settings.shape)} beside {sizes}")
    nats, relative = (1e-4, 1e-4) if settings.dtype == "float32" else (2e-2, 0.1)

    def case(name: str, law: str, sizes: Mapping[str, int], K: int, contestants: tuple[Contestant, ...]) -> Case:
        own, few = {**sizes, "K": K}, contestants is OF_LAWS
        wanted: dict[str, Any] = {"law": law, "gradients": name == "train"}
        return Case(
            name=name,
            sizes=own,
            tiny={**TINY, "K": K if few else min(K, 2)},
            inputs=functools.partial(_scoring, **wanted, dtype=settings.torch_dtype, device=settings.device),
            contestants=contestants,
            oracle=lambda x: against(_full_logits(double(x), together=False).run, "elbo"),
            tolerance={"elbo": nats * own["L"], "gradient": relative},  # ELBOs are sums of so many tokens
            flops=least(own, **wanted),
            output_bytes=lambda x: sum(p.nbytes for p in x.model.parameters()) if x.gradients else 4 * x.sizes["B"],
        )

    curves = [(name, K) for name in ("score", "train") for K in (samples[:2] if settings.tiny else samples)]
    return [
        *(case(name, "exact", sizes, K, CONTESTANTS) for name, K in curves),
        *(case(f"law {law}", law, law_sizes, LAW_SAMPLES.get(law, OTHER_LAWS), OF_LAWS) for law in LAWS),
    ]


def _ours(x: Scoring) -> Work:
    if x.gradients:
        return accumulated(x.model, x.plan, MINUS_ELBO, Batch(), "accumulate")
    body = x.operations(int((x.plan.counts > 0).sum()) * x.plan.shape[2], 0)
    row = x.operations(0, 1)

    def run() -> Result:
        estimate = estimate_elbo(x.model, x.data.input_ids_BS, x.data.completion_mask_BS, **x.data.arguments)
        work.flops = body + row * estimate.rows
        return {"elbo": estimate.elbo_B}

    work = Work(run, note="estimate_elbo")
    return work


def _full_logits(x: Scoring, *, together: bool) -> Work:
    """All samples in one batch, or one after the other."""
    (K, B, S), target_BL = x.plan.shape, x.data.input_ids_BS[:, x.prompt :]
    samples, exact = K if together else 1, torch.promote_types(x.model.dtype, torch.float32)

    def run() -> Result:
        plan = x.plan if x.gradients else x.data.plan()
        coef_KBS = plan.scored * plan.weight_KB[..., None] * plan.share_K[:, None, None]
        ready = zip(plan.noisy_ids.split(samples), coef_KBS[..., x.prompt :].split(samples), strict=True)
        x.model.zero_grad(set_to_none=True)
        elbo_B = torch.zeros(len(target_BL), device=target_BL.device, dtype=exact)
        with nullcontext() if x.gradients else torch.no_grad():
            for ids_kBS, coef_kBL in ready:
                target_ML1 = target_BL.expand(coef_kBL.shape).flatten(0, 1)[..., None]
                logits_MLV = x.model(input_ids=ids_kBS.flatten(0, 1)).logits[:, x.prompt :]
                logp_ML = logits_MLV.to(exact).log_softmax(-1).gather(-1, target_ML1)[..., 0]
                del logits_MLV
                part_B = (logp_ML.view_as(coef_kBL) * coef_kBL).sum((0, 2))
                if x.gradients:
                    (-part_B.mean()).backward()
                elbo_B += part_B.detach()
        return x.result(elbo_B)

    return Work(run, x.operations(K * B * S, K * B * S), f"logits of all rows of {'all samples' if together else 'a sample'}")


def _together_applies(x: Scoring) -> str:
    """Its logits, or their gradient, and two of the completion: its logits in fp32, its log-softmax."""
    (K, B, S), V = x.plan.shape, x.sizes["V"]
    size = 4 * V * K * B * (S + 2 * (S - x.prompt))
    reason = f"fp32 logits [{K * B}, {S}, {V}] and two of the completion take {size / 2**30:.0f} GiB"
    return reason if size > FITS else ""


def _one_by_one_applies(x: Scoring) -> str:
    K = x.sizes["K"]
    return f"{K} times what it does at K = 1, at the same memory: minutes a call" if K > BOUND_AT else ""


CONTESTANTS = (
    Contestant("ours", "ours", _ours),
    Contestant("full logits", "peer", functools.partial(_full_logits, together=True), _together_applies),
    Contestant("one pass per sample", "peer", functools.partial(_full_logits, together=False), _one_by_one_applies),
)
OF_LAWS = (CONTESTANTS[0], CONTESTANTS[2])


def _plot(rows: Sequence[Row], path: Path) -> None:
    families = {name: [row for row in rows if report.family(row) == name] for name in ("score", "train")}
    plots.curves_over_samples(families, path, title="ELBOs, EuroBERT")


SUITES = {
    "elbo": Suite(
        name="elbo",
        title="ELBOs of K masked samples and their gradients: memory and time against K, and every mask law",
        cases=cases,
        baseline="one pass per sample",
        error_columns=("elbo", "gradient"),
        shape_keys=(*TINY, "K"),
        plot=_plot,
        preload=(EUROBERT,),
    ),
}
