"""Time and memory of other loops' own losses beside ours in the same loop, at a large vocabulary on the CPU.

    python benchmarks/loops.py --vocabulary 126464 --out benchmarks/results/loops-cpu.json
    python benchmarks/loops.py --d1 d1/diffu-grpo/diffu_grpo_trainer.py
                               --dare DARE/verl/workers/actor/llada_dp_actor_bgpo.py
                               --python "ZHZisZZ/dllm MDLMTrainer=.venv-dllm/bin/python"

Each contestant runs in a process of its own, the loop's and ours in turns: one forward and backward to warm up, then the
best of two, and the peak of the resident memory above what model and data take. Times are of the CPU, of one thread, so
that they mean something where others use the cores; a ratio is the median over the rounds of a round's. Of d1 and DARE,
which are packages of many, the methods of the loss are read from their file and run alone. `--python` names the interpreter
of a loop that wants packages of its own. Loops that are not here are left out.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.report import markdown
from dllm_kernels.env import environment

Step = Callable[[], torch.Tensor]
PROMPT = 32
MASK = 1
ROUNDS = 3


def model_and_batch(vocabulary: int, hidden: int, length: int) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        mask_token_id=MASK,
    )
    ids = torch.randint(3, vocabulary, (2, length))
    labels = ids.masked_fill(torch.arange(length) < PROMPT, -100)
    return EuroBertForMaskedLM(config), {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def trainer(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool, source: Path | None) -> Step:
    """transformers' Trainer: the usual loss on full logits, and DiffusionSFTTrainer's."""
    from dllm_kernels.integrations.transformers import DiffusionSFTConfig, DiffusionSFTTrainer

    made = DiffusionSFTTrainer(model, DiffusionSFTConfig(folder, report_to="none", use_cpu=True), train_dataset=[batch])
    if ours:
        return lambda: made.compute_loss(model, batch)

    def plain() -> torch.Tensor:
        plan = made.plan(batch, samples=1, seed=made.args.seed)
        logits = model(input_ids=plan.noisy_ids[0], attention_mask=batch["attention_mask"]).logits
        masked_BS, weight_B = plan.scored[0], plan.weight_KB[0]
        losses_N = F.cross_entropy(logits[masked_BS], batch["input_ids"][masked_BS], reduction="none")
        return (losses_N * weight_B[:, None].expand(masked_BS.shape)[masked_BS]).sum() / plan.lengths_B.sum()

    return plain


def log_probs(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool, source: Path | None) -> Step:
    """TRL's `_get_per_token_logps_and_entropies`: by its fused head, and by DiffusionLogps."""
    from accelerate import Accelerator
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    from dllm_kernels.integrations.logps import DiffusionLogps

    host = SimpleNamespace(args=SimpleNamespace(mask_id=MASK, seed=0), temperature=1.0, accelerator=Accelerator(cpu=True))
    cls = DiffusionLogps if ours else GRPOTrainer
    if ours:
        host._scored = DiffusionLogps._scored.__get__(host)
    else:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    given = batch["input_ids"], batch["attention_mask"], batch["input_ids"].shape[1] - PROMPT

    def step() -> torch.Tensor:
        logps, entropies, _ = cls._get_per_token_logps_and_entropies(host, model, *given, compute_entropy=True)
        assert entropies is not None
        return logps.mean()

    return step


def linear(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool, source: Path | None) -> Step:
    """verl's `FusedLinearForPPO`, its file alone, and ours, on the same hidden states."""
    from dllm_kernels.integrations import verl

    found = importlib.util.find_spec("verl")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    theirs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    head = verl.FusedLinearForPPO() if ours else theirs.FusedLinearForPPO()
    hidden = torch.randn(*batch["input_ids"].shape, model.config.hidden_size)
    return lambda: head(hidden.requires_grad_(), model.lm_head.weight, batch["input_ids"])[0].mean()


def mdlm(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool, source: Path | None) -> Step:
    """ZHZisZZ/dllm's `MDLMTrainer.compute_loss`, and ours."""
    from dllm.core.trainers import MDLMConfig, MDLMTrainer

    from dllm_kernels.integrations.dllm import HeadlessMDLMTrainer

    arguments = MDLMConfig(folder, report_to="none", use_cpu=True, bf16=False, eval_strategy="no")
    made = (HeadlessMDLMTrainer if ours else MDLMTrainer)(model=model, args=arguments)
    made.processing_class = SimpleNamespace(padding_side="right", mask_token_id=MASK)
    return lambda: made.compute_loss(model, dict(batch))


def methods_of(source: Path, cls: str, names: list[str], given: Mapping[str, Any]) -> type:
    """A class with these methods of one in a file, whose imports are not made: `given` has the names that they use."""
    (found,) = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef) and node.name == cls]
    found.bases, found.keywords, found.decorator_list = [], [], []
    found.body = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if len(found.body) != len(names):
        raise ValueError(f"{source} must define {', '.join(names)} in {cls}")
    scope = dict(given)
    exec(compile(ast.Module([found], []), str(source), "exec"), scope)
    made: type = scope[cls]
    return made


def d1(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool, source: Path | None) -> Step:
    """d1's `_get_per_token_logps`, and DiffusionLogps'."""
    from dllm_kernels.integrations.logps import DiffusionLogps

    assert source is not None
    names = ["_get_per_token_logps", "forward_process", "get_logits"]
    theirs = methods_of(source, "DiffuGRPOTrainer", names, {"torch": torch, "F": F, "set_seed": torch.manual_seed})
    made = (type("Ours", (DiffusionLogps, theirs), {}) if ours else theirs)()
    made.args = SimpleNamespace(mask_id=MASK, cfg_scale=0.0, p_mask_prompt=0.15)
    completion = batch["input_ids"].shape[1] - PROMPT
    return lambda: made._get_per_token_logps(model, batch["input_ids"][None], completion, [0]).mean()


class Packed(nn.Module):
    """A model as DARE patches them: the tokens of all sequences in one row, `cu_seqlens` in place of a mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inside, self.config = model, model.config

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.inside.get_output_embeddings()
        return found

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.inside.get_input_embeddings()
        return found

    def forward(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> Any:
        sequence = torch.bucketize(torch.arange(input_ids.shape[1]), cu_seqlens[1:], right=True)
        apart = torch.zeros(len(sequence), len(sequence)).masked_fill(sequence[:, None] != sequence, -torch.inf)
        position = torch.arange(input_ids.shape[1]) - cu_seqlens[sequence]
        return self.inside(input_ids=input_ids, attention_mask=apart[None, None], position_ids=position[None])


def dare(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool, source: Path | None) -> Step:
    """DARE's `_forward_micro_batch` of LLaDA's BGPO actor, one sample with half of the response hidden, and ours."""
    from dllm_kernels.integrations.verl import forward_micro_batch

    assert source is not None
    ids, packed = batch["input_ids"], Packed(model)
    place = torch.arange(ids.shape[1])
    masked = ((place >= PROMPT) & (place % 2 == 0)).expand(len(ids), 1, -1)
    micro = {
        **{name: batch[name] for name in ("input_ids", "attention_mask")},
        "responses": ids[:, PROMPT:],
        "perturbed_seq": ids[:, None].masked_fill(masked, MASK),
        "mask_indices": masked,
        "p_mask": torch.full(masked.shape, 0.5),
    }
    if ours:
        return lambda: forward_micro_batch(packed, micro)[2].mean()
    given = {"torch": torch, "F": F, "Tuple": tuple}
    actor = methods_of(source, "DLLMDataParallelPPOActor", ["_forward_micro_batch"], given)()
    actor.actor_module, actor.MASK_TOKEN_ID = packed, MASK
    actor._get_logits = lambda model, packed_input, cu_seqlens, max_seqlen, **rest: (  # without sequence parallelism
        model(packed_input, cu_seqlens, max_seqlen).logits
    )
    return lambda: actor._forward_micro_batch(micro, 1.0, 1, 1)[2].mean()


class Loop(NamedTuple):
    package: str  # that must be installed
    make: Callable[..., Step]
    read: str | None = None  # the option that names the file whose methods are run


LOOPS = {
    "transformers Trainer": Loop("transformers", trainer),
    "TRL log-probs and entropies": Loop("trl", log_probs),
    "d1 _get_per_token_logps": Loop("transformers", d1, "d1"),
    "DARE _forward_micro_batch": Loop("transformers", dare, "dare"),
    "verl FusedLinearForPPO": Loop("verl", linear),
    "ZHZisZZ/dllm MDLMTrainer": Loop("dllm", mdlm),
}


def measure(loop: str, ours: bool, sizes: tuple[int, int, int], source: Path | None = None) -> dict[str, Any]:
    """CPU seconds of a step, MiB above the model's own memory, and the loss, in this process."""
    torch.set_num_threads(1)
    model, batch = model_and_batch(*sizes)
    with tempfile.TemporaryDirectory() as folder:
        step = LOOPS[loop].make(model, batch, folder, ours, source)
        for parameter in model.parameters():  # gradients are the same for all: they are there before
            parameter.grad = torch.zeros_like(parameter)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(3):
            started = time.process_time()
            torch.manual_seed(0)
            loss = step()
            loss.backward()
            seconds.append(time.process_time() - started)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    packages = {name: version(name) for name in dict.fromkeys(("torch", "transformers", LOOPS[loop].package)) if name != "dllm"}
    return {"seconds": min(seconds[1:]), "mib": mib, "loss": float(loss.detach()), "packages": packages}


def in_turns(loop: str, sizes: tuple[int, int, int], python: str, source: Path | None, rounds: int) -> dict[str, Any]:
    """Both sides of a loop, each `rounds` times. Raises RuntimeError with what a process said that failed."""
    options = [f"--{name}={value}" for name, value in zip(("vocabulary", "hidden", "length"), sizes, strict=True)]
    found: dict[str, list[dict[str, Any]]] = {"own": [], "ours": []}
    for _ in range(rounds):
        for whose, runs in found.items():
            command = [python, __file__, *options, "--one", loop, whose]
            command += [] if source is None else [f"--{LOOPS[loop].read}={source}"]
            load = os.getloadavg()[0]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{loop}, {whose}: {done.stderr.strip().splitlines()[-1]}")
            runs.append({**json.loads(done.stdout.strip().splitlines()[-1]), "load": load})
    return {"loop": loop, **found}


def table(result: Mapping[str, Any]) -> str:
    """The table of docs/integrations.md, and how it was measured."""
    lines, loads = [], []
    for row in result["rows"]:
        own, ours = row["own"], row["ours"]
        loads += [run["load"] for run in own + ours]
        cells = [
            f"{statistics.median(run['seconds'] for run in runs):.2f} s, {statistics.median(run['mib'] for run in runs):.0f} MiB"
            for runs in (own, ours)
        ]
        times = [one["seconds"] / other["seconds"] for one, other in zip(own, ours, strict=True)]
        memory = [one["mib"] / other["mib"] for one, other in zip(own, ours, strict=True)]
        spread = f"{statistics.median(times):.2f}" + (f" [{min(times):.2f}, {max(times):.2f}]" if len(times) > 1 else "")
        lines.append([row["loop"], *cells, spread, f"{statistics.median(memory):.2f}"])
    sizes, machine = result["sizes"], result["environment"]
    told = (
        f"One forward and backward of 2 sequences of {sizes['length']} tokens, H = {sizes['hidden']}, V = {sizes['vocabulary']}, "
        "one layer, float32, a trainable head; MiB above model, data and gradients. CPU seconds of one thread, "
        f"{result['rounds']} round(s) in turns, on {machine['cpu']} ({machine['head']}), torch {machine['torch']}; the load of "
        f"the machine's {result['cores']} cores before a run was {min(loads):.1f} to {max(loads):.1f}. A ratio is the median of "
        "the rounds' [least, most]."
    )
    head = ["loop", "its own", "ours", "its time over ours", "its memory over ours"]
    return f"{told}\n\n{markdown(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--d1", type=Path, help="d1's diffu_grpo_trainer.py")
    parser.add_argument("--dare", type=Path, help="DARE's llada_dp_actor_bgpo.py")
    parser.add_argument("--python", action="append", default=[], metavar="LOOP=PATH", help="the interpreter of a loop")
    parser.add_argument("--only", action="append", choices=list(LOOPS), help="these loops")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--one", nargs=2, metavar=("LOOP", "WHOSE"), help="measure in this process")
    given = parser.parse_args()
    sizes = given.vocabulary, given.hidden, given.length
    sources = {"d1": given.d1, "dare": given.dare, None: None}
    if given.one:
        loop, whose = given.one
        print(json.dumps(measure(loop, whose == "ours", sizes, sources[LOOPS[loop].read])))
        return
    interpreters = dict(entry.split("=", 1) for entry in given.python)
    if unknown := sorted(set(interpreters) - set(LOOPS)):
        raise ValueError(f"--python must name one of {', '.join(LOOPS)}, got {unknown[0]!r}")
    rows = []
    for loop in given.only or LOOPS:
        source = sources[LOOPS[loop].read]
        if LOOPS[loop].read is not None and source is None:
            print(f"{loop}: its file is not given, --{LOOPS[loop].read}", file=sys.stderr)
        elif loop not in interpreters and importlib.util.find_spec(LOOPS[loop].package) is None:
            print(f"{loop}: {LOOPS[loop].package} is not installed", file=sys.stderr)
        else:
            rows.append(in_turns(loop, sizes, interpreters.get(loop, sys.executable), source, given.rounds))
            print(f"{loop}: done", file=sys.stderr)
    result = {
        "sizes": dict(zip(("vocabulary", "hidden", "length"), sizes, strict=True)),
        "rounds": given.rounds,
        "cores": os.cpu_count(),
        "environment": environment(),
        "rows": rows,
    }
    print(table(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
