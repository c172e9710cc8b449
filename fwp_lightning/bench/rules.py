"""The parts `rules`, `fused` and `growth`: the memories on their own, against the time-step loop and the peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention import AttentionConfig, FastWeightMemory
from fwp_lightning.bench.candidates import Call, Candidate, backends, call_of, disagreement, draw_inputs
from fwp_lightning.bench.clocks import CPU, WALL, Clock, CudaClock, Function, GraphClock, interleaved
from fwp_lightning.bench.peers import Tell, peers_of
from fwp_lightning.bench.records import Group, Measurement
from fwp_lightning.bench.shapes import FUSED, LENGTHS, NU, QUICK, Shape, gigaflop, growing
from fwp_lightning.peak_memory import needed_memory_mb

RULES = ("sum", "delta")
PASSES = ("forward", "forward+backward")
GEMM = "gemm"
GEMM_SIZE = {"cpu": 1024, "cuda": 4096}
# the loop and autograd keep about this many memories a step
KEPT_MEMORIES = 5
# a call this long is not tried at four times the length
LONGEST_CALL = 1.2
Result = tuple[Group, list[Measurement]]


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    device: str
    rounds: int
    tell: Tell
    threads: Sequence[int] = (1,)
    """On a CPU: time of the process at one thread, wall time at more."""
    fetch: bool = False
    quick: bool = False
    clocks: Sequence[Clock] = field(default_factory=tuple)
    """On a GPU."""

    def with_clocks(self) -> Iterator[tuple[int, Clock]]:
        """Go through the pairs of threads and clock, torch being set to these threads meanwhile."""
        if self.device != "cpu":
            yield from ((1, clock) for clock in self.clocks)
            return
        before = torch.get_num_threads()
        try:
            for n_threads in self.threads:
                torch.set_num_threads(n_threads)
                yield n_threads, CPU if n_threads == 1 else WALL
        finally:
            torch.set_num_threads(before)


def cuda_clocks() -> tuple[Clock, ...]:
    """Return the clocks of a GPU: launched one by one, and recorded as a graph."""
    return CudaClock(), GraphClock("cuda graph")


def measure_rules(settings: Settings, shapes: Sequence[Shape]) -> Iterator[Result]:
    """Yield every comparison of the rules: all backends and peers, forward with and without backward."""
    for shape in [QUICK] if settings.quick else shapes:
        for dtype in _dtypes(settings.device, shape):
            for rule in RULES:
                inputs = draw_inputs(rule, shape, settings.device, dtype)
                peers = peers_of(rule, settings.device, dtype, fetch=settings.fetch, tell=settings.tell)
                entrants = [*backends(rule, inputs[1], inputs[2]), *peers]
                calls = agreeing(_fitting(entrants, shape, settings), inputs, f"{rule} {shape}", settings.tell)
                for passes in PASSES:
                    yield from _compare("rules", rule, shape, passes, calls, settings)


def _dtypes(device: str, shape: Shape) -> list[torch.dtype]:
    own: torch.dtype = getattr(torch, shape.dtype)
    # half precision is what GPUs are for
    return [own] if device == "cpu" or own != torch.float32 else [own, torch.bfloat16]


def _fitting(entrants: list[Candidate], shape: Shape, settings: Settings) -> list[Candidate]:
    """Leave out the time-step loop where the memories that it keeps would fill the machine."""
    kept = KEPT_MEMORIES * 4 * shape.steps * shape.batch * shape.heads * shape.keys * shape.values
    is_cpu = settings.device == "cpu"
    free = psutil.virtual_memory().available if is_cpu else torch.cuda.mem_get_info()[0]
    if kept < 0.5 * free:
        return entrants
    settings.tell(f"reference is not measured at {shape}: it would keep {kept / 2**30:.0f} GiB of memories")
    return [candidate for candidate in entrants if candidate.name != "reference"]


def agreeing(entrants: Sequence[Candidate], inputs: list[Tensor], where: str, tell: Tell) -> list[Call]:
    """Return the calls of those that agree with their definition; whoever does not gets no number, and is told of."""
    calls = []
    for candidate in entrants:
        problem = disagreement(candidate, inputs)
        if problem:
            tell(f"{candidate.name} is not measured for {where}: {problem}")
        else:
            calls.append(call_of(candidate, inputs))
    return calls


def _compare(
    part: str, rule: str, shape: Shape, passes: str, calls: Sequence[Call], settings: Settings
) -> Iterator[Result]:
    dtype = calls[0].inputs[0].dtype if calls else torch.float32
    functions = {call.candidate.name: call.forward if passes == "forward" else call.both for call in calls}
    gemm, of_gemm = _matrix_product(settings, dtype)
    for n_threads, clock in settings.with_clocks():
        spreads = interleaved(_recordable({**functions, GEMM: gemm}, clock, settings.tell), clock, settings.rounds)
        group = Group(part, rule, str(shape), _short(dtype), n_threads, clock.name, passes)
        counted = {call.candidate.name: call.candidate.counts for call in calls}
        work = {name: gigaflop(rule, shape, passes) for name, counts in counted.items() if counts} | {GEMM: of_gemm}
        yield group, [Measurement(name, spread, work.get(name)) for name, spread in spreads.items()]


def _matrix_product(settings: Settings, dtype: torch.dtype) -> tuple[Function, float]:
    """Return the product of two square matrices, the roof that the rest is measured by, and its 10^9 operations."""
    size = 64 if settings.quick else GEMM_SIZE[settings.device]
    a, b = (torch.randn(size, size, device=settings.device, dtype=dtype) for _ in range(2))
    return functools.partial(torch.mm, a, b), 2 * size**3 / 1e9


def _recordable(functions: Mapping[str, Function], clock: Clock, tell: Tell) -> dict[str, Function]:
    """Leave out what a CUDA graph cannot record."""
    if not isinstance(clock, GraphClock):
        return dict(functions)
    found = {}
    for name, function in functions.items():
        try:
            clock.prepare(function)
        except RuntimeError as error:
            tell(f"{name} cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}")
            continue
        found[name] = function
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the feature map inside the kernel -------------------------------------------------------------------------------


def measure_fused(settings: Settings) -> Iterator[Result]:
    """Yield DPFP-3 with sum-normalised features: computed in the kernel, and in PyTorch before it."""
    if settings.device != "cpu":
        settings.tell("fused is not measured: on a GPU no kernel computes the feature map")
        return
    for raw in (QUICK,) if settings.quick else FUSED:
        for rule in RULES:
            inputs = draw_inputs(rule, raw, settings.device, torch.float32)
            with torch.no_grad():
                # raw keys have both signs
                for x in inputs[:2]:
                    x.normal_(generator=torch.Generator().manual_seed(1))
            calls = agreeing(_dpfp_candidates(rule, raw.keys), inputs, f"{rule} with DPFP-{NU} {raw}", settings.tell)
            wide = Shape(f"DPFP-{NU}", raw.batch, raw.steps, raw.heads, 2 * NU * raw.keys, raw.values)
            for passes in PASSES:
                yield from _compare("fused", rule, wide, passes, calls, settings)


def _dpfp_candidates(rule: str, d_key: int) -> list[Candidate]:
    truth = functools.partial(_featured, FastWeightMemory(_dpfp(rule, "reference"), d_key))
    found = []
    fused = ops.FusedMemory("dpfp", nu=NU, phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6)
    example = torch.zeros(1, 1, 1, d_key)
    for backend in ("chunked", "cpu"):
        if ops.why_not(backend, rule, example) is None:
            compute = functools.partial(_featured, FastWeightMemory(_dpfp(rule, backend), d_key))
            found.append(Candidate(f"features in PyTorch, {backend}", compute, truth))
    if fused.why_not(example) is None:
        found.append(Candidate("features in the kernel, cpu", functools.partial(_fused, fused), truth))
    return found


def _dpfp(rule: str, backend: str) -> AttentionConfig:
    return AttentionConfig(rule, "dpfp", nu=NU, phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6, backend=backend)


def _featured(memory: FastWeightMemory, q: Tensor, k: Tensor, v: Tensor, *beta: Tensor) -> Tensor:
    q, k = memory.query_features(q), memory.key_features(k)
    apply: Callable[..., tuple[Tensor | None, Tensor]] = ops.delta_rule if beta else ops.sum_rule
    o, _ = apply(q, k, v, *beta, backend=memory.config.backend)
    assert o is not None
    return o


def _fused(memory: ops.FusedMemory, q: Tensor, k: Tensor, v: Tensor, *beta: Tensor) -> Tensor:
    o, _, _ = ops.fused_rule(memory, q, k, v, *beta)
    assert o is not None
    return o


# --- growth ----------------------------------------------------------------------------------------------------------


def measure_growth(settings: Settings) -> Iterator[Result]:
    """Yield the delta rule's forward and backward pass over longer and longer sequences, and the memory it needs.

    Whoever takes long leaves: four times the length is at least four times the time.
    """
    left: set[str] = set()
    clock: Clock = CPU if settings.device == "cpu" else settings.clocks[0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for steps in (16, 64) if settings.quick else LENGTHS:
            shape = growing(steps)
            inputs = draw_inputs("delta", shape, settings.device, torch.float32)
            entrants = backends("delta", inputs[1], inputs[2])
            entrants += peers_of("delta", settings.device, torch.float32, fetch=False, tell=settings.tell)
            entrants = [x for x in entrants if x.name not in left]
            calls = _agreeing_over_time(entrants, inputs, settings)
            functions: dict[str, Function] = {call.candidate.name: call.both for call in calls}
            spreads = interleaved(functions, clock, min(3, settings.rounds))
            left |= {name for name, spread in spreads.items() if spread.median > LONGEST_CALL}
            memory = {name: needed_memory_mb(function, settings.device) for name, function in functions.items()}
            work = {call.candidate.name: gigaflop("delta", shape, PASSES[1]) for call in calls if call.candidate.counts}
            group = Group("growth", "delta", str(shape), "float32", 1, clock.name, PASSES[1])
            yield group, [Measurement(name, spreads[name], work.get(name), memory[name]) for name in functions]
    finally:
        torch.set_num_threads(before)


def _agreeing_over_time(entrants: Sequence[Candidate], inputs: list[Tensor], settings: Settings) -> list[Call]:
    """As ``agreeing``, over the first steps only where there are many: the definition keeps a memory for each."""
    longest = 4096
    start = [x.detach()[:, :longest].clone().requires_grad_() for x in inputs]
    calls = agreeing(entrants, start, f"T={inputs[0].shape[1]}", settings.tell)
    return [call_of(call.candidate, inputs) for call in calls]
