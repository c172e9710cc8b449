"""The CUDA kernels: their source computed on the CPU, thread after thread, and what nvcc makes of it.

No test here has been run on a GPU unless it says so by its name; those that need one are skipped where there is none.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_operators import ABSENT, ALL_OR_LEAST, assert_traced_alike
from test_operators import draw as draw_leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig, build_attention
from fwp_lightning.ops import cuda_recurrence, reference

# B, T, H, K, V: around the sixteen threads of a unit, the steps of a chunk, the rows of a thread, and the limits
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 7, 3, 5, 3),
    (1, 37, 3, 16, 16),
    (3, 18, 1, 17, 15),
    (1, 33, 2, 32, 33),
    (1, 13, 2, 96, 16),
    (1, 9, 1, 64, 70),
    (1, 11, 1, 257, 20),
    (1, 5, 1, 512, 256),
]
DTYPES = [torch.float32, torch.bfloat16]
RULES = ["sum", "delta"]
Rule = Callable[..., tuple[Tensor | None, Tensor]]


def compile_for_the_host(source: Path, target: Path) -> ctypes.CDLL:
    """The source that nvcc compiles, with a loop over threads for a GPU; undefined behaviour ends the process."""
    flags = ["-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{compiled.SOURCES}"]
    checks = ["-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([*compiled.compiler(), *flags, *checks, "-x", "c++", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("emulation") / "recurrence.so"
    return compile_for_the_host(compiled.SOURCES / cuda_recurrence.KERNEL, target)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(
    request: pytest.FixtureRequest, emulation: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where the kernels run; memory that they get is not zero."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if request.param == "emulated":
        real = compiled.library
        monkeypatch.setattr(compiled, "library", lambda name: emulation if name.endswith(".cu") else real(name))
        compiled._function.cache_clear()
    # fills what torch.empty returns with NaN
    torch.use_deterministic_algorithms(True)
    with torch.library._scoped_library("fwp_lightning", "IMPL") as library:
        if request.param == "emulated":
            cuda_recurrence.RULE.implement(library, "CPU")
        yield torch.device("cpu" if request.param == "emulated" else "cuda")
    torch.use_deterministic_algorithms(False)
    compiled._function.cache_clear()


def draw(rule: str, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs by name, the state included; keys are sum-normalised."""
    b, t, h, n_features, d_value = size
    g = torch.Generator().manual_seed(7)
    k = torch.rand(b, t, h, n_features, generator=g, dtype=torch.float64) + 0.1
    inputs = {
        "q": torch.rand(b, t, h, n_features, generator=g),
        "k": k / k.sum(-1, keepdim=True),
        "v": torch.randn(b, t, h, d_value, generator=g),
        "beta": torch.rand(b, t, h, generator=g),
        "state": torch.randn(b, h, n_features, d_value, generator=g),
    }
    if rule == "sum":
        del inputs["beta"]
    return {name: x.to(torch.float32 if name == "state" else dtype) for name, x in inputs.items()}


def results(rule: Rule, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Outputs, last state and the gradients of a weighted sum of both, on the CPU."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    o, last = rule(**leaves)
    outputs = {name: x for name, x in (("o", o), ("last", last)) if x is not None}
    # bfloat16 holds them, so that every dtype is given the same
    weights = (torch.sin(torch.arange(x.numel(), device=x.device)).bfloat16().view_as(x) for x in outputs.values())
    loss = sum((x.double() * w).sum() for x, w in zip(outputs.values(), weights, strict=True))
    wanted = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    outputs |= {f"grad_{name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: x.detach().cpu() for name, x in outputs.items()}


def rule_of(module: object, rule: str) -> Rule:
    return getattr(module, f"{rule}_rule")  # type: ignore[no-any-return]


def on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


def exact(rule: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return results(rule_of(reference, rule), {name: x.double() for name, x in inputs.items()})


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_float32_errors_are_at_most_twice_those_of_the_loop(
    device: torch.device, rule: str, size: tuple[int, int, int, int, int]
) -> None:
    inputs = draw(rule, size, torch.float32)
    truth, loop = exact(rule, inputs), results(rule_of(reference, rule), inputs)
    ours = results(rule_of(cuda_recurrence, rule), on(device, inputs))
    for name, expected in truth.items():
        error, theirs = (float((x[name].double() - expected).abs().max()) for x in (ours, loop))
        # a few units in the last place: one draw's largest error is a matter of luck
        assert error <= 2 * theirs + 4e-7 * float(expected.abs().max()), name


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_is_rounded_once(device: torch.device, rule: str, size: tuple[int, int, int, int, int]) -> None:
    inputs = draw(rule, size, torch.bfloat16)
    ours = results(rule_of(cuda_recurrence, rule), on(device, inputs))
    for name, expected in exact(rule, inputs).items():
        assert ours[name].dtype == (torch.float32 if name in {"last", "grad_state"} else torch.bfloat16)
        # half a unit of 8 bits for each result, and float32 sums before
        torch.testing.assert_close(
            ours[name].double(), expected, rtol=2**-8, atol=1e-5 * float(expected.abs().max()), msg=name
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("absent", [("q",), ("state",), ("q", "state")], ids=str)
def test_without_queries_or_a_state(device: torch.device, rule: str, absent: tuple[str, ...]) -> None:
    inputs = draw(rule, (2, 19, 2, 18, 5), torch.float32)
    given = {name: None if name in absent else x for name, x in inputs.items()}
    truth = results(rule_of(reference, rule), {n: None if x is None else x.double() for n, x in given.items()})
    moved = {n: None if x is None else x.to(device) for n, x in given.items()}
    for name, ours in results(rule_of(cuda_recurrence, rule), moved).items():
        torch.testing.assert_close(ours.double(), truth[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("split", [1, 8, 16, 19])
def test_splitting_and_passing_the_state_on_changes_nothing(device: torch.device, split: int) -> None:
    inputs = on(device, draw("delta", (1, 20, 2, 20, 9), torch.float32))
    state = inputs.pop("state")
    whole, last = cuda_recurrence.delta_rule(**inputs, state=state)
    first, middle = cuda_recurrence.delta_rule(**{n: x[:, :split] for n, x in inputs.items()}, state=state)
    second, end = cuda_recurrence.delta_rule(**{n: x[:, split:] for n, x in inputs.items()}, state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(end, last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(0, 4, 2, 3, 5), (2, 0, 2, 3, 5)], ids=["no batch", "no steps"])
def test_nothing_to_do_leaves_the_state_as_it_was(
    device: torch.device, rule: str, size: tuple[int, int, int, int, int]
) -> None:
    inputs = draw(rule, size, torch.float32)
    ours = results(rule_of(cuda_recurrence, rule), on(device, inputs))
    torch.testing.assert_close(ours["last"], inputs["state"], rtol=0, atol=0)
    assert ours["o"].shape == inputs["v"].shape
    assert not bool(ours["grad_state"].isnan().any())


def test_strides_of_any_kind_are_taken_and_inputs_left_alone(device: torch.device) -> None:
    inputs = on(device, draw("delta", (2, 9, 3, 6, 7), torch.float32))
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    before = {name: x.clone() for name, x in strided.items()}
    ours, theirs = (results(cuda_recurrence.delta_rule, x) for x in (strided, inputs))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(before[name], strided[name]) for name in strided)


def test_backward_may_run_twice(device: torch.device) -> None:
    leaves = {n: x.requires_grad_() for n, x in on(device, draw("delta", (1, 9, 2, 6, 7), torch.float32)).items()}
    o, last = cuda_recurrence.delta_rule(**leaves)
    loss = o.square().sum() + last.square().sum()
    first, second = (torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_nan_in_nan_out_and_nowhere_else(device: torch.device, rule: str) -> None:
    inputs = draw(rule, (1, 21, 2, 5, 4), torch.float32)
    inputs["v"][0, 6, 1, 2] = float("nan")
    expected = results(rule_of(reference, rule), inputs)
    ours = results(rule_of(cuda_recurrence, rule), on(device, inputs))
    for name in expected:
        assert torch.equal(ours[name].isnan(), expected[name].isnan()), name


def test_a_long_sequence_keeps_its_error(device: torch.device) -> None:
    inputs = draw("delta", (1, 1001, 1, 8, 4), torch.float32)
    truth, loop = exact("delta", inputs), results(reference.delta_rule, inputs)
    ours = results(cuda_recurrence.delta_rule, on(device, inputs))
    for name, expected in truth.items():
        error, theirs = (float((x[name].double() - expected).abs().max()) for x in (ours, loop))
        assert error <= 2 * theirs + 4e-7 * float(expected.abs().max()), name


# what backend cpu computes in one kernel
AXES = [
    AttentionConfig("delta", "dpfp", nu=2, phi_norm="sum", backend="cuda"),
    AttentionConfig("sum", "elu", attention_norm="readout", backend="cuda"),
]


@pytest.mark.parametrize("config", AXES, ids=["delta dpfp-2 sum", "sum elu readout"])
def test_maps_and_normalisers_stay_in_pytorch_around_the_kernel(
    device: torch.device, config: AttentionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernel computes the rule alone; it is never swapped for the fused kernel of the CPU."""
    monkeypatch.setattr(cuda_recurrence, "why_not", lambda k: None)
    launched = []
    launch = compiled.launch
    monkeypatch.setattr(compiled, "launch", lambda *x, **y: launched.append(x[1]) or launch(*x, **y))
    found = []
    for backend, where in (("cuda", device), ("reference", torch.device("cpu"))):
        torch.manual_seed(0)
        layer = build_attention(dataclasses.replace(config, backend=backend), 12, 2).to(where)
        assert layer.memory.fused is None
        x = torch.randn(2, 13, 12, generator=torch.Generator().manual_seed(1)).to(where)
        y, state = layer(x)
        z, _ = layer(x[:, :5], state)
        gradients = torch.autograd.grad(y.square().sum() + z.square().sum(), list(layer.parameters()))
        found.append([x.detach().cpu() for x in (y, z, *gradients)])
    assert launched == ["forward", "forward", "backward", "backward"]
    for ours, theirs in zip(*found, strict=True):
        # float32 sums of a few dozen terms in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_second_derivative_is_refused_not_lost(device: torch.device, rule: str) -> None:
    inputs = {n: x.requires_grad_() for n, x in on(device, draw(rule, (1, 5, 1, 4, 3), torch.float32)).items()}
    o, _ = rule_of(cuda_recurrence, rule)(**inputs)
    assert o is not None
    with pytest.raises(RuntimeError, match="second derivatives of a memory"):
        torch.autograd.grad(o.sum(), [inputs["k"]], create_graph=True)


# --- tracers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ABSENT, ids=lambda x: "no " + " and ".join(x))
@pytest.mark.parametrize("rule", RULES)
def test_the_operator_is_what_its_registration_says(device: torch.device, rule: str, absent: tuple[str, ...]) -> None:
    absent = (*absent, "beta") if rule == "sum" else absent
    inputs = draw_leaves((2, 19, 2, 5, 3), absent, torch.float32, device)
    torch.library.opcheck(torch.ops.fwp_lightning.cuda_recurrence.default, tuple(inputs.values()))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absent", ALL_OR_LEAST, ids=lambda x: "no " + " and ".join(x))
@pytest.mark.parametrize("rule", RULES)
def test_one_graph_of_any_size_gives_the_same_bits(
    device: torch.device, rule: str, absent: tuple[str, ...], dtype: torch.dtype, compiler: str
) -> None:
    absent = (*absent, "beta") if rule == "sum" else absent
    sizes = [(2, 7, 3, 5, 3), (4, 18, 3, 5, 3), (5, 33, 3, 5, 3)]

    def function(**x: Tensor | None) -> tuple[Tensor | None, Tensor]:
        return rule_of(cuda_recurrence, rule)(**{n: y for n, y in x.items() if n != "beta" or y is not None})

    assert_traced_alike(function, compiler, [draw_leaves(size, absent, dtype, device) for size in sizes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_tracer_is_told_shapes_and_dtypes_on_a_gpu_that_is_not_there(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(cuda_recurrence, "why_no_kernel", lambda device: None)
    drawn = draw(rule, (2, 7, 3, 5, 4), dtype)
    with FakeTensorMode():
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in drawn.items()}
        traced = torch.compile(rule_of(ops, rule), backend="eager", fullgraph=True, dynamic=True)
        for function in (traced, rule_of(ops, rule)):
            o, last = function(**inputs, backend="cuda")  # type: ignore[call-arg]
            assert o is not None
            assert (o.dtype, tuple(o.shape), o.device.type) == (dtype, (2, 7, 3, 4), "cuda")
            assert (last.dtype, tuple(last.shape), last.device.type) == (torch.float32, (2, 3, 5, 4), "cuda")
        # autograd itself needs a PyTorch with CUDA
        inputs = {"beta": None, **inputs}
        tensors = [inputs[name] for name in ("q", "k", "v", "beta", "state")]
        _, last, errors = cuda_recurrence.RULE.operator(*tensors)
        assert rule == "sum" or errors.dtype == torch.float32
        gradients = cuda_recurrence.RULE.backward_operator(*tensors, errors, None, last)
        for x, gradient in zip(tensors, gradients, strict=True):
            assert gradient.shape == ((0,) if x is None else x.shape)
            assert x is None or (gradient.dtype, gradient.device) == (x.dtype, x.device)


# --- threads and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_between_barriers_does_not_matter(
    device: torch.device, emulation: ctypes.CDLL, rule: str, size: tuple[int, int, int, int, int]
) -> None:
    inputs = draw(rule, size, torch.float32)
    found = []
    for order in (1, -1):
        emulation.fwp_set_thread_order(order)
        found.append(results(rule_of(cuda_recurrence, rule), on(device, inputs)))
    emulation.fwp_set_thread_order(1)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


RACE = """
#include "blocks.h"
struct Neighbour {
    struct Task { float *out; int barrier; };
    static constexpr int MAX_THREADS = 32;
    const Task &task; int i; float *shared;
    Neighbour(const Task &t, Place p, void *s) : task(t), i(p.thread), shared(static_cast<float *>(s)) {}
    template <class Block> static void program(const Task &task, Block &block) {
        block.phase([](Neighbour &me) { me.shared[me.i] = 0; });
        if (task.barrier) {
            block.phase([](Neighbour &me) { me.shared[me.i] = me.i; });
            block.phase([](Neighbour &me) { me.read(); });
        } else {
            block.phase([](Neighbour &me) { me.shared[me.i] = me.i; me.read(); });
        }
    }
    void read() { task.out[i] = shared[(i + 1) % 32]; }
};
extern "C" void neighbours(float *out, int barrier) {
    launch<Neighbour>({out, barrier}, 1, 32, 32 * sizeof(float), nullptr);
}
extern "C" const char *words() { return words_of(probe()); }
"""


def test_the_emulation_notices_a_missing_barrier(tmp_path: Path) -> None:
    (tmp_path / "race.cu").write_text(RACE)
    library = compile_for_the_host(tmp_path / "race.cu", tmp_path / "race.so")
    found: dict[tuple[int, int], list[float]] = {}
    for barrier in (0, 1):
        for order in (1, -1):
            library.fwp_set_thread_order(order)
            out = torch.empty(32)
            library.neighbours(ctypes.c_void_p(out.data_ptr()), barrier)
            found[barrier, order] = out.tolist()
    assert found[1, 1] == found[1, -1] == [*range(1, 32), 0]
    assert found[0, 1] != found[0, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 7, 3, 5, 3), (1, 9, 1, 33, 65)], ids=str)
@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_nothing_outside_the_tensors_is_read_or_written(
    device: torch.device, size: tuple[int, int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor lies between NaNs: one that is read would show in the results, one that is overwritten is missed."""
    guarded: list[tuple[Tensor, int]] = []

    def between_nans(x: Tensor) -> Tensor:
        store = torch.full((x.numel() + 128,), float("nan"), dtype=x.dtype)
        inside = store[64 : 64 + x.numel()].view_as(x)
        inside.copy_(x)
        guarded.append((store, x.numel()))
        return inside

    launch = compiled.launch

    def guarding(
        kernel: str, function: str, dtype: torch.dtype, problem: ctypes.Structure, *given: Tensor, **rest: int
    ) -> None:
        tensors = [None if x is None else between_nans(x) for x in given]
        launch(kernel, function, dtype, problem, *tensors, **rest)
        for ours, theirs in zip(tensors, given, strict=True):
            if theirs is not None:
                theirs.copy_(ours)

    monkeypatch.setattr(compiled, "launch", guarding)
    inputs = {name: between_nans(x) for name, x in draw("delta", size, dtype).items()}
    ours = results(cuda_recurrence.delta_rule, inputs)
    assert len(guarded) > len(inputs) + 10
    assert not any(bool(x.isnan().any()) for x in ours.values())
    for store, n in guarded:
        assert bool(store[:64].isnan().all())
        assert bool(store[64 + n :].isnan().all())


# --- what can run where -----------------------------------------------------------------------------------------------


def fake(k: int = 4, v: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tensors that say they are on a GPU."""
    with FakeTensorMode():
        return tuple(torch.empty(1, 3, 1, n, dtype=dtype, device="cuda") for n in (k, v))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("k", "v", "dtype", "words"),
    [
        (
            4,
            4,
            torch.float64,
            "backend 'cuda' has no torch.float64; give it float32 or half precision, or choose chunked",
        ),
        (513, 4, torch.float32, "K=513 is outside the 1 to 512 of backend 'cuda'; choose chunked"),
        (4, 257, torch.float32, "V=257 is over the 256 of backend 'cuda'; choose chunked"),
        (512, 256, torch.bfloat16, None),
        (16, 16, torch.float16, None),
    ],
)
def test_limits_are_said_and_auto_goes_on_with_chunked(
    k: int, v: int, dtype: torch.dtype, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_recurrence, "why_no_kernel", lambda device: None)
    tensors = fake(k, v, dtype)
    assert ops.why_not("cuda", "delta", *tensors) == words
    assert ops.backends_of("delta", *tensors)[0] == ("chunked" if words else "cuda")


def test_tensors_on_the_cpu_are_refused_by_name() -> None:
    x = torch.rand(1, 3, 1, 2)
    with pytest.raises(ValueError, match="backend 'cuda' cannot compute on cpu; move the tensors to a CUDA device"):
        ops.sum_rule(x, x, x, backend="cuda")


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda_recurrence.why_no_kernel.cache_clear()
    reason = ops.why_not("cuda", "sum", *fake())
    cuda_recurrence.why_no_kernel.cache_clear()
    assert reason == "backend 'cuda' needs compute capability 8.0, cuda:0 has 7.5; choose chunked"


def test_a_missing_nvcc_is_said_and_auto_goes_on_with_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FWP_CACHE", str(tmp_path))
    for function in (cuda_recurrence.why_no_kernel, compiled.library, compiled.why_unavailable):
        function.cache_clear()
    reason = f"CUDA_HOME={tmp_path} has no bin/nvcc; name a CUDA toolkit's folder or unset it"
    assert ops.why_not("cuda", "sum", *fake()) == reason
    assert ops.backends_of("sum", *fake()) == ["chunked", "reference"]
    for function in (cuda_recurrence.why_no_kernel, compiled.library, compiled.why_unavailable):
        function.cache_clear()


# --- nvcc -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Path:
    """The library for all targets, in the user's own cache: nvcc takes a minute or more for it."""
    try:
        compiled.cuda_compiler()
    except compiled.KernelUnavailable as reason:
        pytest.skip(str(reason))
    return compiled.build(compiled.recipe_here(cuda_recurrence.KERNEL))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nvcc_compiles_all_targets_without_spills(built: Path) -> None:
    log = built.with_suffix(".log").read_text()
    assert "warning" not in log
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", log)
    assert {target for _, target in kernels} == {"sm_80", "sm_90"}
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(stacks) >= len(kernels) > 0
    assert set(stacks) == {("0", "0", "0")}


def targets_of(library: bytes) -> set[tuple[str, int]]:
    """What a library holds for GPUs, as ("ptx" or "cubin", architecture): the headers that nvcc's fatbinary writes."""
    found, at = set(), 0
    while (at := library.find(struct.pack("<I", 0xBA55ED50), at)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", library, at)
        entry = at + header
        while entry < at + header + size:
            kind, _, own_header, own_size = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            found.add(({1: "ptx", 2: "cubin"}.get(kind, str(kind)), architecture))
            entry += own_header + own_size
        at += header + size
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_library_holds_code_for_both_targets_and_ptx_for_later_ones(built: Path) -> None:
    assert targets_of(built.read_bytes()) >= {("cubin", 80), ("cubin", 90), ("ptx", 80)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_library_loads_and_says_in_words_what_is_missing(built: Path) -> None:
    library = compiled.library(cuda_recurrence.KERNEL)
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "backward"):
            assert hasattr(library, f"fwp_recurrence_{direction}_{dtype}")
    reason = cuda_recurrence.why_not_ready()
    if torch.cuda.is_available():
        assert reason is None
    else:
        assert re.fullmatch(r"CUDA refused recurrence\.cu: .+ \(error \d+\)", str(reason))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_launch_without_a_device_is_refused_not_lost(built: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    compiled._function.cache_clear()
    with pytest.raises(RuntimeError, match=r"CUDA refused recurrence\.cu"):
        cuda_recurrence.sum_rule(None, torch.rand(1, 2, 1, 3), torch.rand(1, 2, 1, 3), None)
