"""The registry's attentions inside fairseq: what they compute, how they decode, and fairseq's own tools around them."""

import contextlib
import itertools
import re
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwp_lightning.attention import RULES, AttentionConfig, FavorConfig
from fwp_lightning.attention.rules.delta_product import DeltaProductOptions
from fwp_lightning.cli import main
from fwp_lightning.data.grammar import sentence_pairs
from fwp_lightning.translation import compatibility
from fwp_lightning.translation.choice import TranslationAttention, default_choice, flatten, from_arguments

ROOT = Path(__file__).resolve().parent.parent
MISSING = compatibility.why_unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# one attention of every kind that fairseq's places can have
SUMS = {
    "linear": AttentionConfig("sum", "elu", attention_norm="readout"),
    "linear, sum norm": AttentionConfig("sum", "elu", phi_norm="sum", output_scale="rsqrt_d"),
    "performer": AttentionConfig("sum", "favor", attention_norm="readout", n_features=6),
    "dpfp-2": AttentionConfig("sum", "dpfp", attention_norm="readout", nu=2),
}
DELTAS = {
    "delta": AttentionConfig("delta", "elu", phi_norm="sum"),
    "delta, both norms": AttentionConfig("delta", "elu", phi_norm="sum", attention_norm="both"),
    "delta dpfp": AttentionConfig("delta", "dpfp", phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6),
    "fwm": AttentionConfig("fwm", "tanh"),
}
ALL = {**SUMS, **DELTAS, "softmax": AttentionConfig("softmax", "identity")}
EVERYWHERE = "encoder,decoder,cross"
# float64 and the same operations in another order; sums over 12 positions
EXACT = {"rtol": 1e-9, "atol": 1e-10}
# fairseq's own attention takes its softmax in float32 where it decodes step by step
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


class Words:
    """The part of a fairseq task that a model asks for."""

    def __init__(self, n_words: int) -> None:
        from fairseq.data import Dictionary

        compatibility.install()
        self.source_dictionary = Dictionary()
        for word in range(n_words - len(self.source_dictionary)):
            self.source_dictionary.add_symbol(f"w{word}")
        self.target_dictionary = self.source_dictionary


def build(choice: TranslationAttention, architecture: str = "tiny", n_words: int = 30, **options: Any) -> Any:
    """A model as fairseq builds it, in float64, ready for evaluation."""
    compatibility.install()
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    import fwp_lightning.translation.architectures  # noqa: F401

    name = f"fwp_{choice.attention.rule}_{architecture}"
    arguments = Namespace(**flatten(choice), dropout=0.0, share_all_embeddings=True, **options)
    ARCH_CONFIG_REGISTRY[name](arguments)
    torch.manual_seed(1)
    model = ARCH_MODEL_REGISTRY[name].build_model(arguments, Words(n_words))
    return model.double().eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three sentences of 12, 7 and 9 words: sources padded on the left as fairseq does, targets on the right."""
    compatibility.install()
    from fairseq.data import data_utils

    torch.manual_seed(2)
    lengths = (12, 7, 9)
    sources = [torch.randint(4, 30, (n,)) for n in lengths]
    targets = [torch.randint(4, 30, (n,)) for n in (8, 11, 5)]
    return {
        "src_tokens": data_utils.collate_tokens(sources, 1, 2, left_pad=True),
        "src_lengths": torch.tensor(lengths),
        "prev_output_tokens": data_utils.collate_tokens(targets, 1, 2, left_pad=False),
    }


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.get_normalized_probs(model(**batch), log_probs=True)


@contextlib.contextmanager
def counted_calls() -> Iterator[list[str]]:
    """The places of the registry attentions that are called meanwhile."""
    from fwp_lightning.translation.attention import RegistryAttention

    calls: list[str] = []
    original = RegistryAttention.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(self.place)
        return original(self, *arguments, **named)

    RegistryAttention.forward = forward  # type: ignore[method-assign]
    yield calls
    RegistryAttention.forward = original  # type: ignore[method-assign]


# what is computed


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("place", ["encoder", "cross"])
def test_padding_changes_nothing(name: str, place: str, batch: dict[str, Tensor]) -> None:
    model = build(TranslationAttention(SUMS[name], replaced=place))
    together = log_probabilities(model, batch)
    for i, (n_source, n_target) in enumerate([(12, 8), (7, 11), (9, 5)]):
        alone = log_probabilities(
            model,
            {
                "src_tokens": batch["src_tokens"][i : i + 1, -n_source:],
                "src_lengths": batch["src_lengths"][i : i + 1],
                "prev_output_tokens": batch["prev_output_tokens"][i : i + 1, :n_target],
            },
        )
        torch.testing.assert_close(together[i, :n_target], alone[0], **EXACT)


def test_encoder_attention_is_equations_18_and_19_read_from_the_whole_source(batch: dict[str, Tensor]) -> None:
    from fwp_lightning.translation.attention import RegistryAttention

    torch.manual_seed(3)
    layer = RegistryAttention(SUMS["linear"], "encoder", 8, 2).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, :2] = True
    found, _ = layer(x, x, x, key_padding_mask=padding)
    for b in range(3):
        words = [t for t in range(5) if not padding[b, t]]
        heads = []
        for h in range(2):
            rows = slice(4 * h, 4 * h + 4)
            q, k, v = (getattr(layer, f"{name}_proj")(x[:, b])[:, rows] for name in "qkv")
            phi_q, phi_k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
            W = sum(torch.outer(v[t], phi_k[t]) for t in words)
            z = sum(phi_k[t] for t in words)
            heads.append(torch.stack([W @ phi_q[t] / (z @ phi_q[t] + 1e-6) for t in range(5)]))
        torch.testing.assert_close(found[:, b], layer.out_proj(torch.cat(heads, -1)), **EXACT)


@pytest.mark.parametrize("name", DELTAS)
def test_delta_decoder_reads_what_the_memory_itself_gives(name: str) -> None:
    from fwp_lightning.attention import FastWeightMemory
    from fwp_lightning.translation.attention import RegistryAttention

    torch.manual_seed(4)
    layer = RegistryAttention(DELTAS[name], "decoder", 8, 2).double()
    x = torch.randn(6, 3, 8, dtype=torch.float64)
    found, _ = layer(x, x, x, attn_mask=torch.zeros(6, 6))
    q, k, v = (getattr(layer, f"{p}_proj")(x).transpose(0, 1).reshape(3, 6, 2, 4) for p in "qkv")
    beta = torch.sigmoid(x @ layer.beta_proj.weight.T).transpose(0, 1)
    memory = FastWeightMemory(DELTAS[name], 4)
    o, _ = memory(q, k, v, beta)
    torch.testing.assert_close(found, layer.out_proj(o.reshape(3, 6, 8)).transpose(0, 1), **EXACT)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("replaced", ["decoder", EVERYWHERE])
def test_decoding_word_by_word_equals_teacher_forcing(name: str, replaced: str, batch: dict[str, Tensor]) -> None:
    noncausal = default_choice(ALL[name].rule).noncausal
    model = build(TranslationAttention(ALL[name], replaced=replaced, noncausal=noncausal))
    whole = log_probabilities(model, batch)
    encoded = model.encoder(batch["src_tokens"], src_lengths=batch["src_lengths"])
    state: dict[str, Any] = {}
    for t in range(whole.shape[1]):
        out = model.decoder(batch["prev_output_tokens"][:, : t + 1], encoder_out=encoded, incremental_state=state)
        step = model.get_normalized_probs(out, log_probs=True)[:, 0]
        real = batch["prev_output_tokens"][:, t] != 1
        torch.testing.assert_close(step[real], whole[real, t], **(FLOAT32 if name == "softmax" else EXACT))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_decodes_word_by_word_what_it_was_taught(rule: str, batch: dict[str, Tensor]) -> None:
    model = build(default_choice(rule))
    # the sentence without padding
    taught = batch["prev_output_tokens"][1:2, :11]
    source = {"src_tokens": batch["src_tokens"][1:2, -7:], "src_lengths": batch["src_lengths"][1:2]}
    whole = log_probabilities(model, {**source, "prev_output_tokens": taught})
    encoded = model.encoder(source["src_tokens"], src_lengths=source["src_lengths"])
    state: dict[str, Any] = {}
    for t in range(whole.shape[1]):
        out = model.decoder(taught[:, : t + 1], encoder_out=encoded, incremental_state=state)
        step = model.get_normalized_probs(out, log_probs=True)[:, 0]
        torch.testing.assert_close(step, whole[:, t], **(FLOAT32 if rule == "softmax" else EXACT))


def test_a_rules_own_numbers_survive_fairseqs_flat_arguments() -> None:
    options = DeltaProductOptions(n_steps=3)
    choice = TranslationAttention(AttentionConfig("delta_product", "elu", phi_norm="sum", rule_options=options))
    assert from_arguments(Namespace(**flatten(choice))) == choice
    broken = Namespace(**{**flatten(choice), "fwp_rule_options": '{"steps": 3}'})
    with pytest.raises(ValueError, match=r"--fwp-rule-options .*steps"):
        from_arguments(broken)


@pytest.mark.parametrize("name", ["linear", "performer", "delta dpfp"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_of_targets_changes_nothing_on_either_side(name: str, left: bool, batch: dict[str, Tensor]) -> None:
    from fairseq.data import data_utils

    model = build(TranslationAttention(ALL[name], replaced="decoder"))
    together = log_probabilities(model, batch)
    sentences = [words[words != 1] for words in batch["prev_output_tokens"]]
    padded = data_utils.collate_tokens(sentences, 1, left_pad=left)
    found = log_probabilities(model, {**batch, "prev_output_tokens": padded})
    for words, expected, out in zip(padded, together, found, strict=True):
        torch.testing.assert_close(out[words != 1], expected[: int((words != 1).sum())], **EXACT)


@pytest.mark.parametrize("name", ["linear", "delta", "delta, both norms"])
def test_state_does_not_grow_and_follows_the_beam(name: str, batch: dict[str, Tensor]) -> None:
    model = build(TranslationAttention(ALL[name], replaced=EVERYWHERE))
    encoded = model.encoder(batch["src_tokens"], src_lengths=batch["src_lengths"])
    words, order = batch["prev_output_tokens"][:, :4], torch.tensor([2, 0, 0, 1])
    state: dict[str, Any] = {}
    for t in range(3):
        model.decoder(words[:, : t + 1], encoder_out=encoded, incremental_state=state)
    before = {key: {k: x.shape[1:] for k, x in kept.items() if x is not None} for key, kept in state.items()}
    model.decoder.reorder_incremental_state_scripting(state, order)
    encoded = model.encoder.reorder_encoder_out(encoded, order)
    moved, _ = model.decoder(words[order], encoder_out=encoded, incremental_state=state)
    expected = model(batch["src_tokens"][order], batch["src_lengths"][order], words[order])[0]
    torch.testing.assert_close(moved[:, 0], expected[:, 3], **EXACT)
    after = {key: {k: x.shape[1:] for k, x in kept.items() if x is not None} for key, kept in state.items()}
    assert before == after


@pytest.mark.parametrize("padded", [True, False])
def test_the_attention_is_called_in_evaluation_too(padded: bool, batch: dict[str, Tensor]) -> None:
    # un-patched, fairseq 0.12.2 evaluates the encoder with torch's softmax layer once a checkpoint was loaded
    model = build(TranslationAttention(SUMS["linear"], replaced=EVERYWHERE))
    model.load_state_dict(model.state_dict())
    model.eval()
    if not padded:
        batch = {**batch, "src_tokens": batch["src_tokens"].clamp(min=4)}
    with counted_calls() as calls, torch.no_grad():
        model(**batch)
    assert calls == ["encoder"] * 2 + ["decoder", "cross"] * 2


@pytest.mark.parametrize(
    ("rule", "expected"),
    # fairseq's published 61 M; the fast path's copies would make it 79,817,728. Delta adds 6 layers of 512 x 8
    [("softmax", 60_915_712), ("sum", 60_915_712), ("delta", 60_915_712 + 6 * 512 * 8)],
)
def test_base_model_has_the_known_number_of_parameters(rule: str, expected: int) -> None:
    model = build(default_choice(rule), "wmt_en_de", n_words=32768)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_stock_architecture_and_softmax_choice_are_one_model(batch: dict[str, Tensor]) -> None:
    from fairseq.models.transformer import TransformerModel, tiny_architecture

    ours = build(default_choice("softmax"))
    arguments = Namespace(dropout=0.0, share_all_embeddings=True)
    tiny_architecture(arguments)
    stock = TransformerModel.build_model(arguments, Words(30)).double().eval()
    stock.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "dictionaries"})
    torch.testing.assert_close(log_probabilities(ours, batch), log_probabilities(stock, batch), rtol=0, atol=0)


# choices


def test_choice_survives_fairseqs_flat_arguments() -> None:
    favor = FavorConfig(features="independent", kernel_eps=1e-4)
    config = AttentionConfig("sum", "favor", attention_norm="readout", n_features=7, favor=favor)
    choice = TranslationAttention(config, replaced="decoder", noncausal="softmax")
    assert from_arguments(Namespace(**flatten(choice))) == choice


def test_rule_that_writes_in_an_order_has_another_in_noncausal_places() -> None:
    choice = TranslationAttention(DELTAS["delta dpfp"], replaced=EVERYWHERE)
    decoder, encoder, cross = (choice.of_place(place) for place in ("decoder", "encoder", "cross"))
    assert decoder == DELTAS["delta dpfp"]
    assert encoder == cross
    assert encoder is not None
    assert (encoder.rule, encoder.feature_map, encoder.attention_norm) == ("sum", "dpfp", "readout")
    softmax = TranslationAttention(DELTAS["delta"], noncausal="softmax")
    assert softmax.of_place("encoder") is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replaced": "encoder,decodr"}, "Did you mean 'decoder'"),
        ({"replaced": "encoder,encoder"}, "each once"),
        ({"replaced": ""}, "must name places"),
        ({"noncausal": "delta"}, "unknown noncausal"),
    ],
)
def test_senseless_choice_is_refused_with_a_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TranslationAttention(DELTAS["delta"], **options)


def test_noncausal_delta_is_refused_with_the_reason_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="writes in an order, so it has no non-causal form for the place 'encoder'"):
        build(TranslationAttention(DELTAS["delta"], noncausal="refuse"))


@pytest.mark.parametrize("option", ["checkpoint_activations", "cross_self_attention"])
def test_what_the_layers_cannot_do_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.replace("_", "-")):
        build(default_choice("sum"), **{option: True})


@pytest.mark.parametrize(
    ("package", "found", "said"),
    [
        ("fairseq", "0.12.3", "fairseq 0.12.3 is installed"),
        ("hydra-core", "1.0.7", "hydra-core 1.0.7 breaks pytest"),
        ("sacrebleu", None, "sacrebleu, which it needs, is not"),
    ],
)
def test_unfit_versions_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, found: str | None, said: str
) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == package and found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(found) if name == package else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert said in str(compatibility.why_unavailable())


# fairseq's tools


N_TEST = 43
"""No multiple of 8: later fairseq code drops what is left over."""
TRAINING = [
    "--max-tokens=400", "--optimizer=adam", "--lr=3e-3", "--criterion=label_smoothed_cross_entropy", "--cpu",
    "--label-smoothing=0.1", "--share-all-embeddings", "--no-progress-bar", "--log-format=simple", "--dropout=0",
]  # fmt: skip


def write_corpus(folder: Path, sizes: dict[str, int]) -> Path:
    for split, size in sizes.items():
        for language, sentences in zip(("en", "de"), sentence_pairs(split, size), strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


def preprocess(raw: Path, out: Path) -> Path:
    options = [f"--{split}pref={raw / name}" for split, name in (("train", "train"), ("valid", "valid"))]
    arguments = ["-s", "en", "-t", "de", *options, f"--testpref={raw / 'test'}", f"--destdir={out}"]
    assert main(["fairseq-preprocess", *arguments, "--joined-dictionary", "--workers=1"]) == 0
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-bin folder of generated sentences."""
    raw = write_corpus(tmp_path_factory.mktemp("raw"), {"train": 300, "valid": 20, "test": N_TEST})
    return preprocess(raw, tmp_path_factory.mktemp("bin"))


def train(corpus: Path, folder: Path, *options: str, architecture: str = "fwp_delta_tiny") -> int:
    return main(["fairseq-train", str(corpus), f"--arch={architecture}", f"--save-dir={folder}", *TRAINING, *options])


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of training, the last one after a resume."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert train(corpus, folder, "--max-epoch=2") == 0
    assert train(corpus, folder, "--max-epoch=3") == 0
    return folder


def test_training_resumes_to_what_an_undisturbed_one_gives(corpus: Path, trained: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path, "--max-epoch=3") == 0
    resumed, whole = (
        torch.load(folder / "checkpoint3.pt", weights_only=True)["model"] for folder in (trained, tmp_path)
    )
    assert resumed.keys() == whole.keys()
    # fairseq's position tables hold a buffer of one element that is never written
    different = [n for n in whole if not torch.equal(resumed[n], whole[n]) and not n.endswith("_float_tensor")]
    assert different == []


def test_every_sentence_is_translated(corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(trained / "checkpoint_last.pt")
    arguments = ["--path", path, "--beam=3", "--cpu", "--batch-size=16", "--scoring=sacrebleu", "--max-len-b=20"]
    with counted_calls() as calls:
        assert main(["fairseq-generate", str(corpus), *arguments]) == 0
    shown = capsys.readouterr().out
    assert len(set(re.findall(r"^H-(\d+)", shown, flags=re.MULTILINE))) == N_TEST
    assert re.search(r"BLEU = [\d.]+", shown)
    assert set(calls) == {"encoder", "decoder"}


def test_lines_are_translated_as_they_come(
    corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    lines.write_text("\n".join(sentence_pairs("test", 3)[0]) + "\n", encoding="utf-8")
    path = str(trained / "checkpoint_last.pt")
    assert main(["fairseq-interactive", str(corpus), "--path", path, "--cpu", f"--input={lines}"]) == 0
    assert len(re.findall(r"^H-\d", capsys.readouterr().out, flags=re.MULTILINE)) == 3


def test_validation_and_averaging(corpus: Path, trained: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean.pt"
    assert main(["fairseq-average", "--inputs", str(trained), "--num-epoch-checkpoints=2", f"--output={mean}"]) == 0
    states = [torch.load(trained / f"checkpoint{i}.pt", weights_only=True)["model"] for i in (2, 3)]
    found = torch.load(mean, weights_only=True)["model"]
    name = "decoder.layers.1.self_attn.beta_proj.weight"
    torch.testing.assert_close(found[name], (states[0][name] + states[1][name]) / 2)
    assert torch.equal(found["dictionaries"], states[0]["dictionaries"])
    arguments = ["--task=translation", "--path", str(mean), "--cpu", "--valid-subset=valid", "--max-tokens=400"]
    assert main(["fairseq-validate", str(corpus), *arguments]) == 0


def test_user_mistakes_are_one_sentence(
    corpus: Path, trained: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = preprocess(
        write_corpus(tmp_path_factory.mktemp("raw2"), {"train": 299, "valid": 5, "test": 5}),
        tmp_path_factory.mktemp("bin2"),
    )
    # the same words in another order: sizes fit, and every word would mean another
    dictionary = (other / "dict.en.txt").read_text().splitlines()
    for language in ("en", "de"):
        (other / f"dict.{language}.txt").write_text("\n".join(reversed(dictionary)) + "\n")
    path = f"--path={trained / 'checkpoint_last.pt'}"
    mistakes: dict[str, list[str]] = {
        "--arch is missing": ["fairseq-train", str(corpus)],
        "No such file or directory": ["fairseq-train", "nowhere", "--arch=fwp_sum_tiny", *TRAINING],
        "Model file not found": ["fairseq-generate", str(corpus), "--path=nothing.pt", "--cpu"],
        "was trained with other dictionaries": ["fairseq-generate", str(other), path, "--cpu"],
        "Unexpected key": ["fairseq-train", str(corpus), "--arch=fwp_sum_tiny", f"--save-dir={trained}", *TRAINING],
        "Did you mean 'elu'": ["fairseq-train", str(corpus), "--arch=fwp_sum_tiny", "--fwp-feature-map=elo", *TRAINING],
        "contradicts": ["fairseq-train", str(corpus), "--arch=fwp_sum_tiny", "--fwp-rule=delta", *TRAINING],
        "has 3 such checkpoints, not 9": [
            "fairseq-average", f"--inputs={trained}", "--num-epoch-checkpoints=9", f"--output={tmp_path / 'x'}"
        ],
    }  # fmt: skip
    for said, arguments in mistakes.items():
        capsys.readouterr()
        assert main(arguments) == 2, said
        complaint = capsys.readouterr().err.strip().splitlines()[-1]
        assert complaint.startswith("fwp: error: ")
        assert said in complaint


def test_data_that_do_not_fit_are_one_sentence(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_corpus(tmp_path, {"train": 30, "valid": 5, "test": 5})
    german = (raw / "valid.de").read_text().splitlines()
    (raw / "valid.de").write_text("\n".join(german[:-1]) + "\n")
    misaligned = preprocess(raw, tmp_path / "bin")
    lines = tmp_path / "lines"
    lines.write_text("the " * 2000 + "\n")
    (tmp_path / "garbage.pt").write_text("no checkpoint")
    path, training = f"--path={trained / 'checkpoint_last.pt'}", ["--arch=fwp_sum_tiny", "--no-save", *TRAINING]
    mistakes: dict[str, list[str]] = {
        "must contain the same number": ["fairseq-train", str(misaligned), *training],
        "Size of sample #0 is invalid": ["fairseq-interactive", str(corpus), path, "--cpu", f"--input={lines}"],
        "Could not infer language pair": ["fairseq-generate", str(tmp_path), path, "--cpu"],
        "is damaged": ["fairseq-generate", str(corpus), f"--path={tmp_path / 'garbage.pt'}", "--cpu"],
    }  # fmt: skip
    for said, arguments in mistakes.items():
        capsys.readouterr()
        assert main(arguments) == 2, said
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_two_processes_train_and_resume(corpus: Path, tmp_path: Path) -> None:
    for epochs in (1, 2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fwp_lightning",
            "fairseq-train", str(corpus), "--arch=fwp_delta_tiny", f"--save-dir={tmp_path}", *TRAINING,
            f"--max-epoch={epochs}", "--distributed-backend=gloo", "--ddp-backend=legacy_ddp",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    updates = {
        name: torch.load(tmp_path / f"{name}.pt", weights_only=True)["optimizer_history"][-1]["num_updates"]
        for name in ("checkpoint1", "checkpoint2")
    }
    assert updates["checkpoint2"] == 2 * updates["checkpoint1"] > 0


def test_advice_that_nobody_can_follow_stays_unseen_in_later_runs_too() -> None:
    compatibility.install()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compatibility.install()
        warnings.warn("Support for mismatched key_padding_mask and attn_mask is deprecated.", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else"]


def test_all_rules_have_all_sizes() -> None:
    compatibility.install()
    from fwp_lightning.translation.architectures import register_architectures

    expected = {f"fwp_{rule}_{size}" for rule, size in itertools.product(RULES, ("wmt_en_de", "vaswani_wmt_en_de_big"))}
    assert expected <= set(register_architectures())
