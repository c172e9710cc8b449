"""Kernels that are built on first use: the reasons when they cannot be, and the compiled read-out against PyTorch."""

from __future__ import annotations

import ctypes
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig
from fwp_lightning.models.retrieval import RetrievalModel

CONFIGS = {
    "elu sum": AttentionConfig("sum", "elu", attention_norm="readout"),
    "dpfp-3 sum": AttentionConfig("sum", "dpfp", nu=3, attention_norm="readout"),
    "elu delta": AttentionConfig("delta", "elu", phi_norm="sum"),
    "dpfp-2 delta": AttentionConfig("delta", "dpfp", nu=2, phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6),
    "tanh fwm": AttentionConfig("fwm", "tanh"),
    "dpfp-1 fwm": AttentionConfig("fwm", "dpfp", nu=1),
}


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One tiny kernel `answer` in a source folder of its own, and an empty cache."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(compiled, "SOURCES", sources)
    monkeypatch.setenv("FWP_CACHE", str(tmp_path / "cache"))
    for function in (compiled.library, compiled.why_unavailable):
        function.cache_clear()
    yield sources
    for function in (compiled.library, compiled.why_unavailable):
        function.cache_clear()


def test_a_kernel_is_built_once_and_again_only_when_its_source_changes(small_source: Path, tmp_path: Path) -> None:
    assert compiled.library("answer").answer() == 42
    (built,) = (tmp_path / "cache").glob("answer-*.so")
    first = built.stat().st_mtime_ns
    compiled.library.cache_clear()
    compiled.library("answer")
    assert built.stat().st_mtime_ns == first
    (small_source / "answer.cpp").write_text('extern "C" int answer() { return 43; }\n')
    compiled.library.cache_clear()
    assert compiled.library("answer").answer() == 43
    assert len(list((tmp_path / "cache").glob("answer-*.so"))) == 2


def _build(sources: str, cache: str, answers: multiprocessing.SimpleQueue[int]) -> None:
    import os

    os.environ["FWP_CACHE"] = cache
    compiled.SOURCES = Path(sources)
    answers.put(compiled.library("answer").answer())


def test_two_processes_that_build_at_once_both_get_the_kernel(small_source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_build, args=(str(small_source), str(tmp_path / "cache"), answers)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [answers.get(), answers.get()] == [42, 42]
    assert len(list((tmp_path / "cache").glob("answer-*.so"))) == 1


def test_without_a_compiler_the_reason_says_so(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert compiled.why_unavailable("answer") == "no C++ compiler was found (g++, or the one that CXX names)"
    assert compiled.outlook("answer") == (False, "no C++ compiler was found (g++, or the one that CXX names)")


def test_a_compiler_that_fails_is_quoted(small_source: Path) -> None:
    (small_source / "answer.cpp").write_text("this is not C++\n")
    reason = compiled.why_unavailable("answer")
    assert reason is not None
    assert "failed on answer.cpp" in reason
    assert "error" in reason
    assert "\n" not in reason


def test_a_cache_that_cannot_be_written_names_the_way_out(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FWP_CACHE", str(tmp_path / "file"))
    reason = compiled.why_unavailable("answer")
    assert reason is not None
    assert "set FWP_CACHE to a folder of yours" in reason


def models(
    config: AttentionConfig, n_keys: int, d_key: int, dtype: torch.dtype
) -> tuple[RetrievalModel, RetrievalModel]:
    made = []
    for compute in ("factored", "compiled"):
        torch.manual_seed(11)
        readout_norm = "layer_norm" if config.rule == "fwm" else "none"
        made.append(RetrievalModel(config, n_keys, d_key, readout_norm=readout_norm, compute=compute).to(dtype))  # type: ignore[arg-type]
    return made[0], made[1]


def outputs_and_gradients(model: RetrievalModel, ids: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    y = model(*ids)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y, *torch.autograd.grad((y * weight).sum(), list(model.parameters()))]


def draw(batch: int, steps: int, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return tuple(torch.randint(n_keys, (batch, n), generator=g) for n in (steps, steps, 1))  # type: ignore[return-value]


@pytest.mark.parametrize(("batch", "steps", "d_key"), [(1, 1, 5), (3, 7, 8), (17, 2, 7), (33, 12, 16)])
@pytest.mark.parametrize("name", CONFIGS)
def test_odd_sizes_equal_pytorch_in_float64(name: str, batch: int, steps: int, d_key: int) -> None:
    ids = draw(batch, steps, 6)
    results = [outputs_and_gradients(m, ids) for m in models(CONFIGS[name], 6, d_key, torch.float64)]
    for expected, ours in zip(*results, strict=True):
        # float64 sums of a few hundred terms; LayerNorm divides by standard deviations of about 1e-2
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_errors_are_at_most_four_times_those_of_pytorch(name: str) -> None:
    """Against float64 with the same parameters; four, since one draw's largest error is itself a matter of luck."""
    ids = draw(16, 40, 20)
    exact = outputs_and_gradients(models(CONFIGS[name], 20, 64, torch.float64)[0], ids)
    factored, ours = (outputs_and_gradients(m, ids) for m in models(CONFIGS[name], 20, 64, torch.float32))
    for truth, theirs, mine in zip(exact, factored, ours, strict=True):
        scale = float(truth.detach().abs().max())
        error, reference = (float((x.double() - truth).abs().max()) for x in (mine, theirs))
        assert error <= 4 * reference + 1e-6 * scale


def test_backward_may_run_twice_and_inputs_stay_as_they_are() -> None:
    model = models(CONFIGS["dpfp-2 delta"], 6, 8, torch.float64)[1]
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(*draw(5, 9, 6)).square().sum()
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_nan_in_nan_out(name: str) -> None:
    made = models(CONFIGS[name], 6, 8, torch.float32)
    for model in made:
        with torch.no_grad():
            model.b_k[0] = float("nan")
    # a value that no pair of a sequence has stays 0 under sum and delta
    expected, ours = (model(*draw(2, 4, 6)) for model in made)
    assert bool(expected.isnan().any())
    assert torch.equal(ours.isnan(), expected.isnan())


def test_ids_outside_the_tables_are_refused_before_memory_is_touched() -> None:
    model = models(CONFIGS["elu sum"], 6, 8, torch.float32)[1]
    keys, values, queries = draw(2, 4, 6)
    with pytest.raises(ValueError, match=r"values has an id outside 0 \.\. 5"):
        model(keys, values + 6, queries)


def test_what_the_kernel_lacks_is_refused_by_name() -> None:
    favor = AttentionConfig("sum", "favor", attention_norm="readout")
    with pytest.raises(
        ValueError, match=r"compute=compiled cannot run: .*no feature_map favor.*set model\.compute: auto"
    ):
        RetrievalModel(favor, 6, 8, compute="compiled")(*draw(2, 4, 6))
    memory = ops.PairMemory("delta", "elu", 1, "none", "none", 0.0, 0.0, 0.0)
    assert "('delta', 'none', 'none')" in str(memory.why_not(torch.float32, torch.device("cpu")))
    assert "dtype torch.bfloat16" in str(memory.why_not(torch.bfloat16, torch.device("cpu")))


def test_exponential_rows_flush_and_sum() -> None:
    library = compiled.library("exponential_rows")
    # 19 columns: not a multiple of the lanes
    x = torch.linspace(-100, 3, 4 * 19).view(4, 19)
    offset, query = torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.rand(2, 19)
    expected = torch.exp((x - offset[:, None]).double())
    expected = torch.where(x - offset[:, None] <= -87, 0.0, expected)
    features, kernel = x.clone(), torch.empty(4)
    sizes = (ctypes.c_int64(n) for n in (4, 19, 2))
    buffers = (ctypes.c_void_p(t.data_ptr()) for t in (features, offset, query, kernel))
    library.fwp_exponential_rows(*sizes, *buffers)
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=0)
    sums = (expected * query.double().repeat_interleave(2, 0)).sum(-1)
    torch.testing.assert_close(kernel.double(), sums, rtol=1e-5, atol=0)
