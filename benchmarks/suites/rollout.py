"""Denoising at a LLaDA-shaped head: seconds, memory and tokens, beside samplers that build every logit.

A step ("argmax", "drawn") is one of sequences whose last block of R tokens is undecided and committed; the body is EuroBERT. In
`--full`, 8 sequences of 320 tokens with a block of 32, the bound's sizes:

    ours          `generate`: the head on the B R undecided rows, no logits kept
    fp32 logits   logits of all B (P + R) rows in fp32; our noise on the undecided ones; what ours must equal
    published     as LLaDA's generate.py, which d1 copies: logits of all rows, float64 Gumbel noise on all, a float64 softmax
                  for the confidence, at temperature 0 too

At temperature 0 all must commit the same tokens, at 0.9 ours and "fp32 logits" must; a token off fails the run, and so does a
log-probability off the float64 one. "completion" is one of 4 blocks in 4 steps at 0.9: ours, without and with the likeliest
completion at every step (EGSPO-SA, which needs the head on all masked rows), and d1's sampler with the logits of all rows, in
its favour with our noise on the undecided rows alone, so that its tokens are what ours are judged by. "old_scores" is what
EGSPO needs of its behaviour policy, for some steps of a rollout: read from the rollout, by a scoring pass, or by a pass with
full logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
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
    small_model,
)
from benchmarks.suites import step_published
from dllm_kernels import Rollout, generate, noise, select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.noise import Stream

# P: prompt and what is decided already; R: the block
SIZES = {"B": 4, "P": 112, "R": 16, "H": 128, "V": 8192, "layers": 2}
SIZES_IN_FULL = {"B": 8, "P": 288, "R": 32, "H": 512, "V": 126464, "layers": 4}
TINY = {"B": 2, "P": 16, "R": 4, "H": 32, "V": 64, "layers": 1}
STEPS, CHOSEN, BLOCKS = 8, 2, 4
SHARPEN = 5.0  # a trained head is not flat: the entropy is a few nats
TOLERANCE = {"float32": {"tokens": 0.0, "logp": 2e-4}, "bfloat16": {"logp": 0.1}}
TEMPERATURES = {"argmax": 0.0, "drawn": 0.9}


def _model(sizes: Mapping[str, int], settings: Settings) -> nn.Module:
    return small_model(
        V=sizes["V"],
        H=sizes["H"],
        layers=sizes["layers"],
        dtype=settings.torch_dtype,
        device=settings.device,
        sharpen=SHARPEN,
    )


def _prompts(sizes: Mapping[str, int], settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, sizes["V"] - 1, (sizes["B"], sizes["P"]), generator=generator).to(settings.device)


def cases(settings: Settings) -> list[Case]:
    sizes = {**(TINY if settings.tiny else SIZES_IN_FULL if settings.full else SIZES), **settings.shape}
    tolerance = TOLERANCE["float32" if settings.dtype == "float32" else "bfloat16"]

    def case(name: str, setup: functools.partial[Prepared], flops: float) -> Case:
        return Case(name=name, sizes=sizes, tiny=TINY, setup=setup, flops=flops, tolerance=tolerance)

    # EuroBERT: four matrices of H x H, three of H x 4H
    step = _flops(sizes, sizes["layers"] * 16.0 * sizes["H"] ** 2, sizes["R"])
    return [
        *(case(name, functools.partial(_step, settings=settings, temperature=t), step) for name, t in TEMPERATURES.items()),
        case("completion", functools.partial(_completion, settings=settings), BLOCKS * step),
        case("old_scores", functools.partial(_scores, settings=settings), 0.0),  # the rollout has them: nothing to do
    ]


def _flops(sizes: Mapping[str, int], parameters: float, rows: int) -> float:
    """Of a step: the body on every token, the head on `rows` of each sequence; without attention's own products."""
    tokens = sizes["P"] + sizes["R"]
    return 2.0 * sizes["B"] * (parameters * tokens + rows * sizes["H"] * sizes["V"])


# --- a step -----------------------------------------------------------------------------------------------------------


def _step(sizes: Mapping[str, int], *, settings: Settings, temperature: float) -> Prepared:
    model, prompts = _model(sizes, settings), _prompts(sizes, settings)
    arguments = (model, prompts, sizes["R"], sizes["V"] - 1, temperature)
    least, most = (_flops(sizes, multiplied_parameters(model), rows) for rows in (sizes["R"], sizes["P"] + sizes["R"]))
    contestants = [
        Contestant("ours", "ours", functools.partial(_ours, *arguments), note="the block's rows", flops=least),
        Contestant("fp32 logits", "peer", functools.partial(_fp32_logits, *arguments), note="all rows, our noise", flops=most),
        Contestant("published", "peer", functools.partial(_published, *arguments), note="all rows, float64 noise", flops=most),
    ]
    return Prepared(tuple(contestants), _StepErrors(*arguments), 0)


def _ours(model: nn.Module, prompts: Tensor, block: int, mask_id: int, temperature: float) -> Runner:
    ids = torch.arange(len(prompts), device=prompts.device)

    def run() -> Result:
        rollout = generate(
            model,
            prompts,
            length=block,
            block_length=block,
            steps=1,
            mask_id=mask_id,
            temperature=temperature,
            sequence_ids=ids,
        )
        return {"tokens": rollout.completion_BL, "logp": rollout.commit_logp_BL}

    return run


def _whole(prompts: Tensor, block: int, mask_id: int) -> Tensor:
    return torch.nn.functional.pad(prompts, (0, block), value=mask_id)


def _keys(prompts: Tensor, block: int) -> Tensor:
    ids, places = (torch.arange(n, device=prompts.device) for n in (len(prompts), block))
    return noise.row_bits(0, Stream.TOKEN, ids[:, None], torch.zeros_like(places[0]), places).flatten()


def _fp32_logits(model: nn.Module, prompts: Tensor, block: int, mask_id: int, temperature: float) -> Runner:
    ids_BS, key_N = _whole(prompts, block, mask_id), _keys(prompts, block)

    @torch.no_grad()
    def run() -> Result:
        logits_BSV = model(ids_BS).logits.float()
        logits_BSV[..., mask_id] = -math.inf
        z_NV = logits_BSV[:, -block:].flatten(0, 1)
        if temperature:
            perturbed_NV = z_NV + temperature * noise.gumbel(key_N, z_NV.shape[1])
        token_N = (perturbed_NV if temperature else z_NV).argmax(-1)
        logp_N = z_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0]
        return {"tokens": token_N.view(-1, block), "logp": logp_N.view(-1, block)}

    return run


def _published(model: nn.Module, prompts: Tensor, block: int, mask_id: int, temperature: float) -> Runner:
    ids_BS, generator = _whole(prompts, block, mask_id), torch.Generator(prompts.device)

    @torch.no_grad()
    def run() -> Result:
        logits_BSV = model(ids_BS).logits
        logits_BSV[..., mask_id] = -math.inf  # not theirs; without it the argmax may be another
        uniform_BSV = torch.rand(logits_BSV.shape, dtype=torch.float64, generator=generator, device=logits_BSV.device)
        noisy_BSV = logits_BSV.double().exp() / (-uniform_BSV.log()) ** temperature
        del uniform_BSV
        token_BS = noisy_BSV.argmax(-1)
        del noisy_BSV
        chosen_BS = logits_BSV.double().softmax(-1).gather(-1, token_BS[..., None])[..., 0]
        result = {"tokens": token_BS[:, -block:], "logp": chosen_BS[:, -block:].log()}
        return result if temperature == 0 else {"logp": result["logp"], "drawn": result["tokens"]}

    return run


class _StepErrors:
    """Share of tokens that differ from fp32 logits with our noise; log-probs against float64 logits, in nats."""

    def __init__(self, model: nn.Module, prompts: Tensor, block: int, mask_id: int, temperature: float) -> None:
        self.arguments = model, prompts, block, mask_id, temperature

    @functools.cached_property
    def _true(self) -> tuple[Tensor, Tensor]:
        """(tokens `[B, R]`, float64 log-probs `[N, V]` from the model's own hidden states)."""
        model, prompts, block, mask_id, _ = self.arguments
        tokens = _fp32_logits(*self.arguments)()["tokens"]
        with torch.no_grad():
            hidden = model.get_submodule("model")(_whole(prompts, block, mask_id)).last_hidden_state[:, -block:].flatten(0, 1)
            z_NV = hidden.double() @ model.get_parameter("lm_head.weight").double().t()
            z_NV[:, mask_id] = -math.inf
            return tokens, z_NV.log_softmax(-1)

    def __call__(self, result: Result) -> dict[str, float]:
        tokens, logp_NV = self._true
        own = result.get("tokens", result.get("drawn"))
        assert own is not None
        true = logp_NV.gather(1, own.reshape(-1, 1))[:, 0]
        errors = {"logp": float((result["logp"].reshape(-1).double() - true).abs().max())}
        if "tokens" in result:
            errors["tokens"] = float((own != tokens).float().mean())
        return errors


# --- the behaviour policy's scores ------------------------------------------------------------------------------------


def _scores(sizes: Mapping[str, int], *, settings: Settings) -> Prepared:
    model, prompts, block, mask_id = _model(sizes, settings), _prompts(sizes, settings), sizes["R"], sizes["V"] - 1
    steps = min(STEPS, block)
    rollout = generate(
        model,
        prompts,
        length=block,
        block_length=block,
        steps=steps,
        mask_id=mask_id,
        temperature=0.9,
        sequence_ids=torch.arange(len(prompts), device=prompts.device),
    )
    chosen = select_steps(step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL), min(CHOSEN, steps))
    plan = trajectory_rows(rollout, chosen)

    def read() -> Runner:
        return lambda: {"logp": trajectory_logp(rollout, plan)}

    def scoring() -> Runner:
        return lambda: {"logp": score_samples(model, plan, suppress=(mask_id,))}

    row = 2.0 * sizes["H"] * sizes["V"]
    body = 2.0 * multiplied_parameters(model) * plan.noisy_ids.numel()
    contestants = (
        Contestant("ours", "ours", read, note="kept by the rollout"),
        Contestant(
            "ours (scoring pass)",
            "ours",
            scoring,
            note="score_samples, rows of the steps",
            flops=body + len(plan.rows.index) * row,
        ),
        Contestant(
            "published",
            "peer",
            functools.partial(_full_pass, model, rollout, chosen),
            note="logits of all rows",
            flops=body + plan.noisy_ids.numel() * row,
        ),
    )
    true = score_samples(model, plan, suppress=(mask_id,)).double()
    return Prepared(contestants, lambda result: {"logp": float((result["logp"].double() - true).abs().max())}, 0)


def _full_pass(model: nn.Module, rollout: Rollout, chosen_BJ: Tensor) -> Runner:
    """EGSPO's pass over each state: logits of every position, cross-entropy, and the sum over the step's tokens."""
    places_BS = rollout.step_map_BS

    @torch.no_grad()
    def run() -> Result:
        found = []
        for step_B in chosen_BJ.unbind(1):
            logits_BSV = model(rollout.state_at(step_B)).logits.float()
            logits_BSV[..., rollout.mask_id] = -math.inf
            logp_BS = -torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), rollout.ids_BS, reduction="none")
            found.append(torch.where(places_BS == step_B[:, None], logp_BS, 0.0).sum(-1))
        return {"logp": torch.stack(found, 1)}

    return run


# --- a completion -----------------------------------------------------------------------------------------------------


def _completion(sizes: Mapping[str, int], *, settings: Settings) -> Prepared:
    model, block, mask_id = _model(sizes, settings), sizes["R"], sizes["V"] - 1
    length = BLOCKS * block
    prompts = _prompts(sizes, settings)[:, : max(1, sizes["P"] + block - length)]

    def ours(greedy: bool) -> Runner:
        ids = torch.arange(len(prompts), device=prompts.device)
        options: dict[str, Any] = {"length": length, "block_length": block, "steps": BLOCKS, "mask_id": mask_id}

        def run() -> Result:
            rollout = generate(model, prompts, greedy=greedy, temperature=step_published.TEMPERATURE, sequence_ids=ids, **options)
            return {"tokens": rollout.completion_BL, "logp": rollout.commit_logp_BL}

        return run

    def published() -> Result:
        rollout = step_published.sample(model, prompts, length=length, block=block, steps=BLOCKS, mask_id=mask_id)
        return {"tokens": rollout.completion_BL, "logp": rollout.commit_logp_BL}

    def errors(result: Result) -> dict[str, float]:
        found = {"logp": float((result["logp"] - true()["logp"]).abs().max())}
        return found | {"tokens": float((result["tokens"] != true()["tokens"]).float().mean())}

    true = functools.cache(published)
    per_row = _flops(sizes, 0.0, 1)
    least, most = (BLOCKS * _flops(sizes, multiplied_parameters(model), rows) for rows in (block, sizes["P"] + block))
    masked = sum(length - step * block for step in range(BLOCKS))
    contestants = (
        Contestant("ours", "ours", functools.partial(ours, False), note="rows of the active block", flops=least),
        Contestant(
            "ours (greedy kept)",
            "ours",
            functools.partial(ours, True),
            note="and all masked rows",
            flops=least + masked * per_row,
        ),
        Contestant("published", "peer", lambda: published, note="all rows, our noise", flops=most),
    )
    return Prepared(contestants, errors, 0)


# --- report -----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    by = {(row["case"].split(" B=")[0], row["contestant"]): row for row in rows if row["status"] == "ok"}
    parts = []
    for name in (*TEMPERATURES, "completion"):
        ours, published = by.get((name, "ours")), by.get((name, "published"))
        if ours is None or published is None:
            continue
        text = f"{name}{' step' * (name in TEMPERATURES)} {1 / ours['to_baseline']:.1f} x faster than published"
        if ours["memory_mib"] and published["memory_mib"]:
            text += f", {published['memory_mib'] / ours['memory_mib']:.0f} x less extra memory"
        if name in TEMPERATURES:
            seconds = ours["time_ms"]["median"] / 1e3
            text += f", {ours['sizes']['B'] / seconds:.1f} tokens/s at one token per sequence and step"
        parts.append(text)
    kept, scoring = by.get(("old_scores", "ours")), by.get(("old_scores", "ours (scoring pass)"))
    if kept and scoring:
        parts.append(f"old scores: {scoring['time_ms']['median']:.0f} ms of scoring saved ({kept['time_ms']['median']:.2g} ms)")
    plain, greedy = by.get(("completion", "ours")), by.get(("completion", "ours (greedy kept)"))
    if plain and greedy:
        ratio = greedy["time_ms"]["median"] / plain["time_ms"]["median"]
        parts.append(f"greedy completions kept: {ratio:.1f} x the time of a completion")
    return "; ".join(parts) or "rollout: ours or the published sampler did not run"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds and extra memory of every case and contestant."""
    pyplot = plots.pyplot_module()
    measured = [row for row in rows if row["time_ms"]]
    if not measured:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.8 + 0.42 * len(measured)), sharey=True)
    labels = [f"{row['case'].split(' B=')[0]}: {row['contestant']}" for row in measured]
    colours = [plots.COLOURS[{"ours": "ours", "floor": "floor"}.get(row["role"], "published")] for row in measured]
    for axis, values, title in (
        (axes[0], [row["time_ms"]["median"] / 1e3 for row in measured], "seconds (median)"),
        (axes[1], [row["memory_mib"] or 0.0 for row in measured], "extra peak memory, MiB"),
    ):
        bars = axis.barh(labels, values, color=colours)
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.set_xscale("symlog", linthresh=1e-2)
        axis.set_title(title, loc="left", fontsize=10)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


SUITE = Suite(
    name="rollout",
    title="rollouts: one denoising step, a completion, and the scores of the policy that generated",
    cases=cases,
    baseline="published",
    error_columns=("tokens", "logp"),
    shape_keys=tuple(SIZES),
    summary=summary,
    plot=plot,
    preload=("transformers.models.eurobert.modeling_eurobert",),
)
