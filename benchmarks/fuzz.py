"""Fuzz the head on this machine's CPU: every call, option and instruction set, against float64.

    python benchmarks/fuzz.py --cases 100000 --seed 0      go on to 100,000 cases in all
    python benchmarks/fuzz.py --case 4711 --seed 0         one drawn problem again, in this process
    python benchmarks/fuzz.py --cases 1000000 --out benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --what distillation --cases 20000     `distillation_loss`
    python benchmarks/fuzz.py --what expectation --cases 20000      `expected_embedding`

A case is one call (`score_tokens` under a plan, `head_backward`, `sample_tokens`, a loss) of one drawn problem on one
instruction set. Inputs and results lie between forbidden pages, the engine's workspace holds NaN or 1e30 or what the
call before left, one problem in forty is bad and must be refused. What came out is compared with float64 within bounds of
rounding (benchmarks/fuzzing/truth.py). The same seed draws the same problems on every machine.

A process of its own makes the calls: one that dies is a wrong case, and the next goes on after it. The state is kept in
--state (default runs/fuzz-<seed>.json, of others runs/fuzz-<what>-<seed>.json) and a run that was cut off goes on
from there; counts are told apart by the commit of csrc/ that was fuzzed. Exit codes: 0 nothing is wrong; 1 something is; 2 bad
arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
POISONS = (math.nan, 1e30, None)
BATCH = 500  # problems of one child process between two writes of the state
MEASURED = 16  # of so many problems one has its gradients compared with those of plain PyTorch
KEPT = 50  # wrong cases that the state describes
OTHERS = {  # what is fuzzed by a module of its own, and which rows its table has
    "distillation": ("kind", ("forward_kl", "reverse_kl", "jsd")),
    "expectation": ("embedding", ("tied", "apart")),
}
COUNTS = ("by_engine", "by_call", "by_dtype", "by_outcome")
State = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000, help="in all, those of earlier runs of the state included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", choices=("head", *OTHERS), default="head", help="one call alone, or all that are not listed")
    parser.add_argument("--isa", action="append", help="these instruction sets alone; default all that this CPU has")
    parser.add_argument("--case", type=int, metavar="PROBLEM", help="judge one problem, here, and keep no state")
    parser.add_argument("--again", action="store_true", help="first judge the state's wrong problems once more, after a mend")
    parser.add_argument("--stop", action="store_true", help="after the first wrong case")
    parser.add_argument("--state", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the counts there too, with what machine this is")
    arguments = parser.parse_args(argv)
    from dllm_kernels.backends import cpu

    allowed = [] if cpu._C is None else cpu._C.supported_isas()
    isas = arguments.isa or allowed
    if arguments.cases < 1 or not isas or not set(isas) <= set(allowed):
        print(f"error: --cases must be at least 1 and --isa one of {', '.join(allowed) or '(no engine)'}", file=sys.stderr)
        return 2
    if arguments.case is not None:
        found = judged(arguments.seed, arguments.case, isas, arguments.what)
        print("\n".join(found["wrong"]) or f"{sum(found['by_engine'].values())} cases, nothing is wrong")
        return int(bool(found["wrong"]))
    name = "fuzz" if arguments.what == "head" else f"fuzz-{arguments.what}"
    path = arguments.state or ROOT / "runs" / f"{name}-{arguments.seed}.json"
    if arguments.again and path.exists():
        judge_again(path)
    state = fuzz(arguments.cases, arguments.seed, isas, path, stop=arguments.stop, what=arguments.what)
    if arguments.out is not None:
        from dllm_trainer.records.environment import environment

        arguments.out.write_text(json.dumps(state | {"environment": environment()}, indent=1) + "\n")
    print(table(state))
    print(f"{state['cases']} cases, {state['wrong_cases']} wrong, {state['seconds']:.0f} s; {path}")
    return int(bool(state["wrong_cases"]))


def fresh(seed: int, isas: list[str], what: str = "head") -> State:
    told: State = {"cases": 0, "wrong_cases": 0, "wrong": [], "seconds": 0.0, "source": "", "sources": {}}
    told |= {} if what == "head" else {"what": what}
    return {"schema": 2, "seed": seed, "isas": isas, "next_problem": 0, **told}


def source() -> str:
    """The last commit that changed csrc/, marked where the files have changed since."""
    named = ["git", "log", "-1", "--format=%h", "--abbrev=12", "--", "csrc"], ["git", "status", "--porcelain", "--", "csrc"]
    try:
        said = [subprocess.run(x, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() for x in named]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + " changed" * bool(said[1])


def fuzz(cases: int, seed: int, isas: list[str], path: Path, *, stop: bool = False, what: str = "head") -> State:
    """Goes on from the state in `path` until `cases` cases are judged or, with `stop`, one is wrong."""
    state = json.loads(path.read_text()) if path.exists() else fresh(seed, isas, what)
    if (state["seed"], sorted(state["isas"]), state.get("what", "head")) != (seed, sorted(isas), what):
        raise SystemExit(f"error: {path} is of seed {state['seed']} on {', '.join(state['isas'])}")
    fuzzed = source()
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    child = None
    while state["cases"] < cases and not (stop and state["wrong_cases"]):
        started, first, state["source"] = time.monotonic(), state["next_problem"], fuzzed
        if child is None or not child[0].is_alive():
            ours, theirs = context.Pipe()
            child = context.Process(target=work, args=(seed, isas, what, theirs), daemon=True), ours
            child[0].start()
            theirs.close()
        enough = -(-(cases - state["cases"]) // len(isas))
        died = not follow(state, child[1], range(first, first + min(BATCH // 10 if stop else BATCH, enough)))
        if died:
            child[0].join()
            note(
                state, state["next_problem"], [f"the process died ({child[0].exitcode}): memory beside a tensor was touched?"], {}
            )
        state["seconds"] = round(state["seconds"] + time.monotonic() - started, 1)
        written = path.with_suffix(".new")
        written.write_text(json.dumps(state, indent=1) + "\n")
        os.replace(written, path)
    if child is not None:
        child[0].terminate()
    return state


def judge_again(path: Path) -> None:
    """What the state calls wrong and is right now is struck from it; counts of cases stay."""
    state = json.loads(path.read_text())
    if state["wrong_cases"] > sum(len(entry["what"]) for entry in state["wrong"]):
        raise SystemExit(f"error: {path} does not describe all of its {state['wrong_cases']} wrong cases: start anew")
    for entry in state["wrong"]:
        left = judged(state["seed"], entry["problem"], state["isas"], state.get("what", "head"))["wrong"]
        state["sources"][entry["source"]]["wrong_cases"] -= len(entry["what"]) - len(left)
        entry["what"] = left
    state["wrong"] = [entry for entry in state["wrong"] if entry["what"]]
    state["wrong_cases"] = sum(len(entry["what"]) for entry in state["wrong"])
    path.write_text(json.dumps(state, indent=1) + "\n")


def follow(state: State, child: Connection, problems: range) -> bool:
    """Adds what the child finds to the state; False if it died, and then `next_problem` names the one that it died of."""
    try:
        child.send((problems.start, problems.stop))
        for number in problems:
            state["next_problem"] = number
            found = child.recv()
            note(state, number, found["wrong"], found)
    except (EOFError, ConnectionError):
        return False
    return True


def note(state: State, number: int, wrong: list[str], found: State) -> None:
    empty: State = {"cases": 0, "wrong_cases": 0, **{key: {} for key in COUNTS}, "gradient_errors": {}}
    of_source = state["sources"].setdefault(state["source"], empty)
    state["next_problem"] = number + 1
    for counts in (state, of_source):
        counts["cases"] += sum(found.get("by_engine", {}).values()) or len(state["isas"])
        counts["wrong_cases"] += len(wrong)
    if wrong and len(state["wrong"]) < KEPT:
        print(f"problem {number}: {wrong[0]}", file=sys.stderr, flush=True)
        state["wrong"].append({"problem": number, "source": state["source"], "what": wrong})
    for key in COUNTS:
        for name, count in found.get(key, {}).items():
            of_source[key][name] = of_source[key].get(name, 0) + count
    for key, (ours, eager) in found.get("gradient_errors", {}).items():
        worst = of_source["gradient_errors"].setdefault(key, {"measured": 0, "ours": 0.0, "eager": 0.0, "of_problem": number})
        worst["measured"] += 1
        worst["eager"] = max(worst["eager"], eager)
        if ours > worst["ours"]:
            worst |= {"ours": ours, "of_problem": number}


def work(seed: int, isas: list[str], what: str, parent: Connection) -> None:
    """The child: judges ranges of problems until the parent is gone."""
    while True:
        try:
            first, end = parent.recv()
        except EOFError:
            return
        for number in range(first, end):
            parent.send(judged(seed, number, isas, what))


def judged(seed: int, number: int, isas: list[str], what: str = "head") -> State:
    """Counts, and a sentence for each call that is wrong, of one problem on these instruction sets."""
    from benchmarks.fuzzing import calls, problems, truth
    from benchmarks.fuzzing.guards import Guarded
    from benchmarks.fuzzing.judging import Judge

    if not _PAGES:
        _PAGES.extend((Guarded(), Guarded()))
    guarded = _PAGES[1]
    source, judge, truths = (problems, calls, truth) if what == "head" else (_module(what), Judge(_module(what)), _module(what))
    problem: Any = source.draw(seed, number)
    inputs = calls.Inputs(problem, _PAGES[0])
    exact: Any = None if problem.bad else truths.Truth(problem)
    float64 = problem.dtype.itemsize == 8  # runs in PyTorch, whatever the instruction set
    engines = [calls.REFERENCE] if float64 else isas
    dtype = str(problem.dtype).removeprefix("torch.")
    wrong, errors = [], {}
    for place, engine in enumerate(engines):
        try:
            said = judge.judge(problem, exact, engine, POISONS[(number + place) % 3], inputs, guarded)
        except Exception:
            said = [traceback.format_exc(limit=-3)]
        if said:
            wrong.append(f"{problem.call} {dtype} on {engine}, {problem.shape}: {said}")
    measured = what != "head" or problem.call in ("unit", "coef", "keep", "recompute")
    if exact is not None and number % MEASURED == 0 and measured and not wrong:
        for name, pair in judge.gradient_errors(problem, exact, engines[0], inputs, guarded).items():
            errors[f"{dtype} {problem.call} {name}"] = pair
    wrong += inputs.release()
    count = len(engines)
    return {
        "wrong": wrong,
        "by_engine": dict.fromkeys(engines, 1),
        "by_call": {problem.call: count},
        "by_dtype": {dtype: count},
        "by_outcome": {"refused" if problem.bad else "computed": count},
        "gradient_errors": errors,
    }


def _module(what: str) -> Any:
    return importlib.import_module(f"benchmarks.fuzzing.{what}")


def table(state: State) -> str:
    """The worst gradients of the newest source by dtype and plan, of distillation by kind, as docs/loop.md shows them."""
    errors = state["sources"][state["source"]]["gradient_errors"]
    column, calls = OTHERS.get(state.get("what", "head"), ("plan", ("unit", "coef", "keep", "recompute")))
    lines = [
        f"| dtype | {column} | measured | ours, at most | eager's, at most |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for call in calls:
            found = [x for key, x in errors.items() if key.startswith(f"{dtype} {call} ")]
            if found:
                ours, eager = (max(x[who] for x in found) for who in ("ours", "eager"))
                lines.append(f"| {dtype} | `{call}` | {sum(x['measured'] for x in found)} | {ours:.0e} | {eager:.0e} |")
    return "\n".join(lines)


def counts(state: State) -> str:
    """What the calls of each source came to, for docs/loop.md."""
    sources = {name: x for name, x in state["sources"].items() if name != state["source"]}
    newest, older = state["sources"][state["source"]], sum(x["cases"] for x in sources.values())
    before = f" {older:,} more were of earlier sources." if older else ""
    return (
        f"{newest['cases']:,} calls were judged against float64, of the engine as of commit {state['source'].split()[0]},\n"
        f"on {state['environment']['cpu']} ({', '.join(state['isas'])}):\n"
        f"{newest['wrong_cases']} were wrong.{before}"
    )


_PAGES: list[Any] = []  # this process's, of inputs and of results


if __name__ == "__main__":
    sys.exit(main())
