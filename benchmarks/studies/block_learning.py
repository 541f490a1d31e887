"""Whether block diffusion learns, and what the old scoring of a block-causal model costs: Sudoku, SFT then RL.

    for s in 0 1 2; do python -m benchmarks.studies.block_learning run --seed $s --out seed$s.json; done
    python -m benchmarks.studies.block_learning collect seed0.json seed1.json seed2.json \
        --out benchmarks/results/block-learning-cpu.json                     6 minutes of one core a seed

A Qwen3 of 0.1 million parameters that sees the clean blocks before its own block of 4, as SDAR does; its
rollouts are SDAR's, with the cache. Two ways to score it:

    blocks          one clean copy beside the noisy ones, `plan.layout`: what this package does.
    noisy history   the noisy sequence under the block-causal mask, with a law over the whole completion: what
                    it did before, and what `accumulate` refuses by now. Here alone it can still be had.

The old way is never given less: as many tokens of SFT, which are half as many examples again, and as many
updates, rollouts and samples of RL, which cost it more tokens. RL of the old way begins where its own SFT
ended (as it would have run) and, to tell the two phases apart, also where SFT by blocks ended.

The learning rates are those that `benchmarks.studies.block_rates` found on a seed and puzzles of no line here.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dllm_trainer.config import RunConfig, load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.models.codec import joined
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.records.environment import environment
from dllm_trainer.tasks import Task, make_task
from dllm_trainer.train import rl
from dllm_trainer.train.engines import OwnEngine
from dllm_trainer.train.evaluation import decodings, evaluate
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from dllm_trainer.train.sft import sft_steps
from torch import Tensor

from benchmarks.report import markdown
from benchmarks.studies import statistics
from dllm_kernels import MaskPlan, generate, make_mask_plan, noise, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples

BLOCK = 4
SEQUENCE = 33  # a puzzle, "=", its answer
BLOCKS, NOISY_HISTORY = "blocks", "noisy history"
ALGORITHMS: Mapping[str, Sequence[str]] = {
    "trace_rl": ("rl.options.mode=sdar", "rl.options.shrink=1"),
    "bgpo": (),
    # on-policy its gradient is BGPO's, so it takes two steps on the rollouts of half as many updates
    "ebpo": ("rl.inner_iterations=2",),
}
TWICE = "ebpo, as many rollouts"  # and twice as many steps as the others
RUNS = (  # how SFT scored, how RL scores, and by which algorithms
    (BLOCKS, BLOCKS, tuple(ALGORITHMS)),
    (NOISY_HISTORY, NOISY_HISTORY, tuple(ALGORITHMS)),
    (BLOCKS, NOISY_HISTORY, ("bgpo",)),  # a rollout's own states have no noise before a block
    (BLOCKS, BLOCKS, (TWICE,)),
)
TEST = "unseen_puzzles"
CHOSEN = {"trace_rl": 5.0e-5, "bgpo": 5.0e-5, "ebpo": 5.0e-5}  # by `block_rates`


@dataclass(frozen=True)
class Sizes:
    sft_steps: int
    updates: int
    overrides: tuple[str, ...]
    probes: int  # demonstrations on which the two scores are compared


USUAL = Sizes(250, 80, ("sft.batch=64",), 64)
TINY = Sizes(
    2,
    2,
    (
        "sft.batch=8",
        "rl.prompts=2",
        "rl.group=4",  # so that rewards of a group differ
        "rl.samples=2",
        "rl.reward=reference_cells",
        "task.test_puzzles=4",
        "task.train_puzzles=64",
    ),
    8,
)


def config_of(folder: Path, seed: int, sizes: Sizes, *more: str) -> RunConfig:
    keys = [
        f"seed={seed}",
        "data_seed=0",
        f"out={json.dumps(str(folder))}",
        "threads=1",
        f"model.checkpoint={json.dumps(str(folder))}",
        "model.facts.topology=block_causal",
        f"model.facts.block_length={BLOCK}",
        "model.facts.attention_mask=float",
        "rollout.sampler=sdar",
        f"rollout.block_length={BLOCK}",
        f"rollout.steps={BLOCK}",
        "rollout.cache=true",
        f"sft.steps={sizes.sft_steps}",
        f"rl.updates={sizes.updates}",
        "task.clues_min=8",
        "task.clues_max=11",
        "rl.samples=8",
        "rl.samples_per_pass=8",
        "rl.gap_every=0",
        *sizes.overrides,
        *more,
    ]
    return load_config(overrides=keys)


def save_model(folder: Path, seed: int) -> None:
    """A random Qwen3 of the demo's width, with a tokenizer of Sudoku's characters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer("01234=")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_theta=100.0,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def setup_of(config: RunConfig, task: Task, scoring: str) -> Setup:
    """The old scoring is that of a model which the trainer takes for a bidirectional one, under its block-causal mask."""
    setup = prepare(config, task, Ranks())
    if scoring == NOISY_HISTORY:
        facts = replace(setup.facts, topology="bidirectional", block_length=None)
        setup.loaded = replace(setup.loaded, facts=facts)
        del setup.model.causal_block
    return setup


class TokenCounter:
    """Tokens that a model was called with, under gradients: those of the training passes."""

    def __init__(self, setup: Setup) -> None:
        self.tokens = 0
        self._hook = setup.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.tokens += int(kwargs["input_ids"].numel() if "input_ids" in kwargs else args[0].numel())

    def close(self) -> int:
        self._hook.remove()
        return self.tokens


def solved(setup: Setup, test: str = TEST) -> dict[str, Any]:
    """By decoding: the share of unseen puzzles that are solved, and a 0 or 1 for each."""
    found = {}
    for way, decoding in decodings(setup.config.rollout).items():
        figures = evaluate(setup, test, setup.task.tests[test], decoding)
        found[way] = {key: figures[key] for key in ("correct", "reference_cells", "solved")}
    return found


# --- how far apart the two scores are -----------------------------------------------------------------------


def noisy_history_logp(setup: Setup, plan: MaskPlan) -> Tensor:
    """Log-probs `[B, K, S]` by the old scoring of a plan's own noisy tokens."""
    K, B, S = plan.shape
    first = torch.arange(S) // BLOCK
    seen = torch.zeros(S, S).masked_fill(first[None, :] > first[:, None], torch.finfo(torch.float32).min)
    found = []
    with torch.no_grad():
        for k in range(K):
            mask = seen.expand(B, 1, S, S)
            logp = setup.model(input_ids=plan.noisy_ids[k], attention_mask=mask).logits.log_softmax(-1)
            found.append(logp.gather(-1, plan.input_ids_BS[..., None])[..., 0])
    return torch.stack(found, dim=1)


def score_gap(setup: Setup, probes: int) -> dict[str, float]:
    """The old scores beside the definition's on demonstrations under the same masks; nats, of rows after the first block."""
    examples = setup.task.train[:probes]
    ids, completion, _ = joined(setup.codec.prompts(examples), setup.codec.answers(examples), 0)
    keys = noise.sequence_ids([f"gap/{e.id}" for e in examples])
    plan = make_mask_plan(
        ids, completion, law="exact", samples=8, seed=0, sequence_ids=keys, mask_id=setup.facts.mask_id, causal_block=BLOCK
    )
    right, old = score_samples(setup.model, plan, per_token=True), noisy_history_logp(setup, plan)
    first_B1 = plan.block_BS.masked_fill(~completion, 10**6).amin(-1, keepdim=True)
    later = (plan.scored & (plan.block_BS > first_B1)).transpose(0, 1)
    weight = plan.dense(plan.rows.weight).transpose(0, 1)
    bound, old_bound = ((logp * weight * plan.scored.transpose(0, 1)).sum(-1).mean() for logp in (right, old))
    return {
        "mean difference": float((right - old)[later].abs().mean()),
        "mean logp": float(right[later].mean()),
        "elbo": float(bound),
        "old elbo": float(old_bound),
    }


def states_gap(setup: Setup) -> float:
    """The largest difference of a token's log-prob between a rollout's states by blocks and as whole sequences."""
    examples = setup.task.train[:8]
    rollout = generate(
        setup.model, setup.codec.prompts(examples), sequence_ids=torch.arange(8), seed=3, **setup.generate_options()
    )
    found = []
    for settings in (rollout.settings, rollout.settings | {"causal_block": None}):
        plan = trajectory_rows(replace(rollout, settings=settings))
        options = setup.scoring_options(None, setup.config.rl, as_rolled_out=True)
        model_kwargs = setup.loaded.call_kwargs(rollout.attention_mask_BS) or None
        found.append(score_samples(setup.model, plan, per_token=True, **options | {"model_kwargs": model_kwargs}).sum(1))
    return float((found[0] - found[1]).abs().max())


# --- one seed -----------------------------------------------------------------------------------------------


def train_sft(setup: Setup) -> dict[str, Any]:
    counter, started = TokenCounter(setup), time.process_time()
    losses = [record["loss"] for record in sft_steps(setup, make_optimizer(setup.trained, setup.config.sft))]
    return {"tokens": counter.close(), "steps": len(losses), "loss": losses[-1], "cpu seconds": time.process_time() - started}


def train_rl(setup: Setup) -> dict[str, Any]:
    counter, started = TokenCounter(setup), time.process_time()

    class OfWholeSequences(OwnEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            rollout = super().generate(*args, **kwargs)
            return replace(rollout, settings=rollout.settings | {"causal_block": setup.facts.block_length})

    engine_of, rl.engine_of = rl.engine_of, OfWholeSequences  # type: ignore[assignment]
    try:
        records = list(rl.rl_updates(setup, make_optimizer(setup.trained, setup.config.rl)))
    finally:
        rl.engine_of = engine_of
    rewards = [record["reward"] for record in records]
    return {
        "tokens": counter.close(),
        "updates": len(records),
        "rewards": rewards,
        "grad_norms": [record.get("grad_norm", 0.0) for record in records],
        "cpu seconds": time.process_time() - started,
    }


def run(seed: int, sizes: Sizes, out: Path) -> dict[str, Any]:
    """All ways of training from one seed, written to `out` after each; what RL that file holds already is not done again."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"seed": seed, "sft": {}, "rl": [], "sizes": {"sft": sizes.sft_steps, "rl": sizes.updates}}
    if out.is_file():
        found["rl"] = json.loads(out.read_text())["rl"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, seed)
        base = config_of(folder, seed, sizes)
        task = make_task(base.task, seed=base.task_seed)
        weights = {}
        for scoring in (BLOCKS, NOISY_HISTORY):
            steps = sizes.sft_steps
            if scoring == NOISY_HISTORY:  # as many tokens
                steps = round(steps * found["sft"][BLOCKS]["tokens"] / (steps * base.sft.batch * SEQUENCE))
            setup = setup_of(config_of(folder, seed, sizes, f"sft.steps={steps}"), task, scoring)
            found["sft"][scoring] = train_sft(setup) | {"solved": solved(setup), "gap": score_gap(setup, sizes.probes)}
            if scoring == NOISY_HISTORY:
                found["sft"][scoring]["states gap"] = states_gap(setup)
            weights[scoring] = copy.deepcopy(setup.model.state_dict())
            print(seed, "sft", scoring, told(found["sft"][scoring]), flush=True)
        for sft, scoring, algorithms in RUNS:
            for algorithm in algorithms:
                if _row(found, sft, scoring, algorithm) is not None:
                    continue
                keys = keys_of(algorithm, CHOSEN[algorithm.partition(",")[0]], sizes)
                setup = setup_of(config_of(folder, seed, sizes, *keys), task, scoring)
                setup.model.load_state_dict(weights[sft])
                figures = train_rl(setup) | {"solved": solved(setup)}
                found["rl"].append({"sft": sft, "scoring": scoring, "algorithm": algorithm, **figures})
                out.write_text(json.dumps(found, indent=1) + "\n")
                print(seed, sft, scoring, algorithm, told(figures), flush=True)
        found["config"] = base.to_yaml().replace(str(folder), "FOLDER")
    return found


def keys_of(algorithm: str, lr: float, sizes: Sizes) -> list[str]:
    """What a run of RL adds to the config; as many optimizer steps for all but `TWICE`."""
    name = algorithm.partition(",")[0]
    keys = [f"rl.algorithm={name}", f"rl.lr={lr}", *ALGORITHMS[name]]
    return [*keys, f"rl.updates={sizes.updates // 2}"] if algorithm != TWICE and "rl.inner_iterations=2" in keys else keys


def told(figures: Mapping[str, Any]) -> str:
    shares = " ".join(f"{way} {100 * found['correct']:.1f} %" for way, found in figures["solved"].items())
    return f"{shares}, {figures['tokens']:,} tokens, {figures['cpu seconds']:.0f} s"


# --- the table ----------------------------------------------------------------------------------------------


def _row(run: Mapping[str, Any], sft: str, scoring: str, algorithm: str) -> Mapping[str, Any] | None:
    keys = {"sft": sft, "scoring": scoring, "algorithm": algorithm}
    return next((row for row in run["rl"] if all(row[key] == value for key, value in keys.items())), None)


def _figures(run: Mapping[str, Any], sft: str, scoring: str, algorithm: str | None) -> Mapping[str, Any]:
    """Of SFT alone, without an algorithm."""
    found = run["sft"][sft] if algorithm is None else _row(run, sft, scoring, algorithm)
    assert found is not None
    return found


def _outcomes(run: Mapping[str, Any], sft: str, scoring: str, algorithm: str | None, way: str) -> Tensor:
    """float `[puzzles]`: 1 where solved."""
    return torch.tensor([float(bit) for bit in _figures(run, sft, scoring, algorithm)["solved"][way]["solved"]])


def _tokens(run: Mapping[str, Any], sft: str, scoring: str, algorithm: str | None) -> int:
    return int(_figures(run, sft, scoring, algorithm)["tokens"])


def table(result: Mapping[str, Any]) -> str:
    """One line per way of training: puzzles solved at the rollouts' temperature and greedily, means over the seeds with the
    lowest and the highest, over the same seeds' SFT, and less those of the line by blocks. Intervals are over puzzles, each with
    the mean of the seeds; the seeds are those that there are. Below, how far apart the two scores are.
    """
    everyone, lines = result["runs"], []
    order = [(sft, sft, None) for sft in (BLOCKS, NOISY_HISTORY)]
    order += [(sft, scoring, name) for name in (*ALGORITHMS, TWICE) for sft, scoring, names in RUNS if name in names]
    for sft, scoring, algorithm in order:
        # of a run that was cut short: what it had ended
        runs = [run for run in everyone if algorithm is None or _row(run, sft, scoring, algorithm) is not None]
        runs = [run for run in runs if algorithm is None or _row(run, BLOCKS, BLOCKS, algorithm) is not None]
        cells = [algorithm or "SFT alone", sft, "" if algorithm is None else scoring, str(len(runs))]
        cells.append(f"{sum(_tokens(run, sft, scoring, algorithm) for run in runs) / len(runs) / 1e6:.1f}")
        for way in ("rollout", "greedy"):
            each = [_outcomes(run, sft, scoring, algorithm, way) for run in runs]
            means = [100 * float(outcome.mean()) for outcome in each]
            cells.append(f"{sum(means) / len(means):.1f} ({min(means):.1f} to {max(means):.1f})")
            cells.append("" if algorithm is None else paired(each, [_outcomes(run, sft, sft, None, way) for run in runs]))
            same = [_outcomes(run, BLOCKS, BLOCKS, algorithm, way) for run in runs]
            cells.append("" if (sft, scoring) == (BLOCKS, BLOCKS) else paired(each, same))
        lines.append(cells)
    heads = ["", "SFT scored by", "RL scored by", "seeds", "training tokens, millions"]
    heads += [head for way in ("solved, %", "greedy, %") for head in (way, "over its SFT", "over blocks")]
    gaps = {scoring: [run["sft"][scoring]["gap"] for run in everyone] for scoring in (BLOCKS, NOISY_HISTORY)}
    told = [
        f"- SFT by {scoring}: {_mean(gap, 'mean difference'):.3f} nats a token apart after the first block (of "
        f"{-_mean(gap, 'mean logp'):.3f}), ELBO {_mean(gap, 'elbo'):.2f}, by the old score {_mean(gap, 'old elbo'):.2f}."
        for scoring, gap in gaps.items()
    ]
    states = max(run["sft"][NOISY_HISTORY]["states gap"] for run in everyone)
    told.append(f"- A rollout's own states, by blocks and as whole sequences: {states:.0e} nats apart at most.")
    return "\n\n".join([markdown(heads, lines, "---"), "\n".join(told)])


def paired(each: Sequence[Tensor], other: Sequence[Tensor]) -> str:
    """Points between the means of the seeds, with a 95 % bootstrap over puzzles."""
    found = statistics.ratio(torch.stack(list(each)).mean(0) - torch.stack(list(other)).mean(0))
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _mean(gaps: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(gap[name] for gap in gaps) / len(gaps)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--seed", type=int, required=True)
    running.add_argument("--tiny", action="store_true", help="every way of training, for a moment")
    collecting = commands.add_parser("collect")
    collecting.add_argument("files", nargs="+", type=Path)
    for command in (running, collecting):
        command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        result = {"environment": environment(), **run(arguments.seed, TINY if arguments.tiny else USUAL, arguments.out)}
    else:
        runs = [json.loads(file.read_text()) for file in arguments.files]
        result = {"schema": 1, "command": "python -m benchmarks.studies.block_learning run --seed N", "runs": runs}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
