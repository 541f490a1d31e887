"""Entropies of denoising steps, and each sequence's J steps of highest entropy, which EGSPO trains on.

    rows      given the hidden states of the n tokens that each of T steps revealed, and the head
    rollout   a whole completion at temperature 0, whose entropies are by-products

    ours                 the head's entropies, `step_entropy`, `select_steps`: `score_tokens` on the rows of
                         all steps, whose hidden states were kept; `generate`, which keeps a number per token
    ours (step by step)  the same, each step's rows as soon as they are there
    published            github vishnutez/egspo-dllm-rl, egspo_trainer.py: the probability rows of the
                         revealed tokens, [T, B, n, V] in the model's dtype, kept and stacked, then -sum p
                         log(p + 1e-8), a mean, a topk, for one sequence after the other; `rollout`: its loop,
                         with logits and a softmax of all positions

An entropy off the float64 one fails the run: under `rollout` that of a contestant's own states. So does
another token, or another choice of steps. The published epsilon shifts every entropy by up to V x 1e-8 nats.
The mask id has probability 0, which is not theirs: without it the argmax may be a mask.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plots, registry
from benchmarks.registry import EUROBERT, Case, Contestant, Oracle, Result, Settings, Sizes, Suite, Work
from benchmarks.suites.rollout import Policy, make_policy
from dllm_kernels import score_tokens, select_steps, step_entropy

# T steps of n tokens, J of them chosen; rollout: a prompt of P, blocks of R tokens. EGSPO: 128 steps of 2,
# batches of 6, 8 chosen
SIZES = {
    "rows": Sizes(
        {"B": 2, "T": 4, "n": 2, "J": 2, "H": 16, "V": 64},
        {"B": 2, "T": 32, "n": 2, "J": 8, "H": 64, "V": 126464},
        {"B": 6, "T": 128, "n": 2, "J": 8, "H": 256, "V": 126464},
    ),
    "rollout": Sizes(
        {"B": 2, "P": 4, "T": 4, "n": 2, "R": 4, "J": 2, "H": 16, "V": 64, "layers": 1},
        {"B": 2, "P": 8, "T": 8, "n": 2, "R": 8, "J": 2, "H": 64, "V": 126464, "layers": 1},
        {"B": 2, "P": 64, "T": 32, "n": 2, "R": 32, "J": 8, "H": 256, "V": 126464, "layers": 2},
    ),
}
EPSILON = 1e-8


def _undecided(sizes: Mapping[str, int]) -> int:
    """Rows that the steps choose from: the masked ones of the block, of all steps and sequences."""
    blocks = sizes["T"] * sizes["n"] // sizes["R"]
    return sizes["B"] * blocks * sum(range(sizes["R"], 0, -sizes["n"]))


def _read(sizes: Mapping[str, int]) -> int:
    """Tokens that the model reads in all steps."""
    return sizes["T"] * sizes["B"] * (sizes["P"] + sizes["T"] * sizes["n"])


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
    """Nats of the worst step, and the share of chosen steps that the true entropies do not choose."""
    true_BJ = true_TB.t().topk(result["steps"].shape[1], dim=-1).indices
    hit_BJ = (result["steps"][:, :, None] == true_BJ[:, None, :]).any(-1)
    return {
        "entropy": float((result["entropy"].double() - true_TB).abs().max()),
        "steps": 1.0 - float(hit_BJ.double().mean()),
    }


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)


@dataclass(frozen=True)
class Revealed:
    """Hidden states of the tokens that each step revealed, and the head."""

    hidden_TBnH: Tensor
    weight_VH: Tensor
    sizes: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_VH.dtype

    @property
    def flops(self) -> float:
        return registry.operations(0, 0, self.hidden_TBnH.shape[:3].numel(), self.sizes)


def _revealed(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str) -> Revealed:
    B, T, n, H, V = (sizes[key] for key in ("B", "T", "n", "H", "V"))
    generator = torch.Generator(device).manual_seed(0)
    hidden_TBnH = torch.randn(T, B, n, H, generator=generator, device=device)
    # steps are not equally sure
    hidden_TBnH *= 0.6 + 0.8 * torch.rand(T, B, 1, 1, generator=generator, device=device)
    weight_VH = torch.randn(V, H, generator=generator, device=device).mul_(2.5 / H**0.5)
    return Revealed(hidden_TBnH.to(dtype), weight_VH.to(dtype), sizes)


def _scored(x: Revealed, *, together: bool) -> Work:
    """The rows of all steps in one call of the head, or a call for each step."""
    T, B, n, H = x.hidden_TBnH.shape
    at_once = T if together else 1
    # any: nobody asks for it
    target_N = torch.zeros(at_once * B * n, dtype=torch.int64, device=x.hidden_TBnH.device)
    step_BL = torch.arange(T, device=target_N.device).repeat_interleave(n).expand(B, -1)

    def run() -> Result:
        parts = []
        for hidden_tBnH in x.hidden_TBnH.split(at_once):
            scores = score_tokens(hidden_tBnH.reshape(-1, H), x.weight_VH, target_N, want=("entropy",))
            assert scores.entropy is not None
            parts.append(scores.entropy.view(-1, B, n))
        entropy_BL = torch.cat(parts).transpose(0, 1).reshape(B, T * n)
        return _chosen(step_entropy(entropy_BL, step_BL, steps=T), x.sizes["J"])

    return Work(run, x.flops, f"rows of {'all steps at once' if together else 'a step at a time'}")


def _keeps(x: Revealed | Policy) -> str:
    entries = math.prod(x.sizes[key] for key in ("T", "B", "n", "V"))
    return f"keeps {entries * x.dtype.itemsize / (1 << 20):.3g} MiB of probability rows"


def _kept(x: Revealed) -> Work:
    def run() -> Result:
        probs_out = [F.linear(hidden_BnH, x.weight_VH).softmax(-1) for hidden_BnH in x.hidden_TBnH]
        return published_choice(torch.stack(probs_out), x.sizes["J"])

    return Work(run, x.flops, _keeps(x))


def _not_in_half(x: Revealed | Policy) -> str:
    return "1e-8 is 0 in float16: no entropy where a probability is 0" if x.dtype == torch.float16 else ""


def _against_rows(x: Revealed) -> Oracle:
    @functools.cache
    def true_TB() -> Tensor:
        weight_VH = x.weight_VH.double()
        return torch.stack([_entropy(hidden_BnH.double() @ weight_VH.t()).mean(-1) for hidden_BnH in x.hidden_TBnH])

    return lambda result: errors_of(result, true_TB())


def _generated(x: Policy) -> Work:
    T, n, R, J = (x.sizes[key] for key in ("T", "n", "R", "J"))

    def run() -> Result:
        rollout = x.rollout(length=T * n, steps=T, block_length=R)
        chosen = _chosen(step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL, steps=T), J)
        return {"tokens": rollout.completion_BL, "when": rollout.commit_step_BL, **chosen}

    return Work(run, x.operations(_read(x.sizes), _undecided(x.sizes)), "generate: rows of the block")


def _denoised(x: Policy) -> Work:
    """Their `generate` (lines 204-345) at temperature 0 without greedy completions, and the choice."""
    P, T, n, R = (x.sizes[key] for key in ("P", "T", "n", "R"))
    start_BS = F.pad(x.prompts_BP, (0, T * n), value=x.mask_id)

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

    return Work(run, x.operations(_read(x.sizes), _read(x.sizes)), f"all rows; {_keeps(x)}")


class _StatesErrors:
    """Entropies against float64 in the contestant's own states; tokens against the published loop's."""

    def __init__(self, x: Policy) -> None:
        self.x = x

    @functools.cached_property
    def _tokens(self) -> Tensor:
        return _denoised(self.x).run()["tokens"]

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


def cases(settings: Settings) -> list[Case]:
    """Raises ValueError for sizes that are no rollout."""
    rows, rollout = (sizes.of(settings) for sizes in SIZES.values())
    for sizes in (rows, rollout):
        if sizes["J"] > sizes["T"]:
            raise ValueError(f"--shape of entropy takes J of at most T steps, got J={sizes['J']} and T={sizes['T']}")
    if rollout["R"] % rollout["n"] or rollout["T"] * rollout["n"] % rollout["R"]:
        raise ValueError(f"--shape of entropy takes R a multiple of n, and T n one of R, got {rollout}")
    exact, on = settings.dtype == "float32", {"dtype": settings.torch_dtype, "device": settings.device}
    # 16 bits: near ties among logits and entropies are decided anyhow, and under `rollout` the body rounds
    # too
    return [
        Case(
            name="rows",
            sizes=rows,
            tiny=SIZES["rows"].tiny,
            inputs=functools.partial(_revealed, **on),
            contestants=(
                Contestant("ours", "ours", functools.partial(_scored, together=True)),
                Contestant("ours (step by step)", "ours", functools.partial(_scored, together=False)),
                Contestant("published", "peer", _kept, _not_in_half),
            ),
            oracle=_against_rows,
            tolerance={"entropy": 1e-4, "steps": 0.0} if exact else {"entropy": 1e-3},
            flops=registry.operations(0, 0, rows["T"] * rows["B"] * rows["n"], rows),
            output_bytes=lambda x: x.sizes["B"] * (4 * x.sizes["T"] + 8 * x.sizes["J"]),
        ),
        Case(
            name="rollout",
            sizes=rollout,
            tiny=SIZES["rollout"].tiny,
            inputs=functools.partial(make_policy, **on),
            contestants=(Contestant("ours", "ours", _generated), Contestant("published", "peer", _denoised, _not_in_half)),
            oracle=_StatesErrors,
            tolerance={"entropy": 1e-4, "steps": 0.0, "tokens": 0.0} if exact else {"entropy": 0.1},
            flops=registry.operations(registry.body_parameters(rollout), _read(rollout), _undecided(rollout), rollout),
            output_bytes=lambda x: x.sizes["B"] * (4 * x.sizes["T"] + 8 * x.sizes["J"]),
        ),
    ]


SUITES = {
    "entropy": Suite(
        name="entropy",
        title="entropies of a rollout's steps, and the steps of highest entropy",
        cases=cases,
        baseline="published",
        error_columns=("entropy", "steps", "tokens"),
        shape_keys=tuple(dict.fromkeys(key for sizes in SIZES.values() for key in sizes.usual)),
        plot=plots.seconds_and_memory,
        preload=(EUROBERT,),
    ),
}
