"""Recall and stories: answers are what a symbolic reader finds, splits share no sequence, and a small model learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.data.recall import RecallData
from fwp_lightning.data.scored_sequences import IGNORED, Scored, ScoredSequences, splits_of
from fwp_lightning.data.stories import StoryData
from fwp_lightning.models.sequence_model import SequenceArchitecture, SequenceModel
from fwp_lightning.sweep.training import quiet_lightning
from fwp_lightning.tasks.answering import AnsweringTask

DELTA = AttentionConfig("delta", "dpfp", phi_norm="sum")
SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_lightning():
        yield


def recall(**options: Any) -> RecallData:
    return RecallData(**{"n_pairs": 4, "length": 20, "vocabulary": 32, "seed": 1, "evaluation_sequences": 40} | options)


def stories(**options: Any) -> StoryData:
    return StoryData(**{"n_lines": 20, "n_people": 3, "seed": 1, "evaluation_sequences": 40} | options)


def rows_of(batch: Scored) -> set[tuple[int, ...]]:
    return {tuple(row) for row in batch.inputs.tolist()}


# --- what is asked, and what is right --------------------------------------------------------------------------------


def told(data: StoryData, words: list[int]) -> list[tuple[int, str, int]]:
    """Read a story as a reader would: the place of each question, its answer, and the hops it takes."""
    names = [data.words[word] for word in words]
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    found = []
    for start in range(0, len(names), 3):
        first, second, third = names[start : start + 3]
        if second == "goes":
            assert place.get(first) != third, "a line that changes nothing"
            place[first] = third
        elif second == "gets":
            assert holder.get(third) != first, "a line that changes nothing"
            holder[third] = first
        elif first == "who":
            found.append((start + 2, holder[second], 1))
        elif second in data.words[data.first_person : data.first_thing]:
            found.append((start + 2, place[second], 1))
        else:
            found.append((start + 2, place[holder[second]], 2))
    return found


@pytest.mark.parametrize("options", [{}, {"n_people": 10, "n_things": 2, "n_places": 7, "question_share": 0.9}])
def test_answers_are_what_a_reader_of_the_story_says(options: dict[str, Any]) -> None:
    data = stories(**options)
    batch = data.sequences("train", 200, 0)
    counts = {1: 0, 2: 0}
    for words, targets, kinds in zip(*(x.tolist() for x in batch), strict=True):
        expected = {at: (data.words.index(answer), hops) for at, answer, hops in told(data, words)}
        asked = {at: (targets[at], kinds[at]) for at in range(data.length) if kinds[at]}
        assert asked == expected
        for _, hops in asked.values():
            counts[hops] += 1
        assert all(targets[at] == IGNORED for at in range(data.length) if not kinds[at])
    assert min(counts.values()) > 50


def test_stories_overwrite_what_they_ask_for() -> None:
    """Of a memory that answers with the first thing it was told, half of the answers are wrong."""
    data = stories(n_lines=32)
    wrong = right = 0
    for words in data.sequences("train", 200, 0).inputs.tolist():
        names = [data.words[word] for word in words]
        first: dict[str, str] = {}
        last: dict[str, str] = {}
        for start in range(0, len(names), 3):
            one, two, three = names[start : start + 3]
            if two == "goes":
                first.setdefault(one, three)
                last[one] = three
            elif one == "where" and two in last:
                right += first[two] == last[two]
                wrong += first[two] != last[two]
    assert wrong > right > 0


@pytest.mark.parametrize("options", [{}, {"noise": False}, {"power": 1.0}, {"n_pairs": 15, "length": 60}])
def test_recall_asks_each_key_once_and_wants_its_value(options: dict[str, Any]) -> None:
    data = recall(**options)
    n = data.n_pairs
    batch = data.sequences("train", 50, 0)
    for tokens, targets, kinds in zip(*(x.tolist() for x in batch), strict=True):
        pairs = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == n
        assert all(1 <= key < data.vocabulary // 2 <= value < data.vocabulary for key, value in pairs.items())
        asked = [at for at, kind in enumerate(kinds) if kind]
        assert all(at >= 2 * n and at % 2 == 0 for at in asked)
        assert sorted(tokens[at] for at in asked) == sorted(pairs)
        assert [targets[at] for at in asked] == [pairs[tokens[at]] for at in asked]
        assert targets.count(IGNORED) == data.length - n


def test_gaps_follow_the_power_law() -> None:
    """The first place behind the pairs is asked most: p_x is proportional to a x^(a-1), here almost 1/x."""
    data = recall(n_pairs=1, length=42, noise=False)
    kinds = data.draw(20_000, np.random.default_rng(0))[2]
    shares = kinds[:, 2::2].mean(axis=0)
    law = 0.01 * np.arange(1, 21) ** (0.01 - 1)
    # a share of 0.28 over 20,000 draws has a standard error of 0.0032
    assert shares == pytest.approx(law / law.sum(), abs=0.015)


# --- splits and seeds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [recall, stories])
def test_splits_share_no_sequence_whatever_the_seed(make: Any) -> None:
    # few enough stories that chance alone would repeat some
    small = {"n_pairs": 2, "length": 8, "vocabulary": 8} if make is recall else {"n_lines": 3, "n_things": 2}
    drawn = {split: set().union(*(rows_of(make(seed=s, **small).sequences(split, 400, 0)) for s in (1, 2)))
             for split in SPLITS}  # fmt: skip
    assert not drawn["train"] & drawn["valid"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["valid"] & drawn["test"]
    assert all(len(rows) > 50 for rows in drawn.values())


def test_a_sixteenth_of_all_sequences_is_valid_and_as_many_test() -> None:
    tokens = np.random.default_rng(0).integers(50, size=(32_000, 12))
    shares = {split: float((splits_of(tokens) == split).mean()) for split in SPLITS}
    # the standard error of 1/16 is 0.0014
    assert shares["valid"] == pytest.approx(1 / 16, abs=0.006)
    assert shares["test"] == pytest.approx(1 / 16, abs=0.006)


@pytest.mark.parametrize("make", [recall, stories])
def test_seed_and_step_alone_decide_what_is_trained_on(make: Any) -> None:
    once, again = make().sequences("train", 8, 5), make().sequences("train", 8, 5)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert rows_of(once) != rows_of(make().sequences("train", 8, 6))
    assert rows_of(once) != rows_of(make(seed=2).sequences("train", 8, 5))
    # all seeds are compared on the same sequences
    first, second = (make(seed=seed).sequences("valid", 8, 0) for seed in (1, 2))
    assert torch.equal(first.inputs, second.inputs)


@pytest.mark.parametrize("make", [recall, stories])
def test_evaluation_has_as_many_sequences_as_asked_for(make: Any) -> None:
    data = make(batch_size=16)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert [len(batch.inputs) for batch in loader] == [16, 16, 8]


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (recall, {"length": 14}, r"data.length=14 must be even and at least 4 x n_pairs = 16"),
        (recall, {"vocabulary": 8}, r"data.vocabulary=8 must be even, half of it more than n_pairs=4"),
        (recall, {"power": 0}, r"data.power=0 must be > 0"),
        (recall, {"batch_size": 0}, r"data.batch_size=0 must be a whole number >= 1"),
        (stories, {"n_people": 11}, r"data.n_people=11 must be from 2 to 10"),
        (stories, {"question_share": 1.0}, r"data.question_share=1.0 must be between 0 and 1"),
    ],
)
def test_numbers_are_checked(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**options)


# --- model and task --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["none", "sinusoidal"])
def test_future_does_not_leak(positions: Any) -> None:
    torch.manual_seed(0)
    model = SequenceModel(SequenceArchitecture(d_model=8, d_ff=8, positions=positions), DELTA, 10)
    tokens = torch.randint(10, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 10
    before, after = model(tokens), model(changed)
    # float32 of the same sums
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def trained(data: ScoredSequences, attention: AttentionConfig, steps: int, **sizes: Any) -> dict[str, float]:
    torch.manual_seed(1)
    architecture = SequenceArchitecture(**{"n_layers": 1, "d_model": 32} | sizes)
    task = AnsweringTask(attention, architecture, lr=1e-2, warmup_steps=min(20, steps), max_steps=steps)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data)
    assert (task.steps, task.diverged) == (steps, None)
    return {name: float(value) for name, value in trainer.test(task, data, verbose=False)[0].items()}


def test_one_layer_with_the_delta_rule_learns_to_recall() -> None:
    data = recall(length=16, batch_size=32, steps_per_block=100)
    # one of 16 values is right by chance
    assert trained(data, DELTA, 1000)["test/accuracy"] > 0.9


def test_accuracies_of_hops_add_up() -> None:
    data = stories(n_lines=8, batch_size=8, steps_per_block=5)
    scores = trained(data, DELTA, 5, d_ff=8)
    asked = [sum(int((batch.kinds == kind).sum()) for batch in data.test_dataloader()) for kind in (1, 2)]
    right = scores["test/accuracy_one_hop"] * asked[0] + scores["test/accuracy_two_hops"] * asked[1]
    assert scores["test/accuracy"] == pytest.approx(right / sum(asked))


def test_steps_that_make_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_steps=7 must be a multiple of the 5 steps between validations"):
        trained(stories(steps_per_block=5), DELTA, 7)
