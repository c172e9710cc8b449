"""A small text made by rule, for runs without a download: agreement over distances, and facts that are overwritten.

Three kinds of lines, every word of them from ``LEXICON``::

    Bamiruvo                        Bami now has ruvo; whatever was said of Bami before no longer holds
    Bami Bamiruvo                   what Bami has is what was said last; a memory that only adds keeps the earlier too
    the lomi dano kuri ... fetas    a noun and, some Zipfian words later, a verb in the same number (lomi, lomis)

A name and what its bearer has are one word, so that a single layer of attention can find the answer: a small model
learns to within some hundred steps.

Which words follow each other is drawn with integers alone from Python's Mersenne Twister, whose ``getrandbits`` is the
same on every platform and in every version, so that the text is the same everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
THE = "the"
N_NAMES, N_THINGS, N_NOUNS, N_VERBS, N_MODIFIERS = 8, 12, 40, 20, 200
# names that are spoken of at a time; one of them is exchanged now and then
N_PRESENT = 4
LONGEST_DISTANCE = 10
# of 20 lines
QUESTIONS, GIFTS = 12, 6


def _made_up_words() -> Iterator[str]:
    """Yield two-syllable words in a fixed order that mixes their beginnings."""
    syllables = [consonant + vowel for consonant, vowel in itertools.product(CONSONANTS, VOWELS)]
    for shift in range(len(syllables)):
        for index, first in enumerate(syllables):
            yield first + syllables[(index * 3 + shift) % len(syllables)]


_WORDS = _made_up_words()
NAMES = [word.capitalize() for word in itertools.islice(_WORDS, N_NAMES)]
THINGS = list(itertools.islice(_WORDS, N_THINGS))
NOUNS = list(itertools.islice(_WORDS, N_NOUNS))
VERBS = list(itertools.islice(_WORDS, N_VERBS))
MODIFIERS = list(itertools.islice(_WORDS, N_MODIFIERS))
NUMBERS = ("", "s")
FACTS = [name + thing for name in NAMES for thing in THINGS]
LEXICON = [
    THE,
    *NAMES,
    *FACTS,
    *(noun + number for noun in NOUNS for number in NUMBERS),
    *(verb + number for verb in VERBS for number in NUMBERS),
    *MODIFIERS,
]


class Narrator:
    """Draws lines and knows who has what."""

    def __init__(self, split: str) -> None:
        """Start the story of one split; it is the same whenever it is told."""
        self._random = random.Random(int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big"))
        self.present = self._sample(NAMES, N_PRESENT)
        self.possessions: dict[str, str] = {}

    def below(self, limit: int) -> int:
        """Return a uniform whole number from 0 to ``limit - 1``."""
        # 53 bits: the remainder's bias is below 1e-12, and nothing depends on how a library draws
        return self._random.getrandbits(53) % limit

    def zipfian(self, words: Sequence[str], totals: Sequence[int]) -> str:
        """Return one of ``words``, the r-th with probability proportional to 1/r."""
        draw = self.below(totals[-1])
        low, high = 0, len(words) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if draw < totals[middle] else (middle + 1, high)
        return words[low]

    def line(self) -> list[str]:
        """Return the next line's words."""
        if self.below(16) == 0:
            self._exchange_a_name()
        kind = self.below(20)
        name = self.present[self.below(N_PRESENT)]
        if kind < QUESTIONS and name in self.possessions:
            return [name, name + self.possessions[name]]
        return [self.gift(name)] if kind < QUESTIONS + GIFTS else self.sentence()

    def gift(self, name: str) -> str:
        """Let ``name`` have something else, and return the word that says so."""
        others = [thing for thing in THINGS if thing != self.possessions.get(name)]
        self.possessions[name] = others[self.below(len(others))]
        return name + self.possessions[name]

    def sentence(self) -> list[str]:
        """Return a line whose last word agrees with its second in number."""
        number = NUMBERS[self.below(2)]
        noun, verb = self.zipfian(NOUNS, _NOUN_TOTALS), self.zipfian(VERBS, _VERB_TOTALS)
        distance = 1 + self.below(LONGEST_DISTANCE)
        between = [self.zipfian(MODIFIERS, _MODIFIER_TOTALS) for _ in range(distance)]
        return [THE, noun + number, *between, verb + number]

    def _exchange_a_name(self) -> None:
        absent = [name for name in NAMES if name not in self.present]
        gone = self.below(N_PRESENT)
        # whoever comes back comes with empty hands
        self.possessions.pop(self.present[gone], None)
        self.present[gone] = absent[self.below(len(absent))]

    def _sample(self, words: Sequence[str], number: int) -> list[str]:
        left = list(words)
        return [left.pop(self.below(len(left))) for _ in range(number)]


def _zipf_totals(number: int) -> list[int]:
    """Return cumulative weights of ranks 1 to ``number``, proportional to 1/rank, as whole numbers."""
    return list(itertools.accumulate(1_000_000 // rank for rank in range(1, number + 1)))


_NOUN_TOTALS, _VERB_TOTALS, _MODIFIER_TOTALS = map(_zipf_totals, (N_NOUNS, N_VERBS, N_MODIFIERS))


def tell(split: str, n_tokens: int) -> Iterator[list[str]]:
    """Yield the lines of a split's text, as lists of words, until it has ``n_tokens`` with one end of line each.

    The training text begins with the lexicon, one word a line, so that no other split has a word that it lacks. The
    last line may go beyond ``n_tokens``.
    """
    left = n_tokens
    if split == "train":
        for word in LEXICON:
            left -= 2
            yield [word]
    narrator = Narrator(split)
    while left > 0:
        line = narrator.line()
        left -= len(line) + 1
        yield line
