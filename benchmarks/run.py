"""Measure the library against its baselines: time, peak memory and accuracy from one setup each.

    python benchmarks/run.py                                    every suite, in about 3 minutes, whatever the machine
    python benchmarks/run.py --list                             what there is
    python benchmarks/run.py --full --out FILE.json             the sizes of the published bounds, every case
    python benchmarks/run.py --suite head --shape N=256,H=4096,V=126464 --dtype bfloat16       LLaDA's head
    python benchmarks/run.py --suite head --peers eager,liger   these beside ours and the floor, or `none`
    python benchmarks/run.py --suite variance --model FOLDER    of your own model
    python benchmarks/run.py --device cuda --dtype bfloat16     on a GPU (the default where there is one)
    python benchmarks/run.py --compare BASE.json                what changed since

Needs the package with its `train` extra. Prints a table and a summary per suite; writes a JSON file (default
runs/bench/<time>.json) and one PNG per suite beside it. Exit codes: 0 all well; 1 a contestant gave wrong
results, one of ours failed, or --compare found something worse; 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 3.0  # of a run with the default sizes


def parse_shape(text: str) -> dict[str, int]:
    """`N=256,H=64` to a dictionary. Raises ValueError naming what is wrong."""
    shape: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if not value.strip().isdigit() or int(value) == 0:
            raise ValueError(f"--shape must be like N=256,H=64,V=1000 with sizes above 0, got {text!r}")
        shape[key.strip()] = int(value)
    return shape


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", help="a name; may be given several times; default all; elbo brings variance")
    parser.add_argument("--list", action="store_true", help="print suites, cases and contestants, and measure nothing")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--shape", help="sizes instead of the default ones, like N=256,H=64,V=1000; needs one --suite")
    parser.add_argument("--case", action="append", help="a case's name, like forward; may be given several times; default all")
    parser.add_argument("--full", action="store_true", help="the sizes of the published bounds, and every case")
    parser.add_argument("--peers", help="who runs beside ours and the floor: all (default), none, or names, like eager,liger")
    parser.add_argument("--model", action="append", help="a checkpoint's folder, for `variance`; default runs/demo/checkpoint")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU, else cpu")
    parser.add_argument(
        "--minutes",
        type=float,
        help="cut rounds and cases to fit (with --full cases alone); default 3, no limit with --full or --shape",
    )
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: checks the benchmark itself in seconds")
    parser.add_argument("--compare", type=Path, metavar="BASE.json", help="flag changes beyond the spread")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: runs/bench/<time>.json")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments, argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace, argv: list[str] | None = None) -> int:
    """Measures and reports; returns the exit code. Raises ValueError for bad arguments before it measures."""
    import torch

    from benchmarks import execution, measure, registry, report

    asked = arguments.suite or registry.MODULES
    # the variance of ELBO estimators is the other half of what they cost
    names = list(dict.fromkeys(part for name in asked for part in (("elbo", "variance") if name == "elbo" else (name,))))
    if arguments.shape is not None or arguments.case:  # of one of the two
        names = list(dict.fromkeys(asked))
    # studies first: they take what they need, and what can be cut shares the rest of --minutes
    suites = sorted(map(registry.load, names), key=lambda suite: not isinstance(suite, registry.Study))
    settings = _settings(arguments, suites)
    base = _load_base(arguments.compare)
    console = report.console()
    if arguments.list:
        for suite in suites:
            console.print(f"[bold]{suite.name}[/]  {suite.title}")
            if isinstance(suite, registry.Study):
                console.print("\n".join(f"  {line}" for line in suite.listing(settings)))
                continue
            for case in suite.cases(settings):
                x = case.inputs(case.tiny)
                absent = {c.name: c.applies(x) for c in case.contestants}
                said = (name + f" (absent: {why})" * bool(why) for name, why in absent.items())
                console.print(f"  {case.label}: {', '.join(said)}")
        return 0

    started = datetime.now().astimezone()
    out = arguments.out or ROOT / "runs" / "bench" / f"{started:%Y-%m-%d-%H%M%S}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
    except OSError as error:
        raise ValueError(f"--out must be a writable file, got {out}: {error.strerror}") from None

    modules = [registry.MODULES[suite.name] for suite in suites]
    measure.start_memory_server([*modules, *(module for suite in suites for module in suite.preload)])
    torch.set_num_threads(settings.threads)
    results: dict[str, Any] = {
        "schema": 1,
        "created": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": _environment(settings),
        "settings": asdict(settings),
        "suites": {},
    }
    console.print(report.header(results["environment"], results["settings"]))
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        console.print(f"[yellow]load {load:.1f} on {cores} cores before the start: other work distorts the times[/]")
    bad = 0
    ends = time.monotonic() + (math.inf if settings.minutes is None else 60 * settings.minutes)
    for number, suite in enumerate(suites):
        began = time.monotonic()
        share = max(0.0, ends - began) / (len(suites) - number)
        entry = suite.measure(settings) if isinstance(suite, registry.Study) else execution.measure(suite, settings, share)
        entry["seconds"] = round(time.monotonic() - began, 1)
        results["suites"][suite.name], rows = entry, entry["rows"]
        # after each suite: an interrupted run keeps what it has
        out.write_text(json.dumps(results, indent=1) + "\n")
        suite.plot(rows, out.with_name(f"{out.stem}-{suite.name}.png"))
        console.print()
        timed = not isinstance(suite, registry.Study)
        label, columns = (report.on_two_lines, report.timed_columns(suite, rows)) if timed else (suite.label, suite.columns)
        console.print(report.table(suite.name, suite.title, rows, label, columns))
        if entry.get("arithmetic"):
            console.print(report.arithmetic_table(suite, entry["arithmetic"]))
        console.print(f"{suite.name}: {entry['summary']}; measured in {entry['seconds']:.0f} s")
        if entry.get("cut"):
            console.print(
                f"[yellow]{suite.name}: cut to fit {settings.minutes:g} minutes (--minutes): {'; '.join(entry['cut'])}[/]"
            )
        bad += sum(row["status"] == "wrong" or (row["status"] == "failed" and row["role"] == "ours") for row in rows)
    seconds = (datetime.now().astimezone() - started).total_seconds()
    console.print(f"\n{out} and {len(suites)} plots beside it, after {seconds:.0f} s", soft_wrap=True)
    if bad:
        console.print(f"[red]{bad} rows are wrong or failed[/]: see the tables")
    if base is not None:
        lines, worse = report.compare(base, results)
        console.print("\n".join([f"\ncompared with {arguments.compare}:", *lines]), soft_wrap=True, markup=False)
        bad += worse
    return 1 if bad else 0


def _settings(arguments: argparse.Namespace, suites: list[Any]) -> Any:
    import torch

    from benchmarks.registry import DTYPES, Settings, Study, Suite

    if arguments.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype!r}")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
    shape: dict[str, int] = {}
    if arguments.shape is not None:
        if len(suites) != 1:
            raise ValueError("--shape needs exactly one --suite, since suites have sizes of their own")
        shape, allowed = parse_shape(arguments.shape), suites[0].shape_keys
        unknown, missing = shape.keys() - set(allowed), set(suites[0].required_shape) - shape.keys()
        if unknown or missing:
            raise ValueError(
                f"--shape of {suites[0].name} takes {', '.join(allowed)}, got {arguments.shape!r}"
                + f" without {', '.join(sorted(missing))}" * bool(missing)
            )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch sees")
    if arguments.full and arguments.tiny:
        raise ValueError("--full and --tiny exclude each other")
    if arguments.minutes is not None and arguments.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {arguments.minutes:g}")
    unlimited = arguments.full or arguments.tiny or shape
    minutes = arguments.minutes or (None if unlimited else MINUTES)
    threads = arguments.threads or torch.get_num_threads()
    models = tuple(arguments.model or ())
    studies = [suite for suite in suites if isinstance(suite, Study)]
    if models and not studies:
        raise ValueError(f"--model is for suites that score a trained model, got --suite {', '.join(s.name for s in suites)}")
    settings = Settings(
        dtype=arguments.dtype,
        shape=shape,
        tiny=arguments.tiny,
        full=arguments.full,
        threads=threads,
        models=models,
        cases=tuple(arguments.case or ()),
        device=device,
        minutes=minutes,
    )
    for study in studies:
        study.check(settings)
    timed = [suite for suite in suites if isinstance(suite, Suite)]
    _known("--case", settings.cases, {case.name for suite in timed for case in suite.cases(settings)})
    if arguments.peers in (None, "all"):
        return settings
    peers = () if arguments.peers == "none" else tuple(name.strip() for name in arguments.peers.split(","))
    contestants = [c for suite in timed for case in suite.cases(settings) for c in case.contestants]
    _known("--peers", peers, {"all", "none", *(c.name for c in contestants if c.role in ("reference", "peer"))})
    return replace(settings, peers=peers)


def _known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{option} must name one of {', '.join(sorted(known))}, got {name!r}")


def _load_base(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        base = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--compare must name a result file, got {path}: {error}") from None
    if not isinstance(base, dict) or base.get("schema") != 1:
        raise ValueError(f"--compare must name a result file of schema 1, got {path}")
    return base


PACKAGES = ("triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")


def _environment(settings: Any) -> dict[str, Any]:
    import torch
    from dllm_trainer.records.environment import environment

    from benchmarks import measure
    from dllm_kernels import backends

    versions = {name: metadata.version(name) if _installed(name) else "not installed" for name in PACKAGES}
    return {
        **environment(),
        **(measure.card() if settings.device == "cuda" else {}),
        "versions": versions,
        "backend": backends.for_device(torch.device(settings.device)).NAME,
        "clocks": measure.clocks(settings.device),
        "product_gflops_per_s": round(measure.gflops_per_s(settings.torch_dtype, settings.device)),
        "copy_gbytes_per_s": round(measure.gbytes_per_s(settings.device), 1),
        "load_average": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
