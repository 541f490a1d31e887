"""Change one operator, comparison, constant or flag of the numerics at a time, and see whether the fast tests notice.

    python benchmarks/mutants.py --count 600 --seed 0                    go on to 600 mutants in all
    python benchmarks/mutants.py --area masks --count 40                 of one area
    python benchmarks/mutants.py --show '| 7: w / 2 -> (w * 2)'           one mutant's difference, and its verdict anew
    python benchmarks/mutants.py --again --out benchmarks/results/mutants.json    judge survivors without a reason anew

A mutant lives in a copy of the tree. It is killed by a failing test of its area's fast tests, and by one that takes ten
times the CPU time that it takes in peace; a test that kills must pass alone without the mutant. Tests that have killed in
the same file go first, then those of the file's name, then the quickest. A process that has collected an area's tests
forks a child for each mutant, in which the functions that it changes get their new code; what runs at import is imported
anew. Each mutant first meets the likeliest tests for --quick CPU seconds. Those that are then undecided meet all that can
notice them: the tests that run the mutant's line, subprocesses included, which is recorded once for the area; of a line that
runs at import, all of the area.

The same seed draws the same mutants of the same sources, and an edit of them changes the draw by what it edits alone.
Verdicts are kept in --state (default runs/mutants-<seed>.json) and
in --out, and a run that was cut off goes on from there. --share 0/2 and --share 1/2 are two halves of the work for two
processes, each with a state of its own; the last one with --out puts them together. A survivor's reason, the sentence why it
means nothing, is written by hand into --out and kept there.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

from benchmarks.mutation.judge import Judge
from benchmarks.mutation.sources import AREAS, Mutant, drawn, mutants
from benchmarks.report import markdown

ROOT = Path(__file__).resolve().parent.parent
Draw = Sequence[tuple[str, Mutant]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="mutants in all, those of earlier runs included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", action="append", choices=tuple(AREAS), help="may be given several times; default all")
    parser.add_argument("--share", default="0/1", metavar="K/N", help="every N-th mutant from the K-th on")
    parser.add_argument("--show", metavar="MUTANT", help="the end of its name in the state: print its difference and judge it")
    parser.add_argument("--again", action="store_true", help="judge survivors without a reason anew")
    parser.add_argument("--quick", type=float, default=3.0, metavar="SECONDS", help="of the first round; 0: no first round")
    parser.add_argument("--minutes", type=float, help="start no further mutant after so many")
    parser.add_argument("--state", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the score and the survivors there too")
    arguments = parser.parse_args(argv)
    part, _, parts = arguments.share.partition("/")
    if arguments.count < 1 or not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        print("error: --count must be at least 1 and --share like 0/2", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and the copy go
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401  what a fork need not import again
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    judge = Judge(ROOT, AREAS, ROOT / "runs" / "mutants-lines")
    try:
        if arguments.show:
            return _show(judge, arguments.show)
        suffix = "" if parts == "1" else f"-{part}-of-{parts}"
        path = arguments.state or ROOT / "runs" / f"mutants-{arguments.seed}{suffix}.json"
        chosen = drawn(ROOT, list(AREAS), arguments.count, arguments.seed)
        share = [(area, m) for area, m in chosen[int(part) :: int(parts)] if area in (arguments.area or AREAS)]
        _campaign(judge, chosen, share, path, arguments)
        if arguments.out:
            states = sorted(path.parent.glob(f"mutants-{arguments.seed}*.json")) if arguments.state is None else [path]
            _write(arguments.out, [json.loads(state.read_text()) for state in states], chosen, arguments)
    finally:
        judge.close()
    return 0


def _campaign(judge: Judge, chosen: Draw, share: Draw, path: Path, arguments: argparse.Namespace) -> None:
    written = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
    reasons = written.get("survivors", {})
    state: dict[str, dict[str, Any]] = dict(written.get("verdicts", {}))
    state |= json.loads(path.read_text()) if path.is_file() else {}
    names = {mutant.name for _, mutant in chosen}
    state = {name: verdict for name, verdict in state.items() if name in names}  # of other sources there may be more
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * (arguments.minutes or 1e9)
    for _, mutant in share:
        known = state.get(mutant.name)
        if known and known["verdict"] == "killed":
            judge.kills[mutant.file, known["test"]] += 1
    order = list(AREAS)
    share = sorted(share, key=lambda one: order.index(one[0]))  # an area is collected and recorded once it has its turn
    for quick in (True, False):
        for area, mutant in share:
            name = mutant.name
            verdict = state.get(name, {"verdict": ""})["verdict"]
            again = arguments.again and verdict == "survived" and not reasons.get(name)
            if (verdict not in ("", "undecided") and not again) or time.monotonic() > ends:
                continue
            if quick and ((verdict and not again) or not arguments.quick):
                continue
            reply = judge.quick(area, mutant, arguments.quick) if quick else judge.verdict(area, mutant)
            state[name] = {"area": area, "verdict": reply.verdict, "test": reply.test, "seconds": round(reply.seconds, 1)}
            path.write_text(json.dumps(state, indent=1) + "\n")
            print(f"{len(state)}/{len(share)} {reply.verdict} after {reply.seconds:.1f} s: {name}  [{reply.test}]", flush=True)


def _show(judge: Judge, name: str) -> int:
    for area, described in AREAS.items():
        for file in sorted(file for pattern in described.sources for file in ROOT.glob(pattern)):
            source = file.read_text()
            for mutant in mutants(str(file.relative_to(ROOT)), source):
                if mutant.name.endswith(name):
                    before, after = source.splitlines(), mutant.applied(source).splitlines()
                    print("\n".join(difflib.unified_diff(before, after, lineterm="", n=4)))
                    reply = judge.verdict(area, mutant)
                    print(reply.verdict, reply.test)
                    return 0
    print(f"error: --show must name a mutant of these sources, got {name!r}", file=sys.stderr)
    return 2


def _write(out: Path, states: Sequence[Mapping[str, dict[str, Any]]], chosen: Draw, arguments: argparse.Namespace) -> None:
    """Counts by area and the survivors, with the reasons that stood in the file before.

    No share is told before all are judged: those that are killed quickly come first.
    """
    from dllm_trainer.records.environment import environment

    before = json.loads(out.read_text())["survivors"] if out.is_file() else {}
    drawn_now = {mutant.name for _, mutant in chosen}
    verdicts = {name: verdict for state in states for name, verdict in state.items() if name in drawn_now}
    undecided = {name for name, verdict in verdicts.items() if verdict["verdict"] == "undecided"}
    verdicts = {name: verdict for name, verdict in verdicts.items() if name not in undecided}
    counts: dict[str, dict[str, int]] = {}
    for verdict in verdicts.values():
        count = counts.setdefault(verdict["area"], {"killed": 0, "survived": 0})
        count["survived" if verdict["verdict"] == "survived" else "killed"] += 1
    killed = sum(count["killed"] for count in counts.values())
    found = {
        "schema": 1,
        "command": f"python benchmarks/mutants.py --count {arguments.count} --seed {arguments.seed}",
        "environment": environment(),
        "drawn": len(chosen),
        "judged": len(verdicts),
        "undecided": sorted(undecided),  # by the first round; the second is still to come
        "killed": killed,
        "killed_share": round(killed / len(verdicts), 4) if len(verdicts) == len(chosen) else None,
        "by_area": dict(sorted(counts.items())),
        "survivors": {n: before.get(n, "") for n, v in sorted(verdicts.items()) if v["verdict"] == "survived"},
        "verdicts": dict(sorted(verdicts.items())),
    }
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{killed} of {len(verdicts)} judged killed, of {len(chosen)} drawn; {out}")


def counts(found: Mapping[str, Any]) -> str:
    """What came of the mutants of each area, for CONTRIBUTING.md."""
    rows = [[area, count["killed"] + count["survived"], count["killed"]] for area, count in found["by_area"].items()]
    judged, killed, reasons = found["judged"], found["killed"], sum(map(bool, found["survivors"].values()))
    table = markdown(["area", "judged", "killed"], [list(map(str, row)) for row in [*rows, ["all", judged, killed]]])
    waiting = f" {found['drawn'] - judged} more are drawn and not judged." if judged < found["drawn"] else ""
    left = f"{judged - killed} survive, {reasons} of them with a reason why that means nothing."
    return f"{table}\n\n{killed / judged:.1%} of {judged} are killed; {left}{waiting}"


if __name__ == "__main__":
    sys.exit(main())
