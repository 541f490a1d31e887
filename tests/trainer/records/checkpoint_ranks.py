"""Run by trainer/test_checkpoints.py: runs that save, are killed, and resume.

python -m tests.trainer.records.checkpoint_ranks FOLDER JOB...; FOLDER/out gets a list of what the jobs found.
ranks:2:2,0   two ranks train and save halfway, then two, and a process without ranks, each go on from there: final weights
kill:20:1     a run that saves at every step is killed 20 times at random moments (seed 1), each time resumed: its final
              weights and those of a run in peace
"""

from __future__ import annotations

import functools
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import torch
from dllm_trainer.distributed import Ranks, clip_gradients, shard
from dllm_trainer.records.checkpoints import Checkpoints
from dllm_trainer.records.states import load_state
from transformers import AutoModelForMaskedLM

from dllm_kernels import accumulate
from dllm_kernels.objectives import BGPO, Batch
from tests.model.sharded_ranks import LENGTHS, WEIGHTS, B, full, world
from tests.plans import plan_of
from tests.tiny import eurobert

STEPS = 6


def train(ranks, folder, *, steps=STEPS, save=(), resume=False, hidden=16, checkpoints=None):
    """Final weights; AdamW, and dropout's random numbers drawn once a step."""
    checkpoints = Checkpoints(folder, ranks)
    found = checkpoints.latest() if resume else None
    if found is None:
        model = eurobert(vocab=101, hidden=hidden, dtype=torch.float32)
    else:
        model = AutoModelForMaskedLM.from_pretrained(found.path, dtype=torch.float32).eval()
    model = shard(model, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    if found is not None:
        load_state(found.path / "state", model, optimizer, ranks)
    mine = ranks.share(B)
    for step in range(0 if found is None else found.step, steps):
        plan = plan_of(LENGTHS, samples=2, iteration=step).cut(sequences=mine)
        noise = torch.rand(())  # of torch's global state, which must go on too
        accumulate(model, plan, BGPO, Batch({"advantages": (WEIGHTS.float() * noise)[mine]}))
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in save:
            checkpoints.save(step + 1, model, None, optimizer, state={"noise": float(noise)}, metrics={"reward": step})
    return {name: full(p.detach()) for name, p in model.named_parameters()}


def over_ranks(folder, savers, resumers):
    found = {"whole run": world(functools.partial(train, folder=folder, save=(STEPS // 2,)), savers)}
    for size in resumers:
        found[size] = world(functools.partial(train, folder=folder, resume=True), size)
    return found


def _run(folder, steps):
    torch.set_num_threads(1)
    torch.save(train(Ranks(), folder, steps=steps, save=range(1, steps + 1), resume=True), folder / "final")


def killed(folder, kills, seed):
    steps = 4 * kills
    generator, context = random.Random(seed), multiprocessing.get_context("forkserver")
    started = time.perf_counter()
    in_peace = train(Ranks(), folder / "in peace", steps=steps, save=range(1, steps + 1))
    one_step = (time.perf_counter() - started) / steps
    reached, done = [], 0
    while not (folder / "final").exists():
        process = context.Process(target=_run, args=(folder, steps))
        process.start()
        if done < kills:  # mostly somewhere in the step after the next new one, so that the run gets on, however slow it is
            early = generator.random() < 0.1
            while not early and process.is_alive() and not _saved(folder, done + 1):
                time.sleep(one_step / 100)
            time.sleep(generator.uniform(0, 2 * one_step))
            process.kill()
            done += 1
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            sys.exit("a resumed run failed")
        found = Checkpoints(folder).latest()
        reached.append(0 if found is None else found.step)
    return {"kills": done, "reached": reached, "final": torch.load(folder / "final"), "in peace": in_peace}


def _saved(folder, step):
    return any(int(path.name[5:13]) >= step for path in folder.glob("step-*"))


def job(text, folder):
    name, first, second = text.split(":")
    if name == "ranks":
        return over_ranks(folder, int(first), [int(size) for size in second.split(",")])
    return killed(folder, int(first), int(second))


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    torch.save([job(text, where / str(number)) for number, text in enumerate(sys.argv[2:])], where / "out")
