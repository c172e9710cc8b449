"""The part `training`: words a second of a language model in training, against the loop over time steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.bench.clocks import CPU, Clock, Function, interleaved
from fwp_lightning.bench.records import Group, Measurement
from fwp_lightning.bench.rules import Result, Settings
from fwp_lightning.models.language_model import LanguageModel, build_language_model
from fwp_lightning.models.transformer import Architecture
from fwp_lightning.tasks.language_modeling import WORD_EXPONENT
from fwp_lightning.tasks.updates import made_up_words

BACKENDS = ("auto", "reference")
CLIP, LR = 0.25, 1e-3
CHECKED_UPDATES = 3
# float32 against float64, over three updates of Adam; a wrong gradient changes the second loss by order 1e-2
TOLERANCE = 1e-3

ROWS = {
    "Linear Transformer": AttentionConfig("sum", "elu", attention_norm="readout"),
    "Delta Network": AttentionConfig("delta", "elu", phi_norm="sum"),
    "DPFP sum": AttentionConfig("sum", "dpfp", nu=1, attention_norm="readout"),
    "DPFP delta": AttentionConfig("delta", "dpfp", nu=1, phi_norm="sum"),
}


@dataclass(frozen=True)
class Size:
    """A language model and its batches, without dropout, which would hide what is compared."""

    architecture: Architecture
    n_words: int
    batch: int
    length: int

    @property
    def words(self) -> int:
        """Words of an update."""
        return self.batch * self.length


def _size(n_words: int, batch: int, length: int, **sizes: int | list[int]) -> Size:
    return Size(Architecture(dropout=0.0, **sizes), n_words, batch, length)  # type: ignore[arg-type]


# of the profiles of experiments/table2.yaml
SIZES = {
    "smoke": _size(426, 16, 64, n_layers=2, d_model=64, n_heads=4, d_ff=128, cutoffs=[200, 400]),
    "short": _size(33_278, 8, 256, n_layers=2, d_model=128, n_heads=8, d_ff=512, cutoffs=[2000, 10000]),
}
QUICK_SIZES = {"quick": _size(20, 2, 8, n_layers=1, d_model=8, n_heads=2, d_ff=8, cutoffs=[])}


@dataclass
class Trainer:
    """A language model with its optimiser."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer

    def update(self, words: Tensor) -> float:
        """Take an optimiser step on words ``[B, T + 1]``, as the task does; return the loss before it."""
        self.optimizer.zero_grad()
        hidden, _ = self.model(words[:, :-1])
        loss = self.model.words.nll(hidden.flatten(0, 1), words[:, 1:].flatten()).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return float(loss.detach())


def trainer_of(attention: AttentionConfig, size: Size, backend: str, dtype: torch.dtype = torch.float32) -> Trainer:
    """Return a fresh trainer, the same parameters for every backend."""
    torch.manual_seed(0)
    chosen = dataclasses.replace(attention, backend=backend)
    model = build_language_model(size.architecture, chosen, size.n_words).to(dtype).train()
    return Trainer(model, torch.optim.Adam(model.parameters(), lr=LR, fused=True))


def measure_training(settings: Settings) -> Iterator[Result]:
    """Yield the updates of every row at every size; process time of one thread."""
    if settings.device != "cpu":
        settings.tell("training is not measured: on a GPU `fwp sweep table2 --dry-run --measure` does that")
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, size in (QUICK_SIZES if settings.quick else SIZES).items():
            for row, attention in ROWS.items():
                yield _compare(row, attention, name, size, CPU, settings)
    finally:
        torch.set_num_threads(before)


def _compare(row: str, attention: AttentionConfig, name: str, size: Size, clock: Clock, settings: Settings) -> Result:
    torch.manual_seed(1)
    words = made_up_words(size.n_words, (size.batch, size.length + 1), WORD_EXPONENT)
    definition = trainer_of(attention, size, "reference", torch.float64)
    expected = [definition.update(words) for _ in range(CHECKED_UPDATES)]
    functions: dict[str, Function] = {}
    for backend in BACKENDS:
        trainer = trainer_of(attention, size, backend)
        losses = [trainer.update(words) for _ in range(CHECKED_UPDATES)]
        error = max(abs(ours - right) for ours, right in zip(losses, expected, strict=True))
        if error <= TOLERANCE:
            functions[backend] = functools.partial(trainer.update, words)
        else:
            settings.tell(f"{backend} is not measured for {row} at {name}: its losses are off by {error:.1e}")
    spreads = interleaved(functions, clock, settings.rounds)
    group = Group("training", row, f"{name} B{size.batch} T{size.length}", "float32", 1, clock.name, "update")
    return group, [Measurement(backend, spread) for backend, spread in spreads.items()]
