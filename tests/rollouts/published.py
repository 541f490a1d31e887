"""The published samplers, one sequence at a time, from full logits in float64, with our noise in place of theirs.

Written from the public semantics, not from `dllm_kernels`; of the library only `noise` is used. Facts and where they are from:

    LLaDA          ML-GSAI/LLaDA generate.py: blocks, steps / blocks per block, remainders to the earliest steps, confidence is
                   the softmax of the logits (temperature 1) at the token drawn, guidance `un + (w + 1) (z - un)`
    Dream          Dream generation_utils.py: `t = linspace(1, eps, steps + 1)`, `int(masked (1 - s/t))` tokens, all in the last
                   step; temperature, then top-p, then top-k; confidence, margin and entropy are of what is left
    Fast-dLLM      NVlabs/Fast-dLLM llada/generate.py: the surest token, and all that are not below the threshold
    SDAR           JetAstra/SDAR generate.py: blocks of the whole sequence, the last to its end, counts of a whole block, top-k
                   before top-p, probabilities of what is drawn from, strictly above the threshold
                   dynamic: DMPO's copy of it, get_transfer_index_dynamic; Dream: dream/model/generation_utils.py, _block.py
    roar           yuchen-zhu-zyc/DMPO dmpo_trainer.py: a random order of each block, a token a step
    entropy bound  arXiv 2505.24857; transformers diffusion_gemma: ascending entropies of what is drawn from, cumulated less own
                   at most the bound

Where the published code takes an entry that it has itself ruled out (confidence -inf: outside the block, or decided), as SDAR
does when a block has fewer masks than its step should commit, the loops here take as many as there are. `commit_last` is what
LLaDA's `confidence_eos_eot_inf` is for. Steps that commit nothing call no model. The noise of the samplers that do not know
their number of steps is numbered `block * block_length + step of the block`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.noise import Stream
from tests.rollouts import taking_back

Look = Callable[[Tensor], Tensor]  # ids of a completion [L] to its logits [L, V]


@dataclass
class Seen:
    """What a step knows of one masked place."""

    place: int
    token: int
    logp: float  # temperature 1
    entropy: float
    drawn_logp: float  # of what is drawn from
    drawn_entropy: float
    margin: float
    z: Tensor  # its logits


def restricted(z: Tensor, top_k: int | None, top_p: float | None, *, top_p_first: bool) -> Tensor:
    """Logits `[V]` with everything outside the k largest, and outside the nucleus, at -inf."""

    def largest(z: Tensor) -> Tensor:
        return z if top_k is None else z.masked_fill(z < z.sort(descending=True).values[min(top_k, len(z)) - 1], -math.inf)

    def nucleus(z: Tensor) -> Tensor:
        if top_p is None or top_p >= 1:
            return z
        held, before = [], 0.0
        for v in z.argsort(descending=True, stable=True).tolist():
            if before <= top_p:
                held.append(v)
            before += float(z.softmax(-1)[v])
        out = torch.full_like(z, -math.inf)
        out[held] = z[held]
        return out

    return largest(nucleus(z)) if top_p_first else nucleus(largest(z))


def entropy(z: Tensor) -> float:
    logp = z.log_softmax(-1)
    logp = logp[logp > -math.inf]
    return -float((logp.exp() * logp).sum())


class Canvas:
    """A sequence being decided: its ids, and what was known when."""

    def __init__(
        self,
        look: Look,
        length: int,
        mask_id: int,
        *,
        seed: int = 0,
        sequence_id: int = 0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        top_p_first: bool = False,
        suppress: Sequence[int] = (),
    ) -> None:
        self.look, self.length, self.temperature, self.mask_id = look, length, temperature, mask_id
        self.top_k, self.top_p, self.top_p_first, self.suppress = top_k, top_p, top_p_first, list(suppress)
        self.ids = torch.full((length,), mask_id)
        self.step = torch.full((length,), -1)  # by calls of the model
        self.logp, self.entropy = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
        self.masked_entropy: list[float] = []
        self.greedy: list[list[int]] = []
        self.states: list[Tensor] = []
        places, sample = torch.arange(length), torch.tensor(0)
        identity = torch.tensor(sequence_id)
        self.key = noise.row_bits(seed, Stream.TOKEN, identity, sample, places)
        self.order = noise.row_bits(seed, Stream.REMASK, identity, sample, places)

    def masked(self, places: Sequence[int]) -> list[int]:
        return [place for place in places if self.step[place] < 0]

    def call(self, places: Sequence[int], number: int) -> list[Seen]:
        """One call of the model; what it says of the masked ones of these places. `number` is the step of the noise."""
        self.states.append(self.ids.clone())
        z_LV = self.look(self.ids).double()
        z_LV[:, self.suppress] = -math.inf
        masked = self.step < 0
        self.greedy.append(torch.where(masked, z_LV.argmax(-1), self.ids).tolist())
        seen = [self._seen(place, z_LV[place], number) for place in self.masked(places)]
        self.masked_entropy.append(sum(s.entropy for s in seen) / len(seen) if seen else math.nan)
        return seen

    def _seen(self, place: int, z: Tensor, number: int) -> Seen:
        tempered = restricted(z / (self.temperature or 1.0), self.top_k, self.top_p, top_p_first=self.top_p_first)
        if self.temperature == 0:
            token = int(z.argmax())
        else:
            token = int((tempered + noise.gumbel(self.key[place : place + 1], len(z), step=number)[0]).argmax())
        best = tempered.softmax(-1).sort(descending=True).values
        return Seen(
            place,
            token,
            float(z.log_softmax(-1)[token].detach()),
            entropy(z),
            float(tempered.log_softmax(-1)[token]),
            entropy(tempered),
            float(best[0] - best[1]),
            z,
        )

    def commit(self, chosen: Sequence[Seen]) -> None:
        for seen in chosen:
            assert self.step[seen.place] < 0
            self.ids[seen.place] = seen.token
            self.step[seen.place] = len(self.states) - 1
            self.logp[seen.place], self.entropy[seen.place] = seen.logp, seen.entropy

    def take_back(self, places: Sequence[int]) -> None:
        for place in places:
            assert self.step[place] >= 0
            self.ids[place], self.step[place], self.logp[place], self.entropy[place] = self.mask_id, -1, 0.0, 0.0

    def ended(self, eos_id: int | None) -> bool:
        """After a block: whether it holds the end; if so, everything undecided becomes the end too."""
        if eos_id is None or not (self.ids[self.step >= 0] == eos_id).any():
            return False
        self.ids[self.step < 0] = eos_id
        return True


def share_out(tokens: int, steps: int) -> list[int]:
    return [tokens // steps + (step < tokens % steps) for step in range(steps)]


def best(seen: list[Seen], most: int, rank: Callable[[Seen], float]) -> list[Seen]:
    """The `most` of the highest rank; of equal ones the first."""
    return sorted(seen, key=lambda s: (-rank(s), s.place))[:most]


def blocks_of(length: int, block_length: int) -> list[range]:
    return [range(start, min(start + block_length, length)) for start in range(0, length, block_length)]


def roar(canvas: Canvas, *, block_length: int, steps: int | None = None, eos_id: int | None = None) -> None:
    """A token a step, in a random order of each block."""
    for block in blocks_of(canvas.length, block_length):
        for inner, place in enumerate(sorted(block, key=lambda place: -int(canvas.order[place]))):
            canvas.commit([s for s in canvas.call(block, block.start + inner) if s.place == place])
        if canvas.ended(eos_id):
            return


def llada(
    canvas: Canvas,
    *,
    steps: int,
    block_length: int,
    remasking: str = "low_confidence",
    commit_last: Sequence[int] = (),
    renormalise: bool = False,
    eos_id: int | None = None,
) -> None:
    blocks = blocks_of(canvas.length, block_length)
    per_block = steps // len(blocks)

    def rank(seen: Seen) -> float:
        if remasking == "random":
            return int(canvas.order[seen.place])
        if renormalise:  # ids that are committed last have no probability when confidence is taken
            z = seen.z.clone()
            z[list(commit_last)] = -math.inf
            return float(z.softmax(-1)[seen.token])
        return -math.inf if seen.token in commit_last else seen.logp

    for b, block in enumerate(blocks):
        for inner, tokens in enumerate(share_out(len(block), per_block)):
            if tokens == 0:
                continue
            seen = canvas.call(block, b * per_block + inner)
            canvas.commit(best(seen, tokens, rank))
        if canvas.ended(eos_id):
            return


def dream_counts(length: int, steps: int, eps: float) -> list[int]:
    """Tokens of each step, in the published arithmetic: fp32 all through."""
    t, left, counts = torch.linspace(1, eps, steps + 1), length, []
    for i in range(steps):
        counts.append(int(torch.tensor(left) / 1 * (1 - t[i + 1] / t[i])) if i < steps - 1 else left)
        left -= counts[-1]
    return counts


def dream(
    canvas: Canvas,
    *,
    steps: int,
    alg: str = "origin",
    eps: float = 1e-3,
    alg_temp: float = 0.0,
    threshold: float = 0.9,
    eos_id: int | None = None,
) -> None:
    if alg == "confidence_threshold":
        return dream_threshold(canvas, steps=steps, threshold=threshold, eos_id=eos_id)
    places, t = range(canvas.length), torch.linspace(1, eps, steps + 1)
    ranks: dict[str, Callable[[Seen], float]] = {
        "maskgit_plus": lambda seen: math.exp(seen.drawn_logp),
        "topk_margin": lambda seen: seen.margin,
        "entropy": lambda seen: -seen.drawn_entropy,
    }
    counts = dream_counts(canvas.length, steps, eps)
    for i in range(steps):
        if alg == "origin":
            share = float(1 - t[i + 1] / t[i]) if i < steps - 1 else 1.0
            drawn = [place for place in canvas.masked(places) if _chance(canvas.order[place], i) < share]
            if drawn:
                canvas.commit(canvas.call(drawn, i))
                if _cut(canvas, eos_id):
                    return None
            continue
        if counts[i] == 0:
            continue  # the published loop calls the model and drops what it says
        seen = canvas.call(places, i)
        if alg_temp:  # without replacement, by weights exp(rank / alg_temp): the largest of rank / alg_temp + Gumbel
            lots = {s.place: ranks[alg](s) / alg_temp + float(noise.gumbel(canvas.order[s.place, None], 1, step=i)) for s in seen}
            canvas.commit(best(seen, counts[i], lambda s, lots=lots: lots[s.place]))
        else:
            canvas.commit(best(seen, counts[i], ranks[alg]))
        if _cut(canvas, eos_id):
            return None
    return None


def dream_threshold(canvas: Canvas, *, steps: int, threshold: float, eos_id: int | None) -> None:
    """Fast-dLLM's: of the surest `tokens a step + put off`, those that are sure enough; the first always."""
    counts, put_off, i = share_out(canvas.length, steps), 0, 0  # published for lengths that the steps divide
    while canvas.masked(range(canvas.length)):
        tokens, put_off = (counts[i] if i < steps else 0) + put_off, 0
        chosen = best(canvas.call(range(canvas.length), i), tokens, lambda s: s.drawn_logp)
        sure = [s for s in chosen if s is chosen[0] or math.exp(s.drawn_logp) >= threshold]
        put_off = len(chosen) - len(sure)
        canvas.commit(sure)
        i += 1
        if _cut(canvas, eos_id):
            return


def _cut(canvas: Canvas, eos_id: int | None) -> bool:
    """Without blocks: whether an EOS has nothing undecided before it; if so, all that is left reads EOS."""
    for place in range(canvas.length):
        if canvas.step[place] < 0:
            return False
        if canvas.ids[place] == eos_id:
            canvas.ids[canvas.step < 0] = eos_id
            return True
    return True


def fast_dream(
    canvas: Canvas,
    *,
    block_length: int,
    alg: str = "confidence_threshold",
    threshold: float = 0.9,
    steps: int | None = None,
    eps: float = 1e-3,
    alg_temp: float = 0.0,
    eos_id: int | None = None,
) -> None:
    """A block's first token by itself, from a call on everything; then by threshold, or by Dream's times and entropies."""
    blocks = blocks_of(canvas.length, block_length)
    per_block = 0 if steps is None else steps // len(blocks)
    t = torch.linspace(1, eps, per_block + 1)
    for b, block in enumerate(blocks):
        first = b * per_block if per_block else block.start
        canvas.commit(canvas.call(block[:1], first))
        for i in count(1):
            left = len(canvas.masked(block))
            if left == 0:
                break
            if alg == "entropy":
                tokens = int(torch.tensor(left) / 1 * (1 - t[i + 1] / t[i])) if i < per_block - 1 else left
                if tokens:
                    canvas.commit(best(canvas.call(block, first + i), tokens, lambda s: -s.drawn_entropy))
                continue
            seen = best(canvas.call(block, first + i), left, lambda s: s.drawn_logp)
            canvas.commit([s for s in seen if s is seen[0] or math.exp(s.drawn_logp) >= threshold])
        if canvas.ended(eos_id):
            return


def _chance(key: Tensor, step: int) -> float:
    high, low = (int(noise.element_bits(key[None], 1, step=step, tag=tag)) for tag in (0, 1))
    return ((high << 32 | low) + 0.5) * 2.0**-64


def fast_dllm(
    canvas: Canvas,
    *,
    block_length: int,
    threshold: float = 0.9,
    factor: float | None = None,
    commit_last: Sequence[int] = (),
    eos_id: int | None = None,
) -> None:
    for block in blocks_of(canvas.length, block_length):
        for number in count(block.start):
            if not canvas.masked(block):
                break
            seen = canvas.call(block, number)
            if factor is not None:
                canvas.commit(by_factor(seen, factor))
                continue
            sure = {s.place: 0.0 if s.token in commit_last else math.exp(s.logp) for s in seen}
            (surest,) = best(seen, 1, lambda s, sure=sure: sure[s.place])
            canvas.commit([s for s in seen if s is surest or sure[s.place] >= threshold])
        if canvas.ended(eos_id):
            return


def by_factor(seen: list[Seen], factor: float) -> list[Seen]:
    """The n surest, n as large as the confidence of each of them allows: 1 - factor / (n + 1) of the n-th, for n > 1.

    Where all but the last do, the published loop takes the last too.
    """
    seen = best(seen, len(seen), lambda s: s.logp)
    n = 1
    while n < len(seen) and math.exp(seen[n].logp) >= 1 - factor / (n + 2):
        n += 1
    return seen if n == len(seen) - 1 else seen[:n]


def sdar(
    canvas: Canvas,
    *,
    prompt_length: int,
    steps: int | None = None,
    block_length: int,
    remasking: str = "low_confidence_dynamic",
    threshold: float = 0.85,
    bound: float = 0.1,
    eos_id: int | None = None,
) -> None:
    if remasking == "entropy_bounded":
        steps = block_length
    counts = share_out(block_length, steps)
    first = prompt_length // block_length * block_length - prompt_length  # where the block that holds the first place begins
    for b, start in enumerate(range(first, canvas.length, block_length)):
        block = range(max(start, 0), start + block_length)  # the last one, too, is generated to its end
        for inner, least in enumerate(counts):
            if not canvas.masked(block):
                break
            seen = canvas.call(block, b * block_length + inner)
            if remasking == "sequential":
                canvas.commit(seen[:least])
                continue
            if remasking == "entropy_bounded":
                canvas.commit(within(best(seen, block_length, lambda s: -s.drawn_entropy), bound))
                continue
            above = [s for s in seen if math.exp(s.drawn_logp) > threshold]
            if remasking == "low_confidence_dynamic" and len(above) >= least:
                canvas.commit(above)
            else:
                canvas.commit(best(seen, least, lambda s: s.drawn_logp))
        if canvas.ended(eos_id):
            return


def within(seen: list[Seen], bound: float) -> list[Seen]:
    """Of these, in order, those before which the entropies sum to at most the bound; at least one."""
    before, chosen = 0.0, []
    for s in seen:
        if chosen and before > bound:
            break
        chosen.append(s)
        before += s.drawn_entropy
    return chosen


def entropy_bound(
    canvas: Canvas,
    *,
    block_length: int,
    bound: float = 0.1,
    commit_last: Sequence[int] = (),
    eos_id: int | None = None,
) -> None:
    for block in blocks_of(canvas.length, block_length):
        for number in count(block.start):
            if not canvas.masked(block):
                break
            seen = best(
                canvas.call(block, number),
                block_length,
                lambda s: -math.inf if s.token in commit_last else -s.drawn_entropy,
            )
            before, chosen = 0.0, []
            for s in seen:
                if chosen and (before > bound or s.token in commit_last):
                    break
                chosen.append(s)
                before += s.drawn_entropy
            canvas.commit(chosen)
        if canvas.ended(eos_id):
            return


SAMPLERS = {
    "llada": llada,
    "roar": roar,
    "dream": dream,
    "fast_dllm": fast_dllm,
    "fast_dream": fast_dream,
    "sdar": sdar,
    "entropy_bound": entropy_bound,
}


def bidirectional(model, prompt: Tensor, *, mask_id: int, shift: int = 0, guidance: float = 0.0) -> Look:
    """Logits of a completion by the model itself, on this prompt alone: no padding, no batch."""
    P = len(prompt)

    def logits(prompt: Tensor, completion: Tensor) -> Tensor:
        z = model(torch.cat([prompt, completion])[None]).logits[0].double()
        return z[P - shift : P - shift + len(completion)].clone()

    def look(completion: Tensor) -> Tensor:
        z = logits(prompt, completion)
        if guidance:
            without = logits(torch.full_like(prompt, mask_id), completion)
            z = without + (guidance + 1) * (z - without)
        return z

    return look


def block_causal(
    model, prompt: Tensor, *, block_length: int, shift: int = 0, guidance: float = 0.0, mask_id: int | None = None
) -> Look:
    """Logits of a completion where a token sees its own and all earlier blocks of the sequence: an explicit 4-d mask."""
    P = len(prompt)

    def logits(prompt: Tensor, completion: Tensor) -> Tensor:
        ids = torch.cat([prompt, completion])
        block = torch.arange(len(ids)) // block_length
        allowed = block[:, None] >= block[None, :]
        dtype = next(model.parameters()).dtype
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        z = model(ids[None], attention_mask=bias[None, None], use_cache=False).logits[0].double()
        return z[P - shift : len(ids) - shift].clone()

    def look(completion: Tensor) -> Tensor:
        z = logits(prompt, completion)
        if guidance:
            without = logits(torch.full_like(prompt, mask_id), completion)
            z = without + (guidance + 1) * (z - without)
        return z

    return look


def shadowed(model, prompt: Tensor, *, mask_id: int, suppress: Sequence[int]):
    """Logits `[b, V]` of a block whose tokens stand beside themselves as masks: WINO's positions and 4-d mask."""

    def verify(completion: Tensor, block: range) -> Tensor:
        P, b = len(prompt), len(block)
        S = P + len(completion)
        ids = torch.cat([prompt, completion, torch.full((b,), mask_id)])
        position = torch.cat([torch.arange(S), torch.arange(P + block.start, P + block.stop)])
        allowed = torch.ones(S + b, S + b, dtype=torch.bool)
        allowed[:S, S:] = False
        for n in range(b):
            allowed[S + n, P + block.start + n] = False
        dtype = next(model.parameters()).dtype
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        z = model(ids[None], attention_mask=bias[None, None], position_ids=position[None]).logits[0].double()[S:].clone()
        z[:, list(suppress)] = -math.inf
        return z

    return verify


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Tensor],
    *,
    length: int,
    mask_id: int,
    sampler: str = "llada",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    suppress: Sequence[int] = (),
    suppress_mask: bool = True,
    guidance: float = 0.0,
    shift: int = 0,
    see: Callable[[Tensor], Look] | None = None,
    **options,
) -> list[Canvas]:
    """`dllm_kernels.generate` one sequence after another; `see` replaces the model's own attention."""
    done = []
    for b, prompt in enumerate(prompts):
        beyond = -(len(prompt) + length) % options["block_length"] if sampler == "sdar" else 0
        look = see(prompt) if see else bidirectional(model, prompt, mask_id=mask_id, shift=shift, guidance=guidance)
        canvas = Canvas(
            look,
            length + beyond,
            mask_id,
            seed=seed,
            sequence_id=b if sequence_ids is None else int(sequence_ids[b]),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            top_p_first=sampler in ("dream", "fast_dream", "rcr", "remdm"),
            suppress=[*suppress, mask_id] if suppress_mask else suppress,
        )
        more = {"prompt_length": len(prompt)} if sampler == "sdar" else {}
        if sampler == "wino":
            more["verify"] = shadowed(model, prompt, mask_id=mask_id, suppress=canvas.suppress)
        ({**SAMPLERS, **taking_back.SAMPLERS})[sampler](canvas, **options, **more)
        done.append(canvas)
    return done
