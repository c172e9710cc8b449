"""Delta RNN: its equations step by step, and the delta rule where nothing is recurrent."""

from __future__ import annotations

import pytest
import torch
from rule_cases import EXACT, config_of, make_inputs, memory_of, run

from fwp_lightning.attention import AttentionConfig, FastWeightMemory
from fwp_lightning.models.retrieval import RetrievalModel


@pytest.mark.parametrize("backend", ["reference", "scan"])
def test_equals_the_equations_with_explicit_memories(backend: str) -> None:
    rule = memory_of(config_of("delta_rnn"), 4, 3, 2).rule
    x = make_inputs(rule, 2, 7, 2, 4, 3)
    o, (last_W, last_R, last_h) = run(rule, x, backend=backend)
    assert o is not None
    for i in range(2):
        for j in range(2):
            W, R, h = torch.zeros(4, 3).double(), torch.zeros(3, 3).double(), torch.zeros(3).double()
            for t in range(7):
                at = {name: tensor[i, t, j] for name, tensor in x.items()}
                W = W + torch.outer(at["k"], at["beta"] * (at["v"] - W.T @ at["k"]))
                key = at["k_recurrent"]
                torch.testing.assert_close(key.sum(), torch.ones(()).double())
                R = R + torch.outer(key, at["beta_recurrent"] * (at["v_recurrent"] - R.T @ key))
                h = W.T @ at["q"] + R.T @ torch.softmax(h, 0)
                torch.testing.assert_close(o[i, t, j], h, **EXACT)
            for ours, theirs in ((last_W, W), (last_R, R), (last_h, h)):
                torch.testing.assert_close(ours[i, j], theirs, **EXACT)


def test_a_recurrent_memory_that_is_never_written_leaves_the_delta_rule() -> None:
    rule, delta = (memory_of(config_of(name), 4, 3, 2).rule for name in ("delta_rnn", "delta"))
    x = make_inputs(rule, 2, 9, 2, 4, 3)
    x["beta_recurrent"] = torch.zeros_like(x["beta_recurrent"])
    torch.testing.assert_close(run(rule, x)[0], run(delta, x)[0], **EXACT)


def test_writing_first_and_reading_later_is_refused() -> None:
    memory = FastWeightMemory(AttentionConfig("delta_rnn", "elu", phi_norm="sum"), 4)
    k, gate = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match="rule delta_rnn reads while it writes"):
        memory.write(k, k, (k, k, gate, gate))
    with pytest.raises(ValueError, match="one query, behind its pairs"):
        RetrievalModel(AttentionConfig("delta_rnn", "elu", phi_norm="sum"), n_keys=4)
