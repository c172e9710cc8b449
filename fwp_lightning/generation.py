"""Continue a text with a trained language model, word by word.

Without positions a model decodes with its state: each word costs the same and nothing grows (softmax excepted, whose
keys and values are kept). Positions that count from a segment's end are other ones after every word, so such a model
reads the last T words anew for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwp_lightning.attention import MemoryState, attention_of
from fwp_lightning.checkpoint_files import read_plain
from fwp_lightning.data.vocabulary import Vocabulary
from fwp_lightning.errors import UserError, sentence_of
from fwp_lightning.models.language_model import LanguageModel, build_language_model
from fwp_lightning.models.transformer import Architecture


@dataclass(frozen=True)
class Sampling:
    """How the next word is drawn."""

    temperature: float = 1.0
    """The log-probabilities are divided by it; 0 takes the most probable word."""
    top_k: int = 0
    """Draw among this many most probable words; 0: among all."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a whole number >= 0")

    def draw(self, log_probs: Tensor, generator: torch.Generator) -> int:
        """Return the number of a word for log-probabilities ``[V]``."""
        if self.temperature == 0:
            return int(log_probs.argmax())
        scores = log_probs / self.temperature
        if self.top_k:
            scores = scores.masked_fill(scores < scores.topk(min(self.top_k, len(scores))).values[-1], -torch.inf)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class Decoder:
    """A model that reads words one after the other and knows the log-probabilities of the next."""

    def __init__(self, model: LanguageModel, length: int) -> None:
        """Read with a state where the model has one that holds for words to come, else the last ``length`` words."""
        self.model = model.eval()
        self.length = length
        self.has_state = model.architecture.positions != "sinusoidal"
        self.state: Any = None
        self._words: list[int] = []

    @torch.inference_mode()
    def read(self, words: list[int]) -> Tensor:
        """Read words and return the log-probabilities ``[V]`` of the one that follows."""
        if self.has_state:
            hidden, self.state = self.model(torch.tensor([words]), self.state)
        else:
            self._words = (self._words + words)[-self.length :]
            hidden, _ = self.model(torch.tensor([self._words]))
        return self.model.words.log_probs(hidden[:, -1])[0]

    @property
    def state_size(self) -> int:
        """Numbers kept between words; of a model without a state the words themselves."""
        if not self.has_state:
            return len(self._words)
        return sum(x.numel() for layer in self.state or [] for x in _tensors(layer))


def _tensors(layer: MemoryState | Tensor) -> list[Tensor]:
    if isinstance(layer, Tensor):
        return [layer]
    return [*layer.memory, *([] if layer.z is None else [layer.z])]


def generate(decoder: Decoder, prompt: list[int], number: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """Yield ``number`` words that follow ``prompt``, of which there must be one at least."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = decoder.read(prompt)
    for _ in range(number):
        word = sampling.draw(log_probs, generator)
        yield word
        log_probs = decoder.read([word])


@dataclass(frozen=True)
class Trained:
    """What a run leaves behind: a model, its words and the length of its segments."""

    model: LanguageModel
    vocabulary: Vocabulary
    length: int


def load_trained(path: Path) -> Trained:
    """Return the model in the ``final.ckpt`` of a run; a file that is none is one sentence."""
    try:
        content = read_plain(path)
    except UserError as error:
        raise UserError(f"--checkpoint {error}") from error
    if not {"config", "words", "weights"} <= content.keys():
        raise UserError(
            f"--checkpoint {path} holds no language model with its words; name the final.ckpt in the folder of a "
            "complete run."
        )
    settings, data = content["config"]["model"]["init_args"], content["config"]["data"]["init_args"]
    attention = attention_of(settings["attention"])
    vocabulary = Vocabulary(content["words"])
    try:
        model = build_language_model(Architecture(**settings["architecture"]), attention, len(vocabulary))
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise UserError(
            f"--checkpoint {path}: the weights are of another configuration: {sentence_of(error)}"
        ) from error
    return Trained(model, vocabulary, data["length"])


def continue_text(
    trained: Trained, prompt: str, number: int, sampling: Sampling, seed: int, write: Callable[[str], Any]
) -> str:
    """Hand the prompt and ``number`` words that follow it to ``write``; return in a sentence what a word cost."""
    decoder = Decoder(trained.model, trained.length)
    words = prompt.split()
    ids = trained.vocabulary.encode(words).tolist()
    write("".join(f"{word} " for word in words))
    started = time.perf_counter()
    # lines begin behind the end of another
    for word in generate(decoder, [Vocabulary.eos, *ids], number, sampling, seed):
        write("\n" if word == Vocabulary.eos else f"{trained.vocabulary.words[word]} ")
    milliseconds = 1000 * (time.perf_counter() - started) / number
    how = f"a state of {decoder.state_size:,} numbers" if decoder.has_state else f"the last {trained.length} words anew"
    return f"{number} words, {milliseconds:.1f} ms each, from {how}"
