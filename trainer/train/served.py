"""Rollouts of a server: the weights that it is to have, written and loaded, and a sentence where it fails."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dllm_kernels import Rollout
from dllm_kernels.integrations.sglang import OtherWeightsError, ServerError, SGLang

from ..config import RunConfig
from ..distributed import Ranks
from ..errors import UserError
from ..records.weights import save_model

FOLDER = "rollout_weights"  # of a run


class Served:
    """An SGLang server that follows this run's weights.

    Weights are written by all ranks together, and loaded at the word of the first. Each rank asks for its own prompts, which the
    server batches. Versions are named after this start of the run, so no answer of other weights passes for one of these.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        """Raises UserError where the server does not answer."""
        rollout = config.rollout
        assert rollout.url is not None
        self._server, self._ranks = SGLang(rollout.url, timeout=rollout.timeout, retries=rollout.retries), ranks
        self._place = Path(rollout.weights or Path(config.out) / FOLDER).absolute()
        self._start = str(ranks.tell(uuid.uuid4().hex[:8])[0])
        self._number, self._changed = 0, True
        self.reloads = 0  # as the server had lost the weights, which it does when it is started anew
        with ranks.together():
            if ranks.is_first:
                try:
                    self._server.model_info()
                except ServerError as error:
                    raise UserError(f"rollout.url: {error}") from error
                if rollout.weights is None:  # what an earlier start of this run left when it ended early
                    shutil.rmtree(self._place, ignore_errors=True)

    @property
    def _version(self) -> str:
        return f"{self._start}-{self._number}"

    @property
    def _folder(self) -> Path:
        return self._place / self._version

    def changed(self) -> None:
        """The server's weights are those of an earlier step."""
        self._changed = True

    def publish(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Have the server load the weights as they are now, where they changed. A collective."""
        if not self._changed:
            return
        old = self._folder
        self._number += 1
        save_model(self._folder, model, tokenizer, self._ranks)
        with self._ranks.together():
            if self._ranks.is_first:
                self._load()
                shutil.rmtree(old, ignore_errors=True)
        self._changed = False

    def _load(self) -> None:
        try:
            self._server.load(str(self._folder), self._version)
        except ServerError as error:
            raise UserError(f"rollout.url: {error}") from error

    def generate(self, prompts: Sequence[Tensor], *, sequence_ids: Tensor, **options: Any) -> Rollout:
        """As `SGLang.generate`, of the weights that were published; a server that lost them is given them again, once.

        A collective: whichever ranks met other weights, the first has them loaded, so that no rank's answers are cut short by
        another's loading, and those ranks ask again.
        """
        found: Rollout | None = None
        for last in (False, True):
            with self._ranks.together():
                try:
                    if found is None:
                        found = self._server.generate(prompts, sequence_ids=sequence_ids.cpu(), version=self._version, **options)
                except OtherWeightsError as error:
                    if last:
                        raise UserError(f"rollout.url: {error}") from error
                except ServerError as error:
                    raise UserError(f"rollout.url: {error}") from error
            if all(self._ranks.tell(found is not None)):
                break
            with self._ranks.together():
                if self._ranks.is_first:
                    self.reloads += 1
                    self._load()
        assert found is not None
        return found

    def forget(self) -> None:
        """Remove the written weights, at the end of a run."""
        if self._ranks.is_first:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._place.is_dir() and not any(self._place.iterdir()):
                self._place.rmdir()
