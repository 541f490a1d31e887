"""Entropies of each denoising step, and the J steps of highest entropy of each sequence, which EGSPO trains on.

    rows      given the hidden states of the n tokens that each of T steps revealed, and the head
    rollout   a whole completion at temperature 0, whose entropies are by-products

    ours                 the head's entropies, `step_entropy`, `select_steps`: `score_tokens` on the rows of all steps, whose
                         hidden states were kept; `generate`, which keeps a number per token
    ours (step by step)  the same, each step's rows as soon as they are there
    published            github vishnutez/egspo-dllm-rl, egspo_trainer.py: the probability rows of the revealed tokens,
                         [T, B, n, V] in the model's dtype, kept and stacked, then -sum p log(p + 1e-8), a mean, a topk, for one
                         sequence after the other; `rollout`: its loop, with logits and a softmax of all positions

An entropy off the float64 one fails the run: under `rollout` that of a contestant's own states. So does another token, or
another choice of steps. The published epsilon shifts every entropy by up to V x 1e-8 nats. The mask id has probability 0, which
is not theirs: without it the argmax may be a mask.

Operations by formula are products with parameters, as in the suite `elbo`.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
from dllm_kernels import generate, score_tokens, select_steps, step_entropy

# T steps of n tokens, J of them chosen; rollout: a prompt of P, blocks of R tokens
SIZES = {
    "rows": {"B": 2, "T": 32, "n": 2, "J": 8, "H": 64, "V": 126464},
    "rollout": {"B": 2, "P": 8, "T": 8, "n": 2, "R": 8, "J": 2, "H": 64, "V": 126464, "layers": 1},
}
SIZES_IN_FULL = {  # EGSPO's: 128 steps of 2 tokens, batches of 6, 8 steps chosen
    "rows": {"B": 6, "T": 128, "n": 2, "J": 8, "H": 256, "V": 126464},
    "rollout": {"B": 2, "P": 64, "T": 32, "n": 2, "R": 32, "J": 8, "H": 256, "V": 126464, "layers": 2},
}
TINY = {
    "rows": {"B": 2, "T": 4, "n": 2, "J": 2, "H": 16, "V": 64},
    "rollout": {"B": 2, "P": 4, "T": 4, "n": 2, "R": 4, "J": 2, "H": 16, "V": 64, "layers": 1},
}
TOLERANCE = {
    ("rows", "float32"): {"entropy": 1e-4, "steps": 0.0},
    ("rollout", "float32"): {"entropy": 1e-4, "steps": 0.0, "tokens": 0.0},
    # 16 bits: near ties among logits and entropies are decided anyhow, and under `rollout` the body rounds too
    ("rows", "bfloat16"): {"entropy": 1e-3},
    ("rollout", "bfloat16"): {"entropy": 0.1},
}
EPSILON = 1e-8


def cases(settings: Settings) -> list[Case]:
    """Raises ValueError for sizes that are no rollout."""
    found = []
    usual = TINY if settings.tiny else SIZES_IN_FULL if settings.full else SIZES
    for name, setup in {"rows": _rows, "rollout": _rollout}.items():
        sizes = {**usual[name], **{key: value for key, value in settings.shape.items() if key in usual[name]}}
        if sizes["J"] > sizes["T"]:
            raise ValueError(f"--shape of entropy takes J of at most T steps, got J={sizes['J']} and T={sizes['T']}")
        if name == "rollout" and (sizes["R"] % sizes["n"] or sizes["T"] * sizes["n"] % sizes["R"]):
            raise ValueError(f"--shape of entropy takes R a multiple of n, and T n one of R, got {sizes}")
        found.append(
            Case(
                name=name,
                sizes=sizes,
                tiny=TINY[name],
                setup=functools.partial(setup, dtype=settings.torch_dtype, device=settings.device),
                flops=_least(sizes) if name == "rollout" else _head(sizes["T"] * sizes["B"] * sizes["n"], sizes),
                tolerance=TOLERANCE[name, "float32" if settings.dtype == "float32" else "bfloat16"],
            )
        )
    return found


def _head(rows: int, sizes: Mapping[str, int]) -> float:
    return 2.0 * rows * sizes["H"] * sizes["V"]


def _undecided(sizes: Mapping[str, int]) -> int:
    """Rows that the steps choose from: the masked ones of the block, of all steps and sequences."""
    blocks = sizes["T"] * sizes["n"] // sizes["R"]
    return sizes["B"] * blocks * sum(range(sizes["R"], 0, -sizes["n"]))


def _tokens(sizes: Mapping[str, int]) -> int:
    """What the model reads in all steps."""
    return sizes["T"] * sizes["B"] * (sizes["P"] + sizes["T"] * sizes["n"])


def _least(sizes: Mapping[str, int]) -> float:
    """The body on all tokens in every step, the head on the rows to choose from."""
    parameters = sizes["layers"] * (4 + 3 * 4) * sizes["H"] ** 2  # of `small_model`
    return 2.0 * parameters * _tokens(sizes) + _head(_undecided(sizes), sizes)


def _chosen(entropy_TB: Tensor, J: int) -> Result:
    return {"entropy": entropy_TB, "steps": select_steps(entropy_TB, J)}


def published_choice(probs_TBnV: Tensor, J: int) -> Result:
    """Lines 675-715 of theirs (`_high_entropy_steps`), one sequence after the other."""
    entropies, steps = [], []
    for b in range(probs_TBnV.shape[1]):
        probs_TnV = probs_TBnV[:, b]
        entropy_T = -(probs_TnV * torch.log(probs_TnV + EPSILON)).sum(dim=-1).mean(dim=-1)
        entropies.append(entropy_T)
        steps.append(torch.topk(entropy_T, k=J).indices)
    return {"entropy": torch.stack(entropies, 1), "steps": torch.stack(steps)}


def errors_of(result: Result, true_TB: Tensor) -> dict[str, float]:
    """Nats of the worst step; share of the chosen steps that are not among those that the true entropies choose."""
    true_BJ = true_TB.t().topk(result["steps"].shape[1], dim=-1).indices
    hit_BJ = (result["steps"][:, :, None] == true_BJ[:, None, :]).any(-1)
    return {
        "entropy": float((result["entropy"].double() - true_TB).abs().max()),
        "steps": 1.0 - float(hit_BJ.double().mean()),
    }


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)


# --- given hidden states ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Revealed:
    hidden_TBnH: Tensor
    weight_VH: Tensor
    J: int

    @functools.cached_property
    def true_TB(self) -> Tensor:
        weight_VH = self.weight_VH.double()
        return torch.stack([_entropy(hidden_BnH.double() @ weight_VH.t()).mean(-1) for hidden_BnH in self.hidden_TBnH])

    def errors(self, result: Result) -> dict[str, float]:
        return errors_of(result, self.true_TB)


def _rows(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str) -> Prepared:
    B, T, n, H, V = (sizes[key] for key in ("B", "T", "n", "H", "V"))
    generator = torch.Generator(device).manual_seed(0)
    hidden_TBnH = torch.randn(T, B, n, H, generator=generator, device=device)
    hidden_TBnH *= 0.6 + 0.8 * torch.rand(T, B, 1, 1, generator=generator, device=device)  # steps are not equally sure
    weight_VH = torch.randn(V, H, generator=generator, device=device).mul_(2.5 / H**0.5)
    x = _Revealed(hidden_TBnH.to(dtype), weight_VH.to(dtype), sizes["J"])
    rows = _head(T * B * n, sizes)
    kept = f"keeps {_size(T * B * n * V, dtype)}"
    contestants = (
        Contestant("ours", "ours", functools.partial(_scored, x, T), note="rows of all steps at once", flops=rows),
        Contestant("ours (step by step)", "ours", functools.partial(_scored, x, 1), note="rows of a step at a time", flops=rows),
        _published(functools.partial(_kept, x), kept, rows, dtype),
    )
    return Prepared(contestants, x.errors, 4 * T * B + 8 * B * x.J)


def _published(make: Callable[[], Runner], note: str, flops: float, dtype: torch.dtype) -> Contestant:
    if dtype == torch.float16:
        return Contestant("published", "peer", absent="1e-8 is 0 in float16: no entropy where a probability is 0")
    return Contestant("published", "peer", make, note=note, flops=flops)


def _size(entries: int, dtype: torch.dtype) -> str:
    return f"{entries * dtype.itemsize / (1 << 20):.3g} MiB of probability rows"


def _scored(x: _Revealed, at_once: int) -> Runner:
    """The rows of so many steps in one call of the head."""
    T, B, n, H = x.hidden_TBnH.shape
    target_N = torch.zeros(at_once * B * n, dtype=torch.int64, device=x.hidden_TBnH.device)  # any: nobody asks for it
    step_BL = torch.arange(T, device=target_N.device).repeat_interleave(n).expand(B, -1)

    def run() -> Result:
        parts = []
        for hidden_tBnH in x.hidden_TBnH.split(at_once):
            scores = score_tokens(hidden_tBnH.reshape(-1, H), x.weight_VH, target_N, want=("entropy",))
            assert scores.entropy is not None
            parts.append(scores.entropy.view(-1, B, n))
        entropy_BL = torch.cat(parts).transpose(0, 1).reshape(B, T * n)
        return _chosen(step_entropy(entropy_BL, step_BL, steps=T), x.J)

    return run


def _kept(x: _Revealed) -> Runner:
    def run() -> Result:
        probs_out = [F.linear(hidden_BnH, x.weight_VH).softmax(-1) for hidden_BnH in x.hidden_TBnH]
        return published_choice(torch.stack(probs_out), x.J)

    return run


# --- a whole completion -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Completion:
    model: nn.Module
    prompts_BP: Tensor
    sizes: Mapping[str, int]

    @property
    def length(self) -> int:
        return self.sizes["T"] * self.sizes["n"]

    @property
    def mask_id(self) -> int:
        return self.sizes["V"] - 1


def _rollout(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str) -> Prepared:
    B, H, V = sizes["B"], sizes["H"], sizes["V"]
    # a trained head is not flat: the entropy is a few nats
    model = small_model(V=V, H=H, layers=sizes["layers"], dtype=dtype, device=device, sharpen=5.0)
    prompts_BP = torch.randint(3, V - 1, (B, sizes["P"]), generator=torch.Generator().manual_seed(1)).to(device)
    x = _Completion(model, prompts_BP, sizes)
    body = 2.0 * multiplied_parameters(model) * _tokens(sizes)
    ours, theirs = (body + _head(rows, sizes) for rows in (_undecided(sizes), _tokens(sizes)))
    kept = _size(sizes["T"] * B * sizes["n"] * V, dtype)
    contestants = (
        Contestant("ours", "ours", functools.partial(_generated, x), note="generate: rows of the block", flops=ours),
        _published(functools.partial(_denoised, x), f"all rows; keeps {kept}", theirs, dtype),
    )
    return Prepared(contestants, _StatesErrors(x), 4 * sizes["T"] * B + 8 * B * sizes["J"])


def _generated(x: _Completion) -> Runner:
    ids_B = torch.arange(len(x.prompts_BP), device=x.prompts_BP.device)
    options = {"length": x.length, "steps": x.sizes["T"], "block_length": x.sizes["R"], "mask_id": x.mask_id}

    def run() -> Result:
        rollout = generate(x.model, x.prompts_BP, sequence_ids=ids_B, **options)
        entropy_TB = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL, steps=x.sizes["T"])
        chosen = _chosen(entropy_TB, x.sizes["J"])
        return {"tokens": rollout.completion_BL, "when": rollout.commit_step_BL, **chosen}

    return run


def _denoised(x: _Completion) -> Runner:
    """Lines 204-345 of theirs (`generate`) at temperature 0, without greedy completions; and the choice of steps."""
    P, T, n, R = (x.sizes[key] for key in ("P", "T", "n", "R"))
    start_BS = F.pad(x.prompts_BP, (0, x.length), value=x.mask_id)

    @torch.no_grad()
    def run() -> Result:
        x_BS = start_BS.clone()
        when_BS = torch.full_like(x_BS, -1)
        probs_out = []
        for t in range(T):
            mask_BS = x_BS == x.mask_id
            logits_BSV = x.model(input_ids=x_BS).logits
            logits_BSV[..., x.mask_id] = -math.inf
            x0_BS = logits_BSV.argmax(dim=-1)
            p_BSV = logits_BSV.softmax(dim=-1)
            x0_p_BS = p_BSV.gather(-1, x0_BS[..., None])[..., 0]
            x0_p_BS[:, P + (t * n // R + 1) * R :] = -math.inf
            sel_Bn = torch.where(mask_BS, x0_p_BS, -math.inf).topk(n, dim=-1).indices.sort(-1).values
            x_BS.scatter_(1, sel_Bn, x0_BS.gather(1, sel_Bn))
            when_BS.scatter_(1, sel_Bn, t)
            probs_out.append(p_BSV[torch.arange(len(sel_Bn), device=sel_Bn.device)[:, None], sel_Bn])
            del logits_BSV, p_BSV
        chosen = published_choice(torch.stack(probs_out), x.sizes["J"])
        return {"tokens": x_BS[:, P:], "when": when_BS[:, P:], **chosen}

    return run


class _StatesErrors:
    """Entropies against float64 in the states that the contestant itself went through; tokens against the published loop's."""

    def __init__(self, x: _Completion) -> None:
        self.x = x

    @functools.cached_property
    def _tokens(self) -> Tensor:
        return _denoised(self.x)()["tokens"]

    @functools.cached_property
    def _model(self) -> nn.Module:
        return copy.deepcopy(self.x.model).double()

    @torch.no_grad()
    def _true(self, tokens_BL: Tensor, when_BL: Tensor) -> Tensor:
        x, model = self.x, self._model
        weight_VH, found = model.get_parameter("lm_head.weight"), []
        for t in range(x.sizes["T"]):
            ids_BS = torch.cat([x.prompts_BP, torch.where(when_BL >= t, x.mask_id, tokens_BL)], 1)
            hidden_BSH = model.get_submodule("model")(input_ids=ids_BS).last_hidden_state
            z_NV = hidden_BSH[:, x.sizes["P"] :][when_BL == t] @ weight_VH.t()
            z_NV[:, x.mask_id] = -math.inf
            found.append(_entropy(z_NV).view(len(ids_BS), -1).mean(-1))
        return torch.stack(found)

    def __call__(self, result: Result) -> dict[str, float]:
        found = errors_of(result, self._true(result["tokens"], result["when"].long()))
        return {**found, "tokens": float((result["tokens"] != self._tokens).double().mean())}


# --- report -----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    by = {(row["case"].split()[0], row["contestant"]): row for row in rows if row["status"] == "ok"}
    parts = []
    for name in SIZES:
        published = by.get((name, "published"))
        for who in ("ours", "ours (step by step)"):
            ours = by.get((name, who))
            if ours is None or published is None:
                continue
            text = f"{name}: {who} in {ours['to_baseline']:.2f} x the published time"
            if ours["memory_mib"] and published["memory_mib"]:
                ratio = published["memory_mib"] / ours["memory_mib"]
                text += f", extra memory {ours['memory_mib']:.3g} MiB beside {published['memory_mib']:.0f} ({ratio:.0f} x less)"
            parts.append(
                f"{text}, entropies off by {ours['errors']['entropy']:.0e} nats, published {published['errors']['entropy']:.0e}"
            )
    return "; ".join(parts) or "entropy: ours or the published way did not run"


SUITE = Suite(
    name="entropy",
    title="entropies of a rollout's steps, and the steps of highest entropy",
    cases=cases,
    baseline="published",
    error_columns=("entropy", "steps", "tokens"),
    shape_keys=tuple(dict.fromkeys(key for sizes in SIZES.values() for key in sizes)),
    summary=summary,
    plot=plots.seconds_and_memory,
    preload=("transformers.models.eurobert.modeling_eurobert",),
)
