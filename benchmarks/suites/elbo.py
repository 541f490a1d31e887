"""ELBOs of given sequences from K masked samples, and their gradients: memory and time against K, and every mask law.

    score   per-sequence ELBOs without a gradient
    train   minus their mean, with gradients into the whole model
    law X   `score` under each law of `dllm_kernels.masks.laws`, at small sizes

Three ways to the same numbers, under the same masks and weights:

    ours                 `estimate_elbo`, or `accumulate`: one sample at a time, masked rows alone
    full logits          pure PyTorch as the published trainers score: all K * B masked sequences in one batch, logits of every
                         position, an fp32 log-softmax over the completion, a gather; under `train` all graphs until one backward
    one pass per sample  the same for one sample of every sequence at a time, with a backward after each

All draw their masks from the same plan within their call. An ELBO or a gradient off the float64 one fails the run.

Operations by formula are products with parameters: 2 x parameters x tokens for the body and 2 H V for each row of the head,
three times that with gradients. That is what torch's counter finds too, but for attention, whose kernel it knows on a GPU and not
on a CPU. Of ours under `train` it is the engine's `Report.flops`, which takes the weights of norms for products as well, 6 times
their number for each token: less than 0.1 %.

The variance of the estimators at equal budgets is the study `variance`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.registry import (
    Case,
    Contestant,
    Prepared,
    Result,
    Row,
    Runner,
    Settings,
    Suite,
    multiplied_parameters,
    relative_error,
    small_model,
)
from dllm_kernels import MaskPlan, accumulate, estimate_elbo, make_mask_plan
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.laws import LAWS

SAMPLES = (1, 4, 16)
SAMPLES_IN_FULL = (1, 4, 16, 64, 256)
BOUND_AT = 16  # samples at which memory is compared with full logits
SIZES = {"B": 1, "S": 24, "L": 20, "H": 16, "V": 126464, "layers": 1}
SIZES_IN_FULL = {"B": 2, "S": 64, "L": 56, "H": 32, "V": 126464, "layers": 2}
LAW_SIZES = {"B": 2, "S": 24, "L": 16, "H": 32, "V": 2048, "layers": 1}
TINY = {"B": 2, "S": 12, "L": 8, "H": 16, "V": 64, "layers": 1}
LAW_SAMPLES = {"coupled": 5, "quadrature": 6}  # odd from 3; a multiple of the nodes
OTHER_LAWS = 4
SEED = 1
FITS = 6 << 30  # bytes of logits that full logits may hold


@dataclass(frozen=True)
class _Family:
    """What the contestants of a case compute: ELBOs under a law, or gradients of their mean as well."""

    law: str = "exact"
    gradients: bool = False


FAMILIES = {"score": _Family(), "train": _Family(gradients=True), **{f"law {name}": _Family(name) for name in LAWS}}

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
class _Data:
    """Sequences, and what `estimate_elbo` and `make_mask_plan` take beside them."""

    input_ids_BS: Tensor
    completion_mask_BS: Tensor
    arguments: Mapping[str, Any]

    def plan(self) -> MaskPlan:
        return make_mask_plan(self.input_ids_BS, self.completion_mask_BS, **self.arguments)


def _data(sizes: Mapping[str, int], law: str, device: str) -> _Data:
    B, S, L, V, K = (sizes[key] for key in ("B", "S", "L", "V", "K"))
    generator = torch.Generator().manual_seed(SEED)
    input_ids_BS = torch.randint(3, V - 1, (B, S), generator=generator)
    completion_mask_BS = (torch.arange(S) >= S - L).expand(B, S).contiguous()
    options: dict[str, Any] = {}
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
    return _Data(input_ids_BS.to(device), completion_mask_BS.to(device), arguments)


@dataclass(frozen=True)
class _Inputs:
    model: nn.Module
    data: _Data
    plan: MaskPlan  # the masks and weights of everybody
    prompt: int  # tokens of it
    gradients: bool

    def result(self, elbo_B: Tensor) -> Result:
        if not self.gradients:
            return {"elbo": elbo_B}
        return {"loss": -elbo_B.mean()} | self.gradient()

    def gradient(self) -> Result:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    @property
    def all_rows(self) -> int:
        K, B, S = self.plan.shape
        return K * B * S


def operations(parameters: int, tokens: int, rows: int, H: int, V: int, *, gradients: bool) -> float:
    """Of the products with parameters, attention left out; a backward pass takes twice as many as its forward."""
    return (6.0 if gradients else 2.0) * (parameters * tokens + rows * H * V)


def least(sizes: Mapping[str, int], family: _Family) -> float:
    """The body on every masked sequence that is scored, the head on its masked rows."""
    counts_KB = _data(sizes, family.law, "cpu").plan().counts
    H, V = sizes["H"], sizes["V"]
    parameters = sizes["layers"] * (4 + 3 * 4) * H * H  # of `small_model`: attention and a gated MLP four times as wide
    tokens = int((counts_KB > 0).sum()) * sizes["S"]
    return operations(parameters, tokens, int(counts_KB.sum()), H, V, gradients=family.gradients)


def cases(settings: Settings) -> list[Case]:
    """Raises ValueError for a completion longer than its sequence."""
    tiny, full, shape = settings.tiny, settings.full, dict(settings.shape)
    largest = shape.pop("K", 0)
    samples = [n for n in (SAMPLES_IN_FULL if full or largest else SAMPLES) if n <= (largest or n)]
    sizes = {**(TINY if tiny else SIZES_IN_FULL if full else SIZES), **shape}
    law_sizes = {**(TINY if tiny else SIZES_IN_FULL if full else LAW_SIZES), **shape}
    if sizes["L"] > sizes["S"] or law_sizes["L"] > law_sizes["S"]:
        raise ValueError(f"--shape of elbo takes L of at most S, got {shape} beside {sizes}")
    found = []
    for name, family in FAMILIES.items():
        of_law = name.startswith("law ")
        for K in [LAW_SAMPLES.get(family.law, OTHER_LAWS)] if of_law else samples[:2] if tiny else samples:
            own = {**(law_sizes if of_law else sizes), "K": K}
            nats = 1e-4 if settings.dtype == "float32" else 2e-2  # of a token: ELBOs are sums of them
            found.append(
                Case(
                    name=name,
                    sizes=own,
                    tiny={**TINY, "K": K if of_law else min(K, 2)},
                    setup=functools.partial(
                        _setup, family=family, few=of_law, dtype=settings.torch_dtype, device=settings.device
                    ),
                    flops=least(own, family),
                    tolerance={"elbo": nats * own["L"], "gradient": 1e-4 if settings.dtype == "float32" else 0.1},
                )
            )
    return found


def _setup(sizes: Mapping[str, int], *, family: _Family, few: bool, dtype: torch.dtype, device: str) -> Prepared:
    H, V = sizes["H"], sizes["V"]
    model = small_model(V=V, H=H, layers=sizes["layers"], dtype=dtype, device=device)
    data = _data(sizes, family.law, device)
    x = _Inputs(model, data, data.plan(), sizes["S"] - sizes["L"], family.gradients)
    every = operations(multiplied_parameters(model), x.all_rows, x.all_rows, H, V, gradients=family.gradients)
    ours = _Accumulate(x) if family.gradients else _Estimate(x)
    contestants = [Contestant("ours", "ours", ours.make, note=ours.note, flops=ours.flops), _one_by_one(x, every)]
    if not few:
        contestants.insert(1, _all_at_once(x, every))
    outputs = sum(p.nbytes for p in model.parameters()) if family.gradients else 4 * sizes["B"]
    return Prepared(tuple(contestants), _Oracle(x), outputs)


def _one_by_one(x: _Inputs, every: float) -> Contestant:
    name, K = "one pass per sample", x.plan.shape[0]
    if K > BOUND_AT:
        return Contestant(name, "peer", absent=f"{K} times what it does at K = 1, at the same memory: minutes a call")
    return Contestant(name, "peer", functools.partial(_full_logits, x, 1), note="logits of all rows of a sample", flops=every)


def _all_at_once(x: _Inputs, every: float) -> Contestant:
    """Full logits, if they fit: logits, or their gradient, and two of the completion: its logits in fp32, its log-softmax."""
    (K, B, S), V = x.plan.shape, len(x.model.get_parameter("lm_head.weight"))
    size = 4 * V * K * B * (S + 2 * (S - x.prompt))
    if size > FITS:
        reason = f"fp32 logits [{K * B}, {S}, {V}] and two of the completion take {size / 2**30:.0f} GiB"
        return Contestant("full logits", "peer", absent=reason)
    make = functools.partial(_full_logits, x, K)
    return Contestant("full logits", "peer", make, note="logits of all rows of all samples", flops=every)


# --- contestants ------------------------------------------------------------------------------------------------------


class _Estimate:
    """`estimate_elbo` from ids to ELBOs."""

    note = "estimate_elbo"

    def __init__(self, x: _Inputs) -> None:
        self.x, self.rows = x, 0

    def make(self) -> Runner:
        data = self.x.data

        def run() -> Result:
            estimate = estimate_elbo(self.x.model, data.input_ids_BS, data.completion_mask_BS, **data.arguments)
            self.rows = estimate.rows
            return self.x.result(estimate.elbo_B)

        return run

    def flops(self) -> float:
        tokens = int((self.x.plan.counts > 0).sum()) * self.x.plan.shape[2]
        V, H = self.x.model.get_parameter("lm_head.weight").shape
        return operations(multiplied_parameters(self.x.model), tokens, self.rows, H, V, gradients=False)


class _Accumulate:
    """`accumulate` on the plan."""

    note = "accumulate"

    def __init__(self, x: _Inputs) -> None:
        self.x, self.operations = x, 0.0

    def make(self) -> Runner:
        def run() -> Result:
            self.x.model.zero_grad(set_to_none=True)
            report = accumulate(self.x.model, self.x.plan, MINUS_ELBO, Batch())
            self.operations = float(report.flops)
            return {"loss": report.loss} | self.x.gradient()

        return run

    def flops(self) -> float:
        return self.operations


def _full_logits(x: _Inputs, samples: int) -> Runner:
    """So many samples in one batch."""
    target_BL = x.data.input_ids_BS[:, x.prompt :]

    def run() -> Result:
        plan = x.plan if x.gradients else x.data.plan()
        coef_KBS = plan.scored * plan.weight_KB[..., None] * plan.share_K[:, None, None]
        ready = zip(plan.noisy_ids.split(samples), coef_KBS[..., x.prompt :].split(samples), strict=True)
        x.model.zero_grad(set_to_none=True)
        elbo_B = torch.zeros(len(target_BL), device=target_BL.device)
        with nullcontext() if x.gradients else torch.no_grad():
            for ids_kBS, coef_kBL in ready:
                target_ML1 = target_BL.expand(coef_kBL.shape).flatten(0, 1)[..., None]
                logits_MLV = x.model(input_ids=ids_kBS.flatten(0, 1)).logits[:, x.prompt :]
                logp_ML = logits_MLV.float().log_softmax(-1).gather(-1, target_ML1)[..., 0]
                del logits_MLV
                part_B = (logp_ML.view_as(coef_kBL) * coef_kBL).sum((0, 2))
                if x.gradients:
                    (-part_B.mean()).backward()
                elbo_B += part_B.detach()
        return x.result(elbo_B)

    return run


class _Oracle:
    """Errors against pure PyTorch in float64, the masked rows of one sample at a time."""

    def __init__(self, x: _Inputs) -> None:
        self.x = x

    @functools.cached_property
    def true(self) -> Result:
        x, plan = self.x, self.x.plan
        model, (K, B, S) = copy.deepcopy(x.model).double(), plan.shape
        model.zero_grad(set_to_none=True)
        body, weight_VH = model.get_submodule("model"), model.get_parameter("lm_head.weight")
        elbo_B = torch.zeros(B, dtype=torch.float64, device=plan.input_ids_BS.device)
        with nullcontext() if x.gradients else torch.no_grad():
            for k in range(K):
                one = plan.cut(samples=slice(k, k + 1))
                rows, share = one.rows, float(plan.share_K[k])
                hidden_MH = body(input_ids=one.noisy_ids[0]).last_hidden_state.view(B * S, -1)
                logp_N = (hidden_MH[rows.index] @ weight_VH.t()).log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
                part_B = elbo_B.new_zeros(B).index_add(0, rows.sequence, logp_N * rows.weight * share)
                if x.gradients:
                    (-part_B.mean()).backward()
                elbo_B += part_B.detach()
        if not x.gradients:
            return {"elbo": elbo_B}
        return {"loss": -elbo_B.mean()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def __call__(self, result: Result) -> dict[str, float]:
        if result.keys() != self.true.keys():
            raise ValueError(f"gradients of {sorted(result.keys() ^ self.true.keys())} are missing or unexpected")
        value = "loss" if self.x.gradients else "elbo"
        found = {"elbo": float((result[value].double() - self.true[value]).abs().max())}
        if names := [name for name in self.true if name != value]:
            found["gradient"] = relative_error([result[n] for n in names], [self.true[n] for n in names])
        return found


# --- report -----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    fine = [row for row in rows if row["status"] == "ok"]
    by = {(_name(row), row["contestant"], row["sizes"]["K"]): row for row in fine}
    parts = [part for family in ("score", "train") if (part := _of_family(family, by))]
    laws = {
        name: ratio for (name, who, _), row in by.items() if who == "ours" and (ratio := row["to_baseline"]) and "law" in name
    }
    if laws:
        parts.append(f"{len(laws)} laws in {min(laws.values()):.2f} to {max(laws.values()):.2f} x one pass per sample's time")
    for key, unit in (("elbo", " nats"), ("gradient", "")):
        errors = [row["errors"][key] for row in fine if row["role"] == "ours" and key in row["errors"]]
        if errors:
            parts.append(f"our largest {key} error {max(errors):.0e}{unit}")
    return "; ".join(parts) or "elbo: ours did not run"


def _name(row: Row) -> str:
    return row["case"].rpartition(" ")[0]


def _of_family(family: str, by: Mapping[tuple[str, str, int], Row]) -> str:
    ours = {K: row for (name, who, K), row in by.items() if (name, who) == (family, "ours")}
    known = sorted(K for K, row in ours.items() if row["memory_mib"] is not None)
    if not known:
        return ""
    # from 2 on: only the first backward has no earlier gradients to be added to
    first, last = next((K for K in known if K > 1), known[0]), known[-1]
    low, high = ours[first]["memory_mib"], ours[last]["memory_mib"]
    growth = f"{high / low - 1:+.0%}" if max(low, high) > 1 else "both below 1 MiB"
    parts = [
        f"ours {low:.3g} to {high:.3g} MiB from K = {first} to {last} ({growth})" if first < last else f"ours {high:.3g} MiB"
    ]
    common = [K for K in known if (row := by.get((family, "full logits", K))) and row["memory_mib"]]
    for K in dict.fromkeys((*common[-1:], *(K for K in common if K == BOUND_AT))):
        full, own = by[family, "full logits", K], ours[K]["memory_mib"]
        ratio = f"{full['memory_mib'] / own:.0f} x less than" if own else "next to"
        share = ours[K]["time_ms"]["median"] / full["time_ms"]["median"]
        parts.append(f"{ratio} full logits' {full['memory_mib']:.0f} MiB at K = {K}, {share:.2f} x their time")
    if ours[last]["to_baseline"]:
        parts.append(f"{ours[last]['to_baseline']:.2f} x one pass per sample's time at K = {last}")
    return f"{family}: " + ", ".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Memory and seconds against K, with and without gradients."""
    families = {family: [row for row in rows if _name(row) == family] for family in ("score", "train")}
    plots.curves_over_samples(families, path, title="ELBOs, EuroBERT")


SUITE = Suite(
    name="elbo",
    title="ELBOs of K masked samples and their gradients: memory and time against K, and every mask law",
    cases=cases,
    baseline="one pass per sample",
    error_columns=("elbo", "gradient"),
    shape_keys=(*SIZES, "K"),
    summary=summary,
    plot=plot,
    preload=("transformers.models.eurobert.modeling_eurobert",),
)
