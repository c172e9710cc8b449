"""Questions over changing facts: people go to places, things change hands, and what held before holds no longer.

In the spirit of bAbI (Weston et al. 2015, tasks 1 and 2), of a generator of its own, with facts that are overwritten. A
story is a line of three words after the other::

    mira goes garden      mira is in the garden now, wherever she was
    mira gets ball        mira has the ball now, whoever had it
    where mira ?          garden                      one hop
    who ball ?            mira                        one hop
    where ball ?          garden, where its holder is two hops

The answer is to be said at the question mark and is not part of the text. Only what is known is asked.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fwp_lightning.data.scored_sequences import IGNORED, Ints, ScoredSequences

GOES, GETS, WHERE, WHO, MARK = range(5)
WORDS = ("goes", "gets", "where", "who", "?")
PEOPLE = ("mira", "tomas", "ines", "jonas", "lena", "omar", "pia", "ravi", "sara", "yuri")
THINGS = ("ball", "book", "coin", "drum", "flute", "key", "lamp", "map", "rope", "spoon")
PLACES = ("attic", "barn", "cellar", "garden", "hall", "kitchen", "library", "office", "park", "shop")
# line kinds, in the order in which ``draw`` deals them
GO, GET, WHERE_PERSON, WHO_HAS, WHERE_THING = range(5)


class StoryData(ScoredSequences):
    """Stories of ``n_lines`` lines over as many people, things and places as are asked for."""

    kinds: ClassVar[tuple[str, ...]] = ("one_hop", "two_hops")

    def __init__(
        self,
        n_lines: int = 32,
        n_people: int = 5,
        n_things: int = 5,
        n_places: int = 5,
        question_share: float = 0.4,
        batch_size: int = 64,
        steps_per_block: int = 100,
        evaluation_sequences: int = 1000,
        seed: int | None = None,
    ) -> None:
        """Check the numbers.

        Args:
            n_lines: lines of a story, three words each.
            n_people: at most 10.
            n_things: at most 10.
            n_places: at most 10.
            question_share: of the lines that ask, as far as anything is known; a third of them need two hops.
            batch_size: stories per optimiser step.
            steps_per_block: optimiser steps of a Lightning epoch.
            evaluation_sequences: of valid, and of test.
            seed: of the training data; None: the run's own (seed_everything).
        """
        numbers = {"n_people": n_people, "n_things": n_things, "n_places": n_places}
        super().__init__(batch_size, steps_per_block, evaluation_sequences, seed, n_lines=n_lines, **numbers)
        for name, value in numbers.items():
            if not 2 <= value <= len(PEOPLE):
                raise ValueError(f"data.{name}={value} must be from 2 to {len(PEOPLE)}")
        if not 0 < question_share < 1:
            raise ValueError(f"data.question_share={question_share} must be between 0 and 1")
        self.n_lines, self.question_share = n_lines, question_share
        self.n_people, self.n_things, self.n_places = n_people, n_things, n_places
        self.words = (*WORDS, *PEOPLE[:n_people], *THINGS[:n_things], *PLACES[:n_places])
        self.first_person = len(WORDS)
        self.first_thing = self.first_person + n_people
        self.first_place = self.first_thing + n_things

    @property
    def length(self) -> int:
        """T, the words of a story."""
        return 3 * self.n_lines

    @property
    def vocabulary_size(self) -> int:
        """Number of words."""
        return len(self.words)

    def draw(self, n: int, generator: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """Return words, answers and kinds ``[n, T]`` of n stories."""
        place_of, holder_of = np.full((n, self.n_people), -1), np.full((n, self.n_things), -1)
        rows = np.arange(n)
        lines = []
        for _ in range(self.n_lines):
            person, thing, place = (
                generator.integers(limit, size=n) for limit in (self.n_people, self.n_things, self.n_places)
            )
            place = _another(place, place_of[rows, person], self.n_places)
            owner = _another(person, holder_of[rows, thing], self.n_people)
            kind = self._kinds(generator.random((n, 2)), place_of, holder_of, person, thing)
            lines.append(self._line(kind, person, owner, thing, place, place_of, holder_of))
            place_of[rows[kind == GO], person[kind == GO]] = place[kind == GO]
            holder_of[rows[kind == GET], thing[kind == GET]] = owner[kind == GET]
        inputs, targets, kinds = (np.concatenate(parts, axis=1) for parts in zip(*lines, strict=True))
        return inputs, targets, kinds

    def _kinds(self, luck: np.ndarray, place_of: Ints, holder_of: Ints, person: Ints, thing: Ints) -> Ints:
        """Deal each story its next line; what cannot be answered yet is told instead."""
        rows = np.arange(len(person))
        asks, which = luck[:, 0] < self.question_share, (luck[:, 1] * 3).astype(np.int64)
        told = np.where(luck[:, 1] < 0.5, GO, GET)
        holder = holder_of[rows, thing]
        known = np.stack([place_of[rows, person] >= 0, holder >= 0, (holder >= 0) & (place_of[rows, holder] >= 0)])
        return np.where(asks & known[which, rows], WHERE_PERSON + which, told)

    def _line(
        self, kind: Ints, person: Ints, owner: Ints, thing: Ints, place: Ints, place_of: Ints, holder_of: Ints
    ) -> tuple[Ints, Ints, Ints]:
        rows = np.arange(len(kind))
        holder = holder_of[rows, thing]
        who, what, there = self.first_person + person, self.first_thing + thing, self.first_place + place
        words = {
            GO: (who, GOES, there),
            GET: (self.first_person + owner, GETS, what),
            WHERE_PERSON: (WHERE, who, MARK),
            WHO_HAS: (WHO, what, MARK),
            WHERE_THING: (WHERE, what, MARK),
        }
        answers = {
            WHERE_PERSON: self.first_place + place_of[rows, person],
            WHO_HAS: self.first_person + holder,
            WHERE_THING: self.first_place + place_of[rows, holder],
        }
        inputs = np.zeros((len(kind), 3), dtype=np.int64)
        targets, kinds = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        for name, three in words.items():
            for column, word in enumerate(three):
                inputs[:, column] = np.where(kind == name, np.asarray(word), inputs[:, column])
        for name, answer in answers.items():
            targets[:, 2] = np.where(kind == name, answer, targets[:, 2])
        kinds[:, 2] = np.select([kind == WHERE_THING, kind >= WHERE_PERSON], [2, 1], 0)
        return inputs, targets, kinds


def _another(drawn: Ints, present: Ints, limit: int) -> Ints:
    """What was drawn, or the next one where that is what holds already: every fact that is told changes something."""
    return np.where(drawn == present, (drawn + 1) % limit, drawn)
