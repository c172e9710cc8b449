"""The Transformer over words: parameter counts of the paper's models, blocks written out, carried states."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm, linear, relu

from fwp_lightning.attention import AttentionConfig, FavorConfig
from fwp_lightning.models.language_model import build_language_model
from fwp_lightning.models.positions import backward_positions, sinusoids
from fwp_lightning.models.transformer import Architecture, Transformer

V = 23
SOFTMAX = AttentionConfig(rule="softmax", feature_map="identity")
SUM = AttentionConfig(rule="sum", attention_norm="readout")
DELTA = AttentionConfig(rule="delta", phi_norm="sum")
FROZEN = FavorConfig(redraw="never")
FAVOR = AttentionConfig(rule="delta", feature_map="favor", phi_norm="sum", n_features=4, favor=FROZEN)
DPFP = AttentionConfig(rule="sum", feature_map="dpfp", attention_norm="readout")
DELTA_BOTH = AttentionConfig(rule="delta", phi_norm="sum", attention_norm="both")
FWM = AttentionConfig(rule="fwm", feature_map="tanh")
FAST_WEIGHTS = [SUM, DELTA, FAVOR, DPFP, DELTA_BOTH, FWM]


def name_of(attention: AttentionConfig) -> str:
    return f"{attention.rule} {attention.feature_map} {attention.attention_norm}"


def small(attention: AttentionConfig, **sizes: Any) -> Transformer:
    torch.manual_seed(1)
    given = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 12, "dropout": 0.0, "cutoffs": [5], **sizes}
    model = build_language_model(Architecture(**given), attention, V).double()
    assert isinstance(model, Transformer)
    return model


def words(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("d_model", "attention", "count"),
    [
        (128, SOFTMAX, 44_018_394),
        (128, SUM, 44_018_394),
        (128, DELTA, 44_034_778),
        (256, SOFTMAX, 89_833_434),
        (256, SUM, 89_833_434),
        (256, DELTA, 89_866_202),
    ],
)
def test_papers_models_have_the_released_models_parameters(
    d_model: int, attention: AttentionConfig, count: int
) -> None:
    with torch.device("meta"):
        model = build_language_model(Architecture(d_model=d_model), attention, 267_735)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_positions_count_down_to_zero_and_do_not_interleave() -> None:
    table = sinusoids(backward_positions(3), 4)
    f_0, f_1 = 1.0, 10000 ** (-2 / 4)
    expected = [[math.sin(p * f_0), math.sin(p * f_1), math.cos(p * f_0), math.cos(p * f_1)] for p in (2, 1, 0)]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("positions", ["sinusoidal", "none"])
def test_model_is_post_norm_blocks_over_embedding_and_positions(positions: str) -> None:
    model = small(DELTA, positions=positions)
    ids = words(3, 7)
    x = model.words.weight[ids] * math.sqrt(8)
    if positions == "sinusoidal":
        x = x + sinusoids(torch.arange(6, -1, -1), 8)
    for block in model.blocks:
        for norm, sub in (
            (block.attention_norm, lambda x, block=block: block.attention(x)[0]),
            (block.feed_forward_norm, lambda x, f=block.feed_forward: linear(relu(f[0](x)), f[3].weight, f[3].bias)),
        ):
            x = layer_norm(x + sub(x), (8,), norm.weight, norm.bias, eps=1e-5)
    torch.testing.assert_close(model(ids)[0], x)


@pytest.mark.parametrize("attention", [SOFTMAX, *FAST_WEIGHTS], ids=name_of)
def test_future_does_not_leak(attention: AttentionConfig) -> None:
    model = small(attention).eval()
    ids = words(2, 9)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    torch.testing.assert_close(model(ids)[0][:, :6], model(changed)[0][:, :6], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", FAST_WEIGHTS, ids=name_of)
def test_a_text_split_anywhere_scores_as_the_whole(attention: AttentionConfig) -> None:
    model = small(attention, positions="none").eval()
    ids, targets = words(2, 11), words(2, 11).flip(0)
    whole = model.words.nll(model(ids)[0].flatten(0, 1), targets.flatten()).view(2, 11)
    for at in range(1, 11):
        first, state = model(ids[:, :at])
        second, _ = model(ids[:, at:], state)
        parts = model.words.nll(torch.cat([first, second], dim=1).flatten(0, 1), targets.flatten()).view(2, 11)
        # float64 rounding in another order of the same sums
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10, msg=lambda text, at=at: f"at {at}: {text}")


def test_dropout_sits_behind_embedding_attention_feed_forward_and_the_last_block() -> None:
    model = small(SUM, dropout=0.5)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    # input, output, and three in each of two blocks
    assert rates == [0.5] * (2 + 3 * 2)
    torch.manual_seed(0)
    hidden = model(words(4, 50))[0]
    assert (hidden == 0).double().mean().item() == pytest.approx(0.5, abs=0.06)


def test_initial_parameters_are_drawn_as_released() -> None:
    torch.manual_seed(0)
    model = Transformer(Architecture(n_layers=2, d_model=64, n_heads=4, d_ff=256, cutoffs=[500]), DELTA, 2000)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert parameter.mean().item() == pytest.approx(1, abs=0.02), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
            continue
        # 64 numbers at least: their standard deviation is known to 9 % (one sigma)
        assert parameter.std().item() == pytest.approx(0.02, rel=0.35), name


@pytest.mark.parametrize(
    ("attention", "length", "size"),
    [
        (SOFTMAX, 384, 16 * 384 * 2 * 256),
        (DELTA, 384, 16 * 8 * 32 * 32),
        (SUM, 384, 16 * 8 * (32 * 32 + 32)),
    ],
)
def test_state_size_counts_what_passes_from_word_to_word(attention: AttentionConfig, length: int, size: int) -> None:
    with torch.device("meta"):
        model = build_language_model(Architecture(d_model=256), attention, 1000)
    assert model.state_size(length) == size


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"n_layers": 0}, "architecture.n_layers=0 must be a whole number >= 1"),
        ({"dropout": 1.0}, "architecture.dropout=1.0 must be"),
        ({"positions": "learned"}, "architecture.positions='learned' is unknown. Known: sinusoidal, none, relative"),
        ({"d_model": 9, "n_heads": 3}, "architecture.d_model=9 must be even"),
        ({"memory": 4}, "architecture.memory=4 is Transformer-XL's"),
        ({"n_heads": 3}, "d_model=8 does not divide by n_heads=3"),
    ],
)
def test_senseless_sizes_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(DELTA, **wrong)
