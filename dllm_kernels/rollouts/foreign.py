"""Rollouts that other engines made: their numbers, checked, as the tensors of a `Rollout`, and back as lines of a file."""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.rollouts.events import Events

Ids = Sequence[int] | Tensor
Values = Sequence[float] | Tensor
Edit = Sequence[float]  # step, place, id and, if it was told, log-probability
ROUNDING = 1e-4  # nats by which a log-probability may exceed 0


@dataclass
class Row:
    """One rollout. `places` are columns of `ids`, in which completions are filled in."""

    ids: list[int]
    places: list[int]
    steps: list[int]
    logp: list[float]
    entropy: list[float]
    edits: list[tuple[int, int, int, float]]  # by place, then step
    length: int

    @property
    def calls(self) -> int:
        return max([*self.steps, *(edit[0] for edit in self.edits)], default=-1) + 1


def check(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    step_map: Sequence[Ids] | None,
    *,
    mask_id: int,
    logp: Sequence[Values | None] | None,
    entropy: Sequence[Values | None] | None,
    edits: Sequence[Sequence[Edit]] | None,
    lengths: Sequence[int] | None,
    shift: int,
    causal_block: int | None,
    eos_id: int | None,
    temperature: float,
) -> list[Row]:
    """Each rollout's numbers. Raises ValueError or TypeError naming the argument and the sequence."""
    checks.count("mask_id", mask_id, 0)
    checks.count("shift", shift, 0)
    checks.number("temperature", temperature, least=0)
    for name, value in (("causal_block", causal_block), ("eos_id", eos_id)):
        if value is not None:
            checks.count(name, value, 1 if name == "causal_block" else 0)
    given: dict[str, Any] = {"completions": completions, "step_map": step_map, "logp": logp, "entropy": entropy}
    B = len(_sequence("prompts", prompts))
    if B == 0:
        raise ValueError("prompts must hold at least one sequence, got none")
    many: dict[str, Any] = {**given, "edits": edits, "lengths": lengths}
    if step_map is None and (more := [name for name in ("logp", "entropy", "edits", "lengths") if many[name] is not None]):
        raise ValueError(f"{more[0]} must be None where step_map is None, which alone says what a step saw and wrote")
    for name, values in many.items():
        if values is not None and len(_sequence(name, values)) != B:
            raise ValueError(f"{name} must have one entry for each of the {B} prompts, got {len(values)}")
    rows = []
    for b in range(B):
        prompt, completion = _ids(f"prompts[{b}]", prompts[b]), _ids(f"completions[{b}]", completions[b])
        if mask_id in completion:
            raise ValueError(f"completions[{b}] must not hold mask_id={mask_id}, which stands for what is undecided")
        holes = [column for column, token in enumerate(prompt) if token == mask_id]
        if len(completion) < max(1, len(holes)):
            raise ValueError(f"completions[{b}] must have a token for each of the {len(holes)} masks of prompts[{b}], and at "
                             f"least one, got {len(completion)}")  # fmt: skip
        places = holes + list(range(len(prompt), len(prompt) + len(completion) - len(holes)))
        if shift and places[0] < shift:
            raise ValueError(f"prompts[{b}] must begin with {shift} given token(s) when shift={shift}")
        ids = prompt + completion[len(holes) :]
        for column, token in zip(holes, completion, strict=False):
            ids[column] = token
        steps = [-1] * len(completion) if step_map is None else _integers(f"step_map[{b}]", step_map[b])
        per_token: dict[str, list[float]] = {}
        for name in ("logp", "entropy"):
            told = None if given[name] is None else given[name][b]
            per_token[name] = [math.nan] * len(completion) if told is None else _values(name, b, told)
        for name, size in {"step_map": len(steps), **{name: len(told) for name, told in per_token.items()}}.items():
            if size != len(completion):
                raise ValueError(f"{name}[{b}] must have an entry for each of the {len(completion)} tokens of completions[{b}], "
                                 f"got {size}")  # fmt: skip
        length = len(completion) if lengths is None else checks.count(f"lengths[{b}]", lengths[b])
        if length > len(completion) or length < len(holes):
            raise ValueError(f"lengths[{b}] must be in {max(1, len(holes))}..{len(completion)}, got {length}")
        changed = [] if edits is None else _edits(b, edits[b], steps, completion, mask_id)
        row = Row(ids, places, steps, per_token["logp"], per_token["entropy"], changed, length)
        if step_map is not None:
            _check_steps(b, row, completion, eos_id, causal_block)
        rows.append(row)
    return rows


def _check_steps(b: int, row: Row, completion: list[int], eos_id: int | None, causal_block: int | None) -> None:
    """No gap, nothing unset but after the end, and blocks one after the other."""
    last = max((place for place, step in enumerate(row.steps) if step >= 0), default=-1)
    if min(row.steps) < -1 or last < 0:
        raise ValueError(f"step_map[{b}] must hold steps from 0, and at least one, got {min(row.steps)}")
    unset = row.steps.index(-1) if -1 in row.steps else None
    if unset is not None and (eos_id is None or eos_id not in completion[:unset] or last > unset):
        raise ValueError(f"step_map[{b}] must be at least 0 up to the first EOS (eos_id={eos_id}), got -1 at place {unset}")
    there = {step for step in row.steps if step >= 0} | {edit[0] for edit in row.edits}
    missing = next((step for step in range(max(there)) if step not in there), None)
    if missing is not None:
        hint = ", and the first is 1: count from 0" if missing == 0 and 1 in there else ": steps without a token are left out"
        raise ValueError(f"step_map[{b}] must have no gaps, but nothing is set in step {missing} of 0..{max(there)}{hint}")
    if causal_block is not None:
        before, now, block = -1, -1, None
        for column, step in zip(row.places, row.steps, strict=True):
            if column // causal_block != block:
                block, before = column // causal_block, now
            if 0 <= step <= before:
                raise ValueError(f"step_map[{b}] must go on from block to block (causal_block={causal_block}), got step {step} "
                                 f"in column {column} after step {before} of the block before it")  # fmt: skip
            now = max(now, step)


def _edits(
    b: int, edits: Sequence[Edit], steps: list[int], completion: list[int], mask_id: int
) -> list[tuple[int, int, int, float]]:
    found = []
    for edit in edits:
        if len(edit) not in (3, 4):
            raise ValueError(f"edits[{b}] must hold (step, place, id) or (step, place, id, log-probability), got {edit}")
        step, place, token = _integers(f"edits[{b}]", [*edit[:3]])
        value = _values("edits", b, edit[3:])[0] if len(edit) == 4 and edit[3] is not None else math.nan
        if not 0 <= place < len(completion):
            raise ValueError(f"edits[{b}] must hold places in 0..{len(completion) - 1}, got {place}")
        if not 0 <= step < steps[place]:
            raise ValueError(f"edits[{b}] must come before step {steps[place]}, which set place {place} at last, got step {step}")
        found.append((step, place, token, value))
    found.sort(key=lambda edit: (edit[1], edit[0]))
    for place in {edit[1] for edit in found}:
        chain = [edit for edit in found if edit[1] == place]
        if len({edit[0] for edit in chain}) < len(chain):
            raise ValueError(f"edits[{b}] must change a place at most once in a step, got two changes of place {place}")
        tokens = [mask_id, *(edit[2] for edit in chain), completion[place]]
        if any(a == b for a, b in itertools.pairwise(tokens)):
            raise ValueError(f"edits[{b}] must change what they replace, but place {place} is in turn {tokens}")
    return found


def tensors(rows: list[Row], mask_id: int, sequence_ids: Tensor | None) -> dict[str, Any]:
    """The fields of a rollout, padded on the right."""
    B, S, L, T = len(rows), max(len(r.ids) for r in rows), max(r.length for r in rows), max(r.calls for r in rows)
    if sequence_ids is None:
        sequence_ids = torch.arange(B)
    checks.dtype("sequence_ids", sequence_ids, [torch.int64])
    checks.shape("sequence_ids", sequence_ids, [B])
    if len(torch.unique(sequence_ids)) != B:
        raise ValueError("sequence_ids must be distinct: equal ids would share their noise")
    ids_BS, keep_BS = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, S, dtype=torch.bool)
    completion_BS, overhang_BS = torch.zeros_like(keep_BS), torch.full_like(ids_BS, -1)
    step_BL = torch.full((B, L), -1, dtype=torch.int32)
    logp_BL, entropy_BL = torch.zeros(B, L), torch.zeros(B, L)
    for b, row in enumerate(rows):
        n = row.length
        ids_BS[b, : len(row.ids)], keep_BS[b, : len(row.ids)] = torch.tensor(row.ids), True
        completion_BS[b, row.places[:n]] = True
        # what was filled up after EOS has no step of its own, and is shown when the last one is over
        overhang_BS[b, row.places[n:]] = torch.tensor([row.calls - 1 if s < 0 else s for s in row.steps[n:]], dtype=torch.int64)
        step_BL[b, :n] = torch.tensor(row.steps[:n], dtype=torch.int32)
        unset_n = (step_BL[b, :n] < 0) & (row.calls > 0)  # without a step map nothing is known of any token
        for into_BL, values in ((logp_BL, row.logp), (entropy_BL, row.entropy)):
            into_BL[b, :n] = torch.tensor(values[:n], dtype=torch.float32).masked_fill(unset_n, 0.0)
    whole = all(row.length == len(row.steps) for row in rows)
    events = None
    if not whole or any(row.edits for row in rows):
        columns = list(zip(*_events(rows, mask_id), strict=True))
        dtypes = [torch.int64] * 5 + [torch.float32] * 2
        events = Events(*(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True))).ordered(S)
    told = logp_BL if events is None else events.logp_E[events.writes(mask_id)]
    return {
        "ids_BS": ids_BS,
        "completion_mask_BS": completion_BS,
        "commit_step_BL": step_BL,
        "commit_logp_BL": logp_BL,
        "commit_entropy_BL": entropy_BL,
        "masked_entropy_BT": torch.full((B, T), math.nan),
        "steps_B": torch.tensor([row.calls for row in rows]),
        "failed_B": torch.zeros(B, dtype=torch.bool),
        "sequence_ids_B": sequence_ids,
        "attention_mask_BS": None if bool(keep_BS.all()) else keep_BS,
        "overhang_step_BS": None if whole else overhang_BS,
        "recorded": events,
        "unscored": T == 0 or bool(told.isnan().any() or entropy_BL.isnan().any()),
    }


def _events(rows: list[Row], mask_id: int) -> Iterator[tuple[float, ...]]:
    """(sequence, step, position, old id, new id, log-prob, entropy) of every change."""
    for b, row in enumerate(rows):
        edits = defaultdict(list)
        for edit in row.edits:
            edits[edit[1]].append(edit)
        for place, (column, last) in enumerate(zip(row.places, row.steps, strict=True)):
            old = mask_id
            for step, _, token, value in edits[place]:
                told = (0.0, 0.0) if token == mask_id else (value, math.nan)
                yield b, step, column, old, token, *told
                old = token
            if last >= 0:
                yield b, last, column, old, row.ids[column], row.logp[place], row.entropy[place]


def lines(
    ids_BS: Tensor,
    generated_BS: Tensor,
    real_BS: Tensor,
    completion_BS: Tensor,
    sequence_ids_B: Tensor,
    events: Events,
    same: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """What a file holds of each rollout: the keys of `Rollout.from_jsonl`, `same` those of all lines.

    Steps are numbered anew, those that changed nothing left out.
    """
    mask_id = same["mask_id"]
    ids_BS, generated_BS, real_BS, completion_BS = (t.cpu() for t in (ids_BS, generated_BS, real_BS, completion_BS))
    last_E = events.last(ids_BS.shape).tolist()
    of_sequence: dict[int, list[Any]] = defaultdict(list)
    for is_last, event in zip(last_E, zip(*(t.tolist() for t in events.tensors()), strict=True), strict=True):
        of_sequence[event[0]].append((is_last, *event[1:]))
    for b, sequence_id in enumerate(sequence_ids_B.tolist()):
        columns = real_BS[b].nonzero()[:, 0].tolist()
        made = [column for column in columns if generated_BS[b, column]]
        given_end = max((n + 1 for n, column in enumerate(columns) if not generated_BS[b, column]), default=0)
        ids = ids_BS[b].tolist()
        number = {step: n for n, step in enumerate(sorted({event[1] for event in of_sequence[b]}))}
        place = {column: n for n, column in enumerate(made)}
        steps, told, edits = [-1] * len(made), [(0.0, 0.0)] * len(made), []
        for is_last, step, column, _, token, logp, entropy in of_sequence[b]:
            if is_last:
                steps[place[column]], told[place[column]] = number[step], (logp, entropy)
            else:
                unknown = token == mask_id or math.isnan(logp)
                edits.append([number[step], place[column], token, *([] if unknown else [logp])])
        line: dict[str, Any] = {
            "prompt_ids": [mask_id if generated_BS[b, column] else ids[column] for column in columns[:given_end]],
            "completion_ids": [ids[column] for column in made],
            "step_map": steps,
        }
        for name, values in zip(("logp", "entropy"), zip(*told, strict=True), strict=True):
            line[name] = None if any(map(math.isnan, values)) else list(values)
        if edits:
            line["edits"] = edits
        if (length := int(completion_BS[b].sum())) < len(made):
            line["length"] = length
        yield {**line, "sequence_id": sequence_id, **same}


def _sequence(name: str, value: Any) -> Any:
    if not isinstance(value, (list, tuple, Tensor)):
        raise TypeError(f"{name} must be a list, a tuple or a tensor, got {type(value).__name__}")
    return value


def _integers(name: str, values: Ids | Values) -> list[int]:
    many = values.tolist() if isinstance(values, Tensor) else list(_sequence(name, values))
    for value in many:
        if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must hold integers, got {value!r}")
    return [operator.index(value) for value in many]


def _ids(name: str, values: Ids) -> list[int]:
    found = _integers(name, values)
    if found and min(found) < 0:
        raise ValueError(f"{name} must hold ids from 0, got {min(found)}")
    return found


def _values(name: str, b: int, values: Values) -> list[float]:
    """Log-probs are at most 0, entropies at least 0."""
    many = values.tolist() if isinstance(values, Tensor) else list(_sequence(f"{name}[{b}]", values))
    is_entropy = name == "entropy"
    for value in many:
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}[{b}] must hold numbers, got {value!r}")
        if not math.isfinite(value) or (value < -ROUNDING if is_entropy else value > ROUNDING):
            bound = "at least 0" if is_entropy else "at most 0"
            raise ValueError(f"{name}[{b}] must be finite and {bound} (in nats, not probabilities), got {value!r}")
    return [float(value) for value in many]
