"""A checkpoint in lm-evaluation-harness, from Python: ELBOs with their standard errors, settings in the results.

    python examples/evaluate_with_lm_eval.py --checkpoint runs/demo/checkpoint --samples 32

Asks one question of several answers that is made here. The harness's own tasks run by its command,
`python -m dllm_kernels.integrations.lm_eval run --model dllm-kernels --tasks gsm8k ...`. Needs
`pip install 'dllm-kernels[integrations]'`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dllm_kernels.integrations.lm_eval import DiffusionLM

QUESTION = {"question": "123=", "answers": ["321", "4", "12"], "gold": 0}


def task(folder: Path) -> dict[str, Any]:
    """A multiple choice as the harness describes it."""
    (folder / "data.jsonl").write_text(json.dumps(QUESTION))
    return {
        "task": "one_question",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


def evaluate(checkpoint: str, samples: int, folder: Path) -> dict[str, Any]:
    model = AutoModelForMaskedLM.from_pretrained(checkpoint).eval()
    lm = DiffusionLM(model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), samples=samples, batch_size=4)
    return simple_evaluate(lm, tasks=[task(folder)], bootstrap_iters=0)


if __name__ == "__main__":
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(given.checkpoint, given.samples, Path(folder))
    for answer, ((elbo, _),) in zip(QUESTION["answers"], found["samples"]["one_question"][0]["resps"], strict=True):
        print(f"{answer}: {elbo:.3f} nats")
    print(f"standard errors {json.dumps(found['config']['elbo']['standard_error'])}")
