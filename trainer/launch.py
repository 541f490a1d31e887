"""`python -m dllm_trainer.launch`: torchrun with the same arguments, that ends quietly and with the status of its ranks.

    python -m dllm_trainer.launch --nproc-per-node 8 -m dllm_trainer rl --config llada-8b-bgpo

torchrun itself ends with a traceback and status 1 whatever came, so that a scheduler cannot tell a run that saved its state and
wants to go on (75) from one with a mistake in its config (2).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from .errors import STOPPED_BY_CTRL_C, STOPPED_BY_SIGNAL


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun's command line in this process; the status to exit with.

    0 where all ranks ended well; 130 after Ctrl-C and 75 after SIGTERM, SIGHUP or SIGQUIT, which torchrun has passed on to its
    ranks and waited for; else that of the rank that failed first, 128 + n where signal n ended it. Errors in torchrun's own
    arguments are argparse's (SystemExit 2).
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(list(arguments)))
    except SignalException as stopped:
        return STOPPED_BY_CTRL_C if stopped.sigval == signal.SIGINT else STOPPED_BY_SIGNAL
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code: int = failure.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        print(f"dllm-kernels: rank {rank} ended {how}, and with it the run", file=sys.stderr, flush=True)
        return 128 - code if code < 0 else code
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
