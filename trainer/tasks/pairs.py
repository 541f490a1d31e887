"""Preference pairs for VRPO: a prompt with a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ..errors import UserError
from .config import PairsConfig
from .files import distinct, first_rows, id_of, text_of
from .from_scratch import reading
from .rewards import exact_match
from .task import Example, Task


def make(config: PairsConfig, *, seed: int) -> Task:
    """A task whose examples hold the chosen completion; `split` returns both sides."""

    def examples(source: str, rows: int | None) -> list[Example]:
        found: list[Example] = []
        for where, row in first_rows(source, rows):
            prompt, chosen, rejected = (
                text_of(row, column, where) for column in (config.prompt_column, config.chosen_column, config.rejected_column)
            )
            if chosen == rejected:
                raise UserError(f"{where}: chosen and rejected are the same text, which prefers nothing")
            facts = {"answer": chosen, "rejected": rejected}
            found.append(Example(id_of(row, config.id_column, where, len(found)), prompt, chosen, facts))
        return distinct(found, source)

    train = examples(config.train, config.train_rows)
    tests = {name: examples(source, config.test_rows) for name, source in config.tests.items()}
    everything = [*train, *chain(*tests.values())]
    return Task(
        name="pairs",
        train=train,
        tests=tests,
        rewards={"exact_match": exact_match},
        correct=exact_match,
        metrics={},
        completion_length=config.completion_length,
        system=config.system,
        **reading(config.style, everything, config.vocabulary, [config.system, *(e.facts["rejected"] for e in everything)]),
    )


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The chosen and the rejected sides of pairs, row by row, for the two ELBOs of VRPO.

    Both sides keep the pair's id: with one sequence id for both they share masks and noise, with different
    members they do not.
    """
    return list(examples), [Example(e.id, e.prompt, e.facts["rejected"], e.facts) for e in examples]
