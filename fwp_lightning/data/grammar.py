"""A generated translation task: sentences of a small grammar in a made-up pair of languages.

The target reorders and agrees::

    source    today the small dogs that a queen sees find the red book
    target    hodi la hundon linon , na regina ga vid , lo libro rudo gan trov

Each noun of the target has a gender that its determiner and its adjectives show; adjectives follow their noun; a verb
stands last in its clause, behind an auxiliary that agrees with its subject's number, however far away, and that shows
the tense, which the adverb at the start alone says. So a word of the target depends on several of the source.

Everything is drawn with whole numbers from Python's Mersenne Twister, which is the same everywhere.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Noun(NamedTuple):
    """A noun in both languages, and the ending of its gender in the target."""

    source: str
    target: str
    gender: str


NOUNS = [
    Noun("dog", "hund", "o"), Noun("cat", "kat", "a"), Noun("king", "rex", "o"), Noun("queen", "regin", "a"),
    Noun("book", "libr", "o"), Noun("house", "cas", "a"), Noun("girl", "med", "u"), Noun("horse", "ros", "u"),
    Noun("bird", "vog", "o"), Noun("river", "flum", "a"), Noun("tree", "bam", "u"), Noun("stone", "sten", "o"),
    Noun("boat", "bark", "a"), Noun("star", "stel", "a"), Noun("door", "tur", "u"), Noun("road", "veg", "o"),
]  # fmt: skip
ADJECTIVES = {
    "red": "rud", "small": "lin", "grey": "gris", "new": "nov", "dark": "murk", "bright": "hel", "quiet": "stil",
    "warm": "cal",
}  # fmt: skip
TRANSITIVE = {"see": "vid", "pull": "trag", "find": "trov", "love": "am", "paint": "mal", "follow": "sekv"}
INTRANSITIVE = {"sleep": "dorm", "fall": "kad", "sing": "kant", "wait": "vart"}
# an adverb, in the target, and the auxiliary of its tense in the singular and the plural
TENSES = {"today": ("hodi", "ga", "gan"), "yesterday": ("her", "ta", "tan"), "tomorrow": ("mor", "va", "van")}
# in tenths: a sentence with an object, a subject with a relative clause, a plural
OBJECT, RELATIVE, PLURAL = 7, 4, 5


class _Phrase(NamedTuple):
    source: list[str]
    target: list[str]
    plural: bool


def sentence_pairs(split: str, n_pairs: int) -> tuple[list[str], list[str]]:
    """Return ``n_pairs`` source sentences and their translations; the first ones are the same however many are asked.

    >>> sentence_pairs("train", 1)[0][0] == sentence_pairs("train", 2)[0][0]
    True
    """
    speaker = _Speaker(split)
    pairs = [speaker.sentence() for _ in range(n_pairs)]
    return [" ".join(pair.source) for pair in pairs], [" ".join(pair.target) for pair in pairs]


class _Speaker:
    """Draws sentences of one split."""

    def __init__(self, split: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big"))

    def _below(self, limit: int) -> int:
        return self._random.getrandbits(53) % limit

    def _one_of(self, items: Sequence[Item]) -> Item:
        return items[self._below(len(items))]

    def sentence(self) -> _Phrase:
        """Draw an adverb, a subject, a verb and mostly an object."""
        adverb = self._one_of(list(TENSES))
        in_target, *auxiliaries = TENSES[adverb]
        subject = self._noun_phrase(auxiliaries, relative=True)
        source, target = [adverb, *subject.source], [in_target, *subject.target]
        if self._below(10) < OBJECT:
            verb, thing = self._one_of(list(TRANSITIVE)), self._noun_phrase(auxiliaries, relative=False)
            source += [_conjugate(verb, subject), *thing.source]
            target += [*thing.target, auxiliaries[subject.plural], TRANSITIVE[verb]]
        else:
            verb = self._one_of(list(INTRANSITIVE))
            source.append(_conjugate(verb, subject))
            target += [auxiliaries[subject.plural], INTRANSITIVE[verb]]
        return _Phrase(source, target, subject.plural)

    def _noun_phrase(self, auxiliaries: list[str], *, relative: bool) -> _Phrase:
        """Draw a determiner, up to two adjectives and a noun, sometimes with a relative clause."""
        noun, definite = self._one_of(NOUNS), self._below(2) == 0
        plural = definite and self._below(10) < PLURAL
        adjectives = list(dict.fromkeys(self._one_of(list(ADJECTIVES)) for _ in range(self._below(3))))
        ending = noun.gender + ("n" if plural else "")
        source = ["the" if definite else "a", *adjectives, noun.source + ("s" if plural else "")]
        target = [("l" if definite else "n") + noun.gender, noun.target + ending]
        target += [ADJECTIVES[adjective] + ending for adjective in adjectives]
        if relative and self._below(10) < RELATIVE:
            verb, other = self._one_of(list(TRANSITIVE)), self._noun_phrase(auxiliaries, relative=False)
            source += ["that", *other.source, _conjugate(verb, other)]
            target += [",", *other.target, auxiliaries[other.plural], TRANSITIVE[verb], ","]
        return _Phrase(source, target, plural)


def _conjugate(verb: str, subject: _Phrase) -> str:
    return verb if subject.plural else f"{verb}s"
