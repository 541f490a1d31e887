"""Time and memory of other loops' own losses beside ours in the same loop, at a large vocabulary on the CPU.

    python benchmarks/loops.py --vocabulary 126464

Each contestant runs in a process of its own: one forward and backward to warm up, then the best of three, and the peak of
the resident memory above what model and data take. Loops whose package is not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Step = Callable[[], torch.Tensor]
PROMPT = 32
MASK = 1


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


def trainer(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool) -> Step:
    """transformers' Trainer: the usual loss on full logits, and DiffusionSFTTrainer's."""
    from dllm_kernels.integrations.transformers import DiffusionSFTConfig, DiffusionSFTTrainer

    made = DiffusionSFTTrainer(model, DiffusionSFTConfig(folder, report_to="none", use_cpu=True), train_dataset=[batch])
    if ours:
        return lambda: made.compute_loss(model, batch)

    def plain() -> torch.Tensor:
        plan = made.plan(batch, samples=1, seed=0)
        logits = model(input_ids=plan.noisy_ids[0], attention_mask=batch["attention_mask"]).logits
        masked_BS, weight_B = plan.scored[0], plan.weight_KB[0]
        losses_N = F.cross_entropy(logits[masked_BS], batch["input_ids"][masked_BS], reduction="none")
        return (losses_N * weight_B[:, None].expand(masked_BS.shape)[masked_BS]).sum() / plan.lengths_B.sum()

    return plain


def log_probs(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool) -> Step:
    """TRL's `_get_per_token_logps_and_entropies`: by its fused head, and by DiffusionLogps."""
    from types import SimpleNamespace

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


def linear(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool) -> Step:
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


def mdlm(model: Any, batch: dict[str, torch.Tensor], folder: str, ours: bool) -> Step:
    """ZHZisZZ/dllm's `MDLMTrainer.compute_loss`, and ours."""
    from types import SimpleNamespace

    from dllm.core.trainers import MDLMConfig, MDLMTrainer

    from dllm_kernels.integrations.dllm import HeadlessMDLMTrainer

    arguments = MDLMConfig(folder, report_to="none", use_cpu=True, bf16=False, eval_strategy="no")
    made = (HeadlessMDLMTrainer if ours else MDLMTrainer)(model=model, args=arguments)
    made.processing_class = SimpleNamespace(padding_side="right", mask_token_id=MASK)
    return lambda: made.compute_loss(model, dict(batch))


LOOPS: dict[str, tuple[str, Callable[..., Step]]] = {
    "transformers Trainer": ("transformers", trainer),
    "TRL log-probs and entropies": ("trl", log_probs),
    "verl FusedLinearForPPO": ("verl", linear),
    "ZHZisZZ/dllm MDLMTrainer": ("dllm", mdlm),
}


def measure(loop: str, ours: bool, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Seconds of a step and MiB above the model's own memory, in this process."""
    model, batch = model_and_batch(*sizes)
    with tempfile.TemporaryDirectory() as folder:
        step = LOOPS[loop][1](model, batch, folder, ours)
        for parameter in model.parameters():  # gradients are the same for all: they are there before
            parameter.grad = torch.zeros_like(parameter)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            torch.manual_seed(0)
            step().backward()
            seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds[1:]), "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--one", nargs=2, metavar=("LOOP", "WHOSE"), help="measure in this process")
    given = parser.parse_args()
    sizes = given.vocabulary, given.hidden, given.length
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1] == "ours", sizes)))
        return
    print(f"2 sequences of {given.length} tokens, H = {given.hidden}, V = {given.vocabulary}, float32")
    for loop, (package, _) in LOOPS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{loop}: {package} is not installed")
            continue
        for whose in ("its own", "ours"):
            options = [f"--{name}={value}" for name, value in zip(("vocabulary", "hidden", "length"), sizes, strict=True)]
            command = [sys.executable, __file__, *options, "--one", loop, whose]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{loop}, {whose}: {done.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{loop}, {whose}: {found['seconds']:.2f} s, {found['mib']:.0f} MiB")


if __name__ == "__main__":
    main()
