"""Registries and counter-based seeds: names are taken once, and a draw depends on its place alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fwp_lightning.registry import Registry, did_you_mean
from fwp_lightning.seeding import generator_for


@pytest.fixture
def colours() -> Registry[type]:
    registry: Registry[type] = Registry("colour")

    @registry.register("red")
    class Red: ...

    @registry.register("blue")
    class Blue: ...

    return registry


def test_a_registered_part_is_found_and_returned_unchanged_by_the_decorator(colours: Registry[type]) -> None:
    class Green: ...

    assert colours.register("green")(Green) is Green
    assert colours["green"] is Green
    assert "green" in colours
    assert list(colours) == ["red", "blue", "green"]
    assert len(colours) == 3


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known_ones(colours: Registry[type]) -> None:
    with pytest.raises(ValueError, match=r"unknown colour 'rde'\. Did you mean 'red'\? Known: red, blue\."):
        colours["rde"]
    assert "rde" not in colours


def test_a_name_like_no_other_gets_no_suggestion(colours: Registry[type]) -> None:
    with pytest.raises(ValueError, match=r"^unknown colour 'zzzzzz'\. Known: red, blue\.$"):
        colours["zzzzzz"]


def test_did_you_mean_of_an_empty_registry_is_still_a_sentence() -> None:
    assert did_you_mean("x", []).startswith("Known:")


def test_a_taken_name_is_refused_and_the_first_part_stays(colours: Registry[type]) -> None:
    first = colours["red"]

    class Crimson: ...

    with pytest.raises(ValueError, match="colour 'red' is already registered"):
        colours.register("red")(Crimson)
    assert colours["red"] is first


def test_a_taken_name_is_refused_even_for_a_class_of_the_same_name_from_another_file() -> None:
    registry: Registry[type] = Registry("colour")
    # two files of two users, each with a class Mine
    parts = [type("Mine", (), {"__module__": module}) for module in ("first_file", "second_file")]
    registry.register("mine")(parts[0])
    with pytest.raises(ValueError, match="colour 'mine' is already registered"):
        registry.register("mine")(parts[1])
    assert registry["mine"] is parts[0]


def test_registering_the_same_part_again_is_harmless(colours: Registry[type]) -> None:
    red = colours["red"]
    assert colours.register("red")(red) is red
    assert len(colours) == 2


def draw(seed: int, *place: str | int) -> list[float]:
    return torch.rand(8, generator=generator_for(seed, *place), dtype=torch.float64).tolist()


def test_a_place_gives_the_same_numbers_whenever_it_is_asked() -> None:
    first = draw(1, "train", 17)
    torch.manual_seed(99)
    draw(1, "train", 3)
    assert draw(1, "train", 17) == first


def test_different_places_and_seeds_give_different_numbers() -> None:
    places = [(1, "train", 17), (2, "train", 17), (1, "valid", 17), (1, "train", 18), (1, "train"), (11, "train", 7)]
    draws = [tuple(draw(seed, *place)) for seed, *place in places]
    assert len(set(draws)) == len(places)


def test_asking_for_a_generator_leaves_the_global_one_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    draw(1, "train", 0)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_the_seed_of_a_place_is_pinned_because_committed_results_rest_on_it() -> None:
    digest = hashlib.sha256(b"(1, 'train', 17)").digest()
    assert generator_for(1, "train", 17).initial_seed() == int.from_bytes(digest[:7], "big")


def test_another_process_draws_the_same_numbers() -> None:
    root = Path(__file__).resolve().parent.parent
    command = "from fwp_lightning.seeding import generator_for as g; print(g(1, 'train', 17).initial_seed())"
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "123"}
    out = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(out.stdout) == generator_for(1, "train", 17).initial_seed()
