"""Generation: decoding with a state writes what reading everything anew would, at a cost that does not grow."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.cli import main
from fwp_lightning.data.wikitext import WikiTextData
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import find_project, load_experiment, resolve_runs
from fwp_lightning.generation import Decoder, Sampling, generate, load_trained
from fwp_lightning.models.language_model import LanguageModel, build_language_model
from fwp_lightning.models.transformer import Architecture

ROOT = Path(__file__).resolve().parent.parent
V = 30
ATTENTIONS = {
    "delta": AttentionConfig(rule="delta", phi_norm="sum"),
    "delta, normalised": AttentionConfig(rule="delta", phi_norm="sum", attention_norm="both"),
    "sum": AttentionConfig(rule="sum", attention_norm="readout"),
    "favor": AttentionConfig(rule="sum", feature_map="favor", n_features=4, attention_norm="readout"),
    "softmax": AttentionConfig(rule="softmax", feature_map="identity"),
}


def small(attention: AttentionConfig, **sizes: Any) -> LanguageModel:
    torch.manual_seed(1)
    given = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 12, "cutoffs": [9], "positions": "none", **sizes}
    model = build_language_model(Architecture(**given), attention, V).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


WORDS = [0, 5, 7, 21, 3, 3, 29, 11, 0, 8, 14, 2, 5, 26]


def read_in_pieces(model: LanguageModel) -> list[torch.Tensor]:
    """The first three words at once, as a prompt, the others one by one."""
    decoder = Decoder(model, length=4)
    return [decoder.read(words) for words in [WORDS[:3], *([word] for word in WORDS[3:])]]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_decoding_with_a_state_knows_what_reading_everything_does(name: str) -> None:
    model = small(ATTENTIONS[name])
    hidden, _ = model(torch.tensor([WORDS]))
    for ours, expected in zip(read_in_pieces(model), model.words.log_probs(hidden[0, 2:]), strict=True):
        torch.testing.assert_close(ours, expected)


def test_positions_that_change_with_every_word_read_the_last_words_anew() -> None:
    model = small(ATTENTIONS["delta"], positions="sinusoidal")
    for end, ours in enumerate(read_in_pieces(model), start=3):
        hidden, _ = model(torch.tensor([WORDS[max(0, end - 4) : end]]))
        torch.testing.assert_close(ours, model.words.log_probs(hidden[:, -1])[0])


def test_transformer_xl_decodes_with_its_memory() -> None:
    model = small(ATTENTIONS["softmax"], positions="relative", memory=5)
    state = None
    for start, ours in enumerate(read_in_pieces(model), start=2):
        words = WORDS[:3] if start == 2 else [WORDS[start]]
        hidden, state = model(torch.tensor([words]), state)
        torch.testing.assert_close(ours, model.words.log_probs(hidden[:, -1])[0])
    assert state is not None
    assert state[0].shape == (1, 5, 8)


def test_a_text_goes_on_with_the_words_that_were_drawn() -> None:
    model = small(ATTENTIONS["delta"])
    written = list(generate(Decoder(model, length=4), WORDS[:3], 9, Sampling(), seed=1))
    assert written == list(generate(Decoder(model, length=4), WORDS[:3], 9, Sampling(), seed=1))
    generator = torch.Generator().manual_seed(1)
    words = WORDS[:3]
    for word in written:
        hidden, _ = model(torch.tensor([words]))
        assert word == Sampling().draw(model.words.log_probs(hidden[:, -1])[0], generator)
        words = [*words, word]


def test_the_state_of_fast_weights_stays_as_it_is_and_that_of_softmax_grows() -> None:
    sizes = {}
    for name in ("delta", "sum", "softmax"):
        decoder = Decoder(small(ATTENTIONS[name]), length=4)
        sizes[name] = []
        for _ in range(3):
            for word in range(10):
                decoder.read([word])
            sizes[name].append(decoder.state_size)
    # two layers, two heads: W is 4 x 4, z 4; keys and values are 2 x 8 numbers a word and layer
    assert sizes == {"delta": [64] * 3, "sum": [80] * 3, "softmax": [320, 640, 960]}


def test_words_are_drawn_with_their_probabilities() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(3)

    def shares(sampling: Sampling) -> torch.Tensor:
        drawn = [sampling.draw(log_probs, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    # four standard deviations of a share over 4000 draws
    error = {"rtol": 0, "atol": 4 * math.sqrt(0.25 / 4000)}
    torch.testing.assert_close(shares(Sampling()), log_probs.exp(), **error)
    torch.testing.assert_close(shares(Sampling(top_k=2)), torch.tensor([0.625, 0.375, 0, 0]), **error)
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares(Sampling(temperature=0.5)), sharp / sharp.sum(), **error)
    assert shares(Sampling(temperature=0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}])
def test_senseless_sampling_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="must be a"):
        Sampling(**wrong)


# --- from a checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a smoke run of Table 2 leaves behind, untrained."""
    monkeypatch.setenv("FWP_ROOT", str(ROOT))
    run = resolve_runs(load_experiment("table2", find_project()), rows=["Delta Network"])[0]
    words = WikiTextData(n_tokens=1000).vocabulary.words
    settings = run.config["model"]["init_args"]
    torch.manual_seed(0)
    model = build_language_model(Architecture(**settings["architecture"]), ATTENTIONS["delta"], len(words))
    path = tmp_path / "final.ckpt"
    torch.save({"config": run.config, "words": words, "weights": model.state_dict()}, path)
    return path


def test_the_command_writes_the_prompt_and_words_after_it(checkpoint: Path, capsys: Any) -> None:
    prompt = " ".join(WikiTextData(n_tokens=1000).vocabulary.words[1:4])
    command = ["generate", "--checkpoint", str(checkpoint), "--prompt", prompt, "--words", "7"]
    assert main(command) == 0
    first, cost = capsys.readouterr()
    assert first.startswith(f"{prompt} ")
    assert len(first.removeprefix(prompt).replace("\n", " . ").split()) >= 7
    assert "7 words, " in cost
    assert "the last 64 words anew" in cost
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--seed", "2"]) == 0
    assert capsys.readouterr().out != first


def test_an_unknown_word_of_the_prompt_is_named(checkpoint: Path, capsys: Any) -> None:
    known = WikiTextData(n_tokens=1000).vocabulary.words[1]
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", f"{known} Zanzibar"]) == 2
    assert "has no 'Zanzibar'" in capsys.readouterr().err


def test_what_is_no_checkpoint_of_a_language_model_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_trained(tmp_path / "nothing.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(UserError, match=r"broken\.ckpt: it cannot be read"):
        load_trained(tmp_path / "broken.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no language model with its words"):
        load_trained(tmp_path / "other.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["model"]["init_args"]["architecture"]["d_ff"] = 96
    torch.save(content, tmp_path / "wider.ckpt")
    with pytest.raises(UserError, match="weights are of another configuration"):
        load_trained(tmp_path / "wider.ckpt")
