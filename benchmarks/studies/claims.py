"""The papers' claims at toy scale: experiments, figures with intervals, and verdicts for docs/claims.md.

    python -m benchmarks.studies.claims --out FILE.json                        all; half an hour, one core
    python -m benchmarks.studies.claims --claim egspo-steps --out FILE.json    one again, the others stay
    python -m benchmarks.studies.claims --large --claim dmpo-neg --out FILE.json   larger sizes, up to half an hour
    python -m benchmarks.studies.claims --tiny --out FILE.json                 checks the experiments
    python benchmarks/documents.py write claims                                the tables of docs/claims.md

The committed FILE.json is benchmarks/results/claims-cpu.json. A stopped command goes on where it was: the parts
of gdpo-level, egspo-stepwise, the DMPO claims and rspo-training are kept in runs/claims.jsonl (`--parts`).
Needs the demo's SFT model, which `dllm-kernels sft` makes in a minute or two, or another `--checkpoint`. What
is claimed, measured and why it decides stands in the module of the paper. Exit codes: 0 done; 2 bad
arguments.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from benchmarks.studies import bgpo, dmpo, egspo, gdpo, rspo
from benchmarks.studies.common import Claim, Parts, Settings

DEFAULT_CHECKPOINT = "runs/sft/checkpoint_sft"
CLAIMS: dict[str, Claim] = {claim.name: claim for study in (gdpo, bgpo, egspo, dmpo, rspo) for claim in study.CLAIMS}
SUMMARY = "summary"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--claim", action="append", metavar="NAME", help=f"may be given several times; default all: {', '.join(CLAIMS)}"
    )
    parser.add_argument(
        "--checkpoint", default=DEFAULT_CHECKPOINT, help=f"a trained model's folder; default {DEFAULT_CHECKPOINT}"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--tiny", action="store_true", help="smallest sizes, on a random model: checks the experiments")
    sizes.add_argument("--large", action="store_true", help="the sizes that undecided claims need, where there are such")
    parser.add_argument("--characters", metavar="FOLDER", help="a character model for gdpo-level, see benchmarks/studies/gdpo.py")
    parser.add_argument("--parts", type=Path, default=Path("runs/claims.jsonl"), metavar="FILE", help="default runs/claims.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    from dllm_trainer.errors import UserError

    try:
        run(arguments, "python -m benchmarks.studies.claims " + shlex.join(sys.argv[1:] if argv is None else argv))
    except (UserError, ValueError, OSError) as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError where it is none of this command's."""
    if not path.is_file():
        raise ValueError(f"{path} must be a result of benchmarks.studies.claims, there is no such file")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a result of benchmarks.studies.claims, it is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != 1 or "claims" not in found:
        raise ValueError(f"{path} must be a result of benchmarks.studies.claims, got a file without its claims")
    return found


def run(arguments: argparse.Namespace, command: str) -> None:
    import torch
    from dllm_trainer.records.environment import environment

    torch.set_num_threads(1)  # before the environment is told, and one at a time: the machine may be shared
    names = arguments.claim or list(CLAIMS)
    if unknown := [name for name in names if name not in CLAIMS]:
        raise ValueError(f"--claim {unknown[0]} is unknown; there are {', '.join(CLAIMS)}")
    out: Path = arguments.out
    result: dict[str, Any] = read(out) if out.exists() else {"schema": 1, "claims": {}}
    settings = Settings(
        _checkpoint(arguments.checkpoint, arguments.tiny),
        arguments.tiny,
        arguments.seed,
        arguments.large,
        arguments.characters,
        Parts(None if arguments.tiny else arguments.parts),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        claim, started = CLAIMS[name], time.perf_counter()
        figures = claim.measure(settings)
        seconds = time.perf_counter() - started
        result["claims"][name] = {
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "environment": environment(),
            "checkpoint": settings.checkpoint,
            "seed": settings.seed,
            "tiny": settings.tiny,
            "large": settings.large,
            "sizes": dict(claim.sizes(settings)),
            "figures": figures,
        }
        # after each: a stopped run keeps what it has
        out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"{name}: {claim.verdict(figures)} ({seconds:.0f} s)", flush=True)


def _checkpoint(folder: str, tiny: bool) -> str | None:
    if tiny:
        return None
    if (Path(folder) / "config.json").is_file():
        return folder
    raise ValueError(f"--checkpoint must be the folder of a model, got {folder}, which holds no config.json")


# --- docs/claims.md -----------------------------------------------------------------------------------------


def blocks(result: Mapping[str, Any]) -> dict[str, str]:
    if missing := [name for name in CLAIMS if name not in result["claims"]]:
        raise ValueError(f"the result must hold every claim, it lacks {', '.join(missing)}; run them with --claim")
    found = {name: block(claim, result["claims"][name]["figures"]) for name, claim in CLAIMS.items()}
    return {SUMMARY: summary(result), **found}


def verdict_text(claim: Claim, figures: Mapping[str, Any]) -> str:
    verdict = claim.verdict(dict(figures))
    return f"**{verdict}** ({claim.caveat})" if claim.caveat else f"**{verdict}**"


def summary(result: Mapping[str, Any]) -> str:
    return markdown(
        ["paper", "claim", "verdict", "experiment"],
        [
            [claim.paper, claim.says, verdict_text(claim, result["claims"][name]["figures"]), f"[`{name}`](#{name})"]
            for name, claim in CLAIMS.items()
        ],
    )


def block(claim: Claim, figures: Mapping[str, Any]) -> str:
    return f"{claim.table(dict(figures))}\n\nVerdict: {verdict_text(claim, figures)}; the rule: {claim.rule}."


if __name__ == "__main__":
    sys.exit(main())
