"""The part `generation`: what a word costs after a text of some length, from a fast weight memory or from all keys."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.bench.clocks import CPU, Clock, Function, interleaved
from fwp_lightning.bench.records import Group, Measurement
from fwp_lightning.bench.rules import Result, Settings
from fwp_lightning.generation import Decoder
from fwp_lightning.models.language_model import build_language_model
from fwp_lightning.models.transformer import Architecture

LENGTHS = (64, 256, 1024, 4096)
QUICK_LENGTHS = (8, 16)
N_WORDS = 1000
ATTENTIONS = {
    "softmax": AttentionConfig("softmax", "identity"),
    "sum": AttentionConfig("sum", "elu", phi_norm="sum"),
    "delta": AttentionConfig("delta", "elu", phi_norm="sum"),
}
# log-probabilities in float32 after 16 layers
TOLERANCE = 1e-3


def measure_generation(settings: Settings) -> Iterator[Result]:
    """Yield the cost of a word and the size of what is kept, for the paper's small model without positions."""
    if settings.device != "cpu":
        settings.tell("generation is not measured: `fwp generate` decodes on the CPU")
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _by_length(settings, CPU)
    finally:
        torch.set_num_threads(before)


def _by_length(settings: Settings, clock: Clock) -> Iterator[Result]:
    decoders = {}
    for name, attention in ATTENTIONS.items():
        problem = _disagreement(decoder_of(attention))
        if problem:
            settings.tell(f"{name} is not measured in generation: {problem}")
        else:
            decoders[name] = decoder_of(attention)
    words = torch.randint(N_WORDS, (LENGTHS[-1],), generator=torch.Generator().manual_seed(0)).tolist()
    done = 0
    for length in QUICK_LENGTHS if settings.quick else LENGTHS:
        functions: dict[str, Function] = {}
        for name, decoder in decoders.items():
            decoder.read(words[done:length])
            functions[name] = functools.partial(_read_one, decoder, decoder.state)
        spreads = interleaved(functions, clock, settings.rounds)
        for name, decoder in decoders.items():
            decoder.state = functions[name].args[1]  # type: ignore[attr-defined]
        done = length
        group = Group("generation", "language model", f"after {length} words", "float32", 1, clock.name, "word")
        kept = {name: 4 * decoder.state_size / 2**20 for name, decoder in decoders.items()}
        yield group, [Measurement(name, spreads[name], memory=kept[name]) for name in decoders]


def decoder_of(attention: AttentionConfig) -> Decoder:
    """Return a decoder with the small model's sizes (Sec. 6.3) and few words, over which its softmax costs little."""
    torch.manual_seed(0)
    model = build_language_model(Architecture(positions="none", cutoffs=[]), attention, N_WORDS)
    return Decoder(model, LENGTHS[-1])


def _read_one(decoder: Decoder, state: object) -> torch.Tensor:
    decoder.state = state
    return decoder.read([1])


@torch.inference_mode()
def _disagreement(decoder: Decoder) -> str | None:
    """Return how words read one by one differ from the whole text read at once in float64, or None."""
    words = list(range(1, 9))
    found = [decoder.read([word]) for word in words][-1]
    model = decoder.model.double()
    hidden, _ = model(torch.tensor([words]))
    error = float((model.words.log_probs(hidden[:, -1])[0] - found).abs().max())
    return None if error <= TOLERANCE else f"its log-probabilities are off by {error:.1e}"
