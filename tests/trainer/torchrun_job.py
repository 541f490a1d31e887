"""Run by trainer/test_distributed.py under torchrun: each rank says its place; with "fail", the last fails where others wait."""

import sys

from dllm_trainer.distributed import one_fails_all_stop, start
from dllm_trainer.errors import GuardError

if __name__ == "__main__":
    ranks = start()
    with one_fails_all_stop(ranks):
        total = ranks.total(ranks.rank + 1)
        if sys.argv[1] == "fail" and ranks.rank == ranks.size - 1:
            raise GuardError("the loss became nan")
        ranks.wait()
        if ranks.is_first:
            print(ranks.size, total)
