"""Transformer-XL: scores by distance written out, a memory that is cut from the graph, contexts of evaluation."""

import math
from typing import Any

import pytest
import torch

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.models.language_model import build_language_model
from fwp_lightning.models.positions import sinusoids
from fwp_lightning.models.transformer import Architecture
from fwp_lightning.models.transformer_xl import TransformerXL, shift

V = 23
SOFTMAX = AttentionConfig(rule="softmax", feature_map="identity")


def small(memory: int = 4, **sizes: Any) -> TransformerXL:
    torch.manual_seed(1)
    given = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 12, "dropout": 0.0, "cutoffs": [5], **sizes}
    model = build_language_model(Architecture(positions="relative", memory=memory, **given), SOFTMAX, V).double()
    assert isinstance(model, TransformerXL)
    # larger than initial, so that distances matter
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def words(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("d_model", "count"), [(128, 44_280_794), (256, 90_882_522)])
def test_papers_model_has_the_released_models_parameters(d_model: int, count: int) -> None:
    with torch.device("meta"):
        model = build_language_model(Architecture(d_model=d_model, positions="relative", memory=384), SOFTMAX, 267_735)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_shift_turns_distances_into_keys() -> None:
    # the score of query t at distance p is 10 t + p; columns are the distances 4, 3, 2, 1, 0
    by_distance = torch.tensor([[10 * t + p for p in (4, 3, 2, 1, 0)] for t in range(2)])
    # with a memory of 3 the query t stands at 3 + t, and key j is 3 + t - j steps back
    by_key = shift(by_distance)
    assert by_key[0, :4].tolist() == [3, 2, 1, 0]
    assert by_key[1].tolist() == [14, 13, 12, 11, 10]


def attention_written_out(model: TransformerXL, x_BTD: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """One key at a time, with its distance."""
    attention, u, v = model.blocks[0].attention, model.u, model.v
    seen = torch.cat([memory, x_BTD], dim=1)
    out = torch.zeros_like(x_BTD)
    for b in range(x_BTD.shape[0]):
        for t in range(x_BTD.shape[1]):
            here = memory.shape[1] + t
            q = attention.W_q(x_BTD[b, t]).view(2, 4)
            scores, values = [], []
            for j in range(here + 1):
                k, value = attention.W_k(seen[b, j]).view(2, 4), attention.W_v(seen[b, j]).view(2, 4)
                r = attention.W_r(sinusoids(torch.tensor([here - j]), 8)[0]).view(2, 4)
                scores.append((((q + u) * k).sum(-1) + ((q + v) * r).sum(-1)) / math.sqrt(4))
                values.append(value)
            weights = torch.softmax(torch.stack(scores), dim=0)
            out[b, t] = attention.W_o((weights.unsqueeze(-1) * torch.stack(values)).sum(0).flatten())
    return out


@pytest.mark.parametrize("past", [0, 3])
def test_attention_scores_keys_and_distances(past: int) -> None:
    model = small()
    seen = []
    model.blocks[0].attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    state = None
    if past:
        _, state = model(words(2, past))
        seen.clear()
    model(words(2, 5).flip(1), state)
    (x, memory, _), (output, _) = seen[0]
    empty = x.new_zeros(2, 0, 8)
    torch.testing.assert_close(output, attention_written_out(model, x, empty if memory is None else memory))


def test_segments_with_enough_memory_score_as_the_whole() -> None:
    # one layer: deeper ones see what their memory saw, which a segment's border has cut
    model = small(memory=20, n_layers=1)
    ids = words(2, 11)
    first, state = model(ids[:, :4])
    second, _ = model(ids[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), model(ids)[0])


def test_memory_keeps_the_last_inputs_and_no_gradient() -> None:
    model = small(memory=4)
    _, state = model(words(2, 3))
    assert [memory.shape for memory in state] == [(2, 3, 8)] * 2
    hidden, state = model(words(2, 3), state)
    assert [memory.shape for memory in state] == [(2, 4, 8)] * 2
    assert not any(memory.requires_grad for memory in state)
    model.zero_grad()
    hidden.sum().backward()
    assert model.blocks[0].attention.W_k.weight.grad is not None


def test_a_span_makes_long_segments_of_single_words() -> None:
    model = small(memory=3).eval()
    ids = words(2, 12)
    state, outputs = None, []
    for t in range(12):
        hidden, state = model(ids[:, t : t + 1], state)
        outputs.append(hidden)
    model.span = 3
    state, spanned = None, []
    for segment in ids.split(5, dim=1):
        hidden, state = model(segment, state)
        spanned.append(hidden)
    torch.testing.assert_close(torch.cat(spanned, dim=1), torch.cat(outputs, dim=1))


def test_clamped_distances_are_alike() -> None:
    model = small(memory=8).eval()
    exact = model(words(2, 6))[0]
    model.largest_distance = 5
    torch.testing.assert_close(model(words(2, 6))[0], exact)
    model.largest_distance = 2
    assert not torch.allclose(model(words(2, 6))[0], exact)


@pytest.mark.parametrize(
    ("memory", "target", "millions"), [(15, 1, 0.13), (64, 64, 1.05), (128, 128, 2.10), (384, 384, 6.29)]
)
def test_state_sizes_are_those_of_table_4(memory: int, target: int, millions: float) -> None:
    with torch.device("meta"):
        model = build_language_model(Architecture(d_model=256, positions="relative", memory=memory), SOFTMAX, 1000)
    assert round(model.state_size(target) / 1e6, 2) == millions


def test_a_rule_other_than_softmax_is_refused() -> None:
    with pytest.raises(ValueError, match="Transformer-XL, which has softmax attention, not rule delta"):
        build_language_model(Architecture(positions="relative"), AttentionConfig(rule="delta", phi_norm="sum"), V)
