"""The tied adaptive embedding and softmax: probabilities, clusters behind the head, a plain softmax without."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fwp_lightning.models.adaptive import TiedAdaptiveEmbedding

D = 6


def softmax_of(n_words: int, cutoffs: list[int]) -> TiedAdaptiveEmbedding:
    """Weights far from their initial values, so that no term of the loss is negligible."""
    torch.manual_seed(3)
    words = TiedAdaptiveEmbedding(n_words, D, cutoffs).double()
    for parameter in words.parameters():
        torch.nn.init.normal_(parameter)
    return words


def hidden_and_targets(n: int, n_words: int) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return hidden, torch.arange(n) % n_words


@pytest.mark.parametrize("cutoffs", [[], [7], [3, 4], [1, 5, 9]])
def test_probabilities_of_all_words_sum_to_one(cutoffs: list[int]) -> None:
    words = softmax_of(11, cutoffs)
    hidden, _ = hidden_and_targets(4, 11)
    torch.testing.assert_close(words.log_probs(hidden).exp().sum(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("cutoffs", [[], [7], [3, 4], [1, 5, 9]])
def test_loss_is_the_log_probability_of_each_target_in_its_place(cutoffs: list[int]) -> None:
    words = softmax_of(11, cutoffs)
    hidden, targets = hidden_and_targets(25, 11)
    expected = -words.log_probs(hidden)[torch.arange(25), targets]
    torch.testing.assert_close(words.nll(hidden, targets), expected)


def test_a_word_behind_the_head_costs_its_cluster_and_its_place_there() -> None:
    words = softmax_of(11, [3, 6])
    hidden, _ = hidden_and_targets(1, 11)
    E, b = words.weight, words.bias
    head = torch.cat([hidden @ E[:3].T + b[:3], hidden @ words.cluster_weight.T + words.cluster_bias], dim=-1)
    # the released code numbers clusters from the end: the first cluster has the last column of the head
    for target, column, start, end in ((4, -1, 3, 6), (9, -2, 6, 11)):
        tail = hidden @ E[start:end].T + b[start:end]
        expected = head.logsumexp(-1) - head[:, column] + tail.logsumexp(-1) - tail[:, target - start]
        torch.testing.assert_close(words.nll(hidden, torch.tensor([target])), expected)


@pytest.mark.parametrize("cutoffs", [[], [11], [50, 90]])
def test_one_cluster_is_a_plain_softmax(cutoffs: list[int]) -> None:
    words = softmax_of(11, cutoffs)
    hidden, targets = hidden_and_targets(22, 11)
    plain = cross_entropy(hidden @ words.weight.T + words.bias, targets, reduction="none")
    torch.testing.assert_close(words.nll(hidden, targets), plain)


def test_every_parameter_has_the_gradient_of_the_log_probability() -> None:
    words = softmax_of(11, [3, 6])
    hidden, targets = hidden_and_targets(25, 11)
    names = dict(words.named_parameters())
    direct = torch.autograd.grad(words.nll(hidden, targets).sum(), list(names.values()))
    through_all = -words.log_probs(hidden)[torch.arange(25), targets].sum()
    for name, ours, expected in zip(names, direct, torch.autograd.grad(through_all, list(names.values())), strict=True):
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_an_embedded_word_is_its_row_times_the_root_of_the_size() -> None:
    words = softmax_of(11, [3])
    torch.testing.assert_close(words.embed(torch.tensor([[4]])), words.weight[4].view(1, 1, D) * math.sqrt(D))


def test_fresh_weights_know_nothing() -> None:
    torch.manual_seed(0)
    words = TiedAdaptiveEmbedding(50, 32)
    nll = words.nll(torch.randn(400, 32), torch.randint(50, (400,)))
    # logits have a standard deviation of 0.02 sqrt(32) = 0.11: log 50 up to that
    assert nll.mean().item() == pytest.approx(math.log(50), abs=0.05)


@pytest.mark.parametrize("cutoffs", [[0], [5, 5], [6, 3], [2.5]])
def test_senseless_cutoffs_are_refused(cutoffs: list[int]) -> None:
    with pytest.raises(ValueError, match="increasing whole numbers above 0"):
        TiedAdaptiveEmbedding(11, D, cutoffs)
