"""Kernels that are built on first use: the reasons when they cannot be, and the compiled read-out against PyTorch."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwp_lightning import compiled, ops, processor
from fwp_lightning.cli import main
from fwp_lightning.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def forget() -> None:
    """Drop what is remembered for the length of a process: tests change sources, compilers and processors."""
    for module in (compiled, processor):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One tiny kernel `answer` in a source folder of its own, and an empty cache."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(compiled, "SOURCES", sources)
    monkeypatch.setenv("FWP_CACHE", str(tmp_path / "cache"))
    for name in ("CXX", "FWP_ISA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield sources
    forget()


def answer_of_another_process(sources: Path, **environment: str) -> str:
    """What a process of its own gets from the kernel `answer`, or the reason why it gets nothing."""
    script = f"""
from pathlib import Path
from fwp_lightning import compiled
compiled.SOURCES = Path({str(sources)!r})
print(compiled.why_unavailable("answer") or compiled.library("answer").answer())
"""
    return run_python(script, **environment).stdout.strip()


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )


# --- the cache --------------------------------------------------------------------------------------------------------


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


def test_a_changed_header_or_compiler_builds_anew(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled.build(compiled.Recipe("answer", "baseline"))
    (small_source / "lanes.h").write_text("// new\n")
    compiled.build(compiled.Recipe("answer", "baseline"))
    monkeypatch.setenv("CXX", "g++ -DNDEBUG")
    compiled.build(compiled.Recipe("answer", "baseline"))
    assert len(list((tmp_path / "cache").glob("answer-baseline-*.so"))) == 3


def test_two_processes_that_build_at_once_both_get_the_kernel(small_source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(answer_of_another_process, [small_source] * 2))
    assert answers == ["42", "42"]
    assert len(list((tmp_path / "cache").glob("answer-*.so"))) == 1


def test_a_build_that_was_killed_holds_nobody_up(small_source: Path, tmp_path: Path) -> None:
    slow = stand_in(tmp_path / "slow", f'[ -e "{tmp_path}/go" ] || [ "$1" = --version ] || sleep 60; exec g++ "$@"')
    script = f"""
from pathlib import Path
from fwp_lightning import compiled
compiled.SOURCES = Path({str(small_source)!r})
compiled.library("answer")
"""
    environment = {**os.environ, "CXX": slow, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    locked = wait_for(lambda: list((tmp_path / "cache").glob("tmp*")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert locked
    (tmp_path / "go").touch()
    assert answer_of_another_process(small_source, CXX=slow) == "42"


def wait_for(condition: Callable[[], object], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def stand_in(path: Path, body: str) -> str:
    """A program at `path` that does what this shell script says."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("length", [0, 20, 3000, -1])
def test_a_library_that_was_cut_short_is_built_again(small_source: Path, length: int) -> None:
    path = compiled.build(compiled.Recipe("answer", processor.level()))
    content = path.read_bytes()
    path.write_bytes(content[:length])
    # in a process of its own: loading such a library can end it
    assert answer_of_another_process(small_source) == "42"
    assert path.read_bytes()[:-32] == content[:-32]


def test_a_library_that_another_compiler_built_serves_where_there_is_none(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled.library("answer")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    forget()
    assert compiled.outlook("answer") == (True, f"built for {processor.level()}")
    assert compiled.library("answer").answer() == 42


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_reason_says_so(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert compiled.why_unavailable("answer") == "no C++ compiler was found (g++, or the one that CXX names)"
    assert compiled.outlook("answer") == (False, "no C++ compiler was found (g++, or the one that CXX names)")


@pytest.mark.parametrize("cxx", ["no-such-compiler", "no-such-compiler -O2", "'unbalanced"])
def test_a_cxx_that_is_no_program_is_not_passed_over(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, cxx: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    expected = f"CXX={cxx} names no program; name a C++ compiler or unset it"
    assert compiled.why_unavailable("answer") == expected
    assert compiled.outlook("answer") == (False, expected)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 0", "failed on answer.cpp: it wrote no library and gave no reason"),
        ("exit 1", "failed on answer.cpp: it wrote no library and gave no reason"),
        ("echo 'cc1plus: Error: out of memory' >&2; exit 1", "failed on answer.cpp: cc1plus: Error: out of memory"),
        ("kill -9 $$", "failed on answer.cpp"),
    ],
)
def test_a_cxx_that_compiles_nothing_is_quoted(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", body))
    assert words in str(compiled.why_unavailable("answer"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 1", "it wrote nothing and gave no reason"),
        ("exit 0", "it wrote nothing and gave no reason"),
        ("kill -9 $$", "it wrote nothing and gave no reason"),
        ("echo 'g++: fatal error: cannot execute cc1plus' >&2; exit 1", "g++: fatal error: cannot execute cc1plus"),
    ],
)
def test_a_program_that_compiles_nothing_is_found_out_before_it_is_needed(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    log = tmp_path / "log"
    cxx = stand_in(tmp_path / "cxx", f'echo "$@" >> {log}; [ "$1" = --version ] && exec g++ --version\n{body}')
    monkeypatch.setenv("CXX", cxx)
    for _ in range(3):
        assert compiled.outlook("answer") == (False, f"{cxx} failed on an empty file: {words}")
    # asked once, not for each kernel
    assert len(log.read_text().splitlines()) == 2


def test_a_compiler_that_fails_is_quoted_and_remembered_for_the_list(small_source: Path) -> None:
    (small_source / "answer.cpp").write_text("this is not C++\n")
    assert compiled.outlook("answer") == (True, "g++ builds it on first use, once")
    reason = compiled.why_unavailable("answer")
    assert reason is not None
    assert "failed on answer.cpp" in reason
    assert "error" in reason
    assert "\n" not in reason
    assert compiled.outlook("answer") == (False, reason)


def test_what_failed_once_may_work_later(small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "space"
    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", f'[ -e "{marker}" ] && exec g++ "$@"; exit 1'))
    assert compiled.why_unavailable("answer")
    marker.touch()
    compiled.why_unavailable.cache_clear()
    assert compiled.why_unavailable("answer") is None
    assert compiled.outlook("answer")[0]


def test_a_cache_that_cannot_be_written_names_the_way_out(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FWP_CACHE", str(tmp_path / "file"))
    for reason in (compiled.why_unavailable("answer"), compiled.outlook("answer")[1]):
        assert f"kernels cannot be kept in {tmp_path / 'file'}" in str(reason)
        assert "set FWP_CACHE to a folder of yours" in str(reason)


def test_a_folder_that_nobody_can_make_is_found_out_before_it_is_needed(
    small_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes and rights say that root may write there."""
    monkeypatch.setenv("FWP_CACHE", "/proc/kernels")
    available, reason = compiled.outlook("answer")
    assert not available
    assert reason.startswith("kernels cannot be kept in /proc/kernels (")
    assert compiled.why_unavailable("answer") == reason


def test_a_read_only_cache_serves_what_is_in_it_and_nothing_else(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File modes do not bind root, so writing itself is refused here."""
    compiled.library("answer")
    monkeypatch.setattr(Path, "mkdir", refuse)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "cache" and may(path, mode))
    forget()
    assert compiled.why_unavailable("answer") is None
    (small_source / "answer.cpp").write_text('extern "C" int answer() { return 43; }\n')
    forget()
    reason = f"kernels cannot be kept in {tmp_path / 'cache'} (Permission denied); set FWP_CACHE to a folder of yours"
    assert compiled.why_unavailable("answer") == reason
    assert compiled.outlook("answer") == (False, reason)


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_no_home_folder_is_no_traceback(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FWP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("~no-such-user").expanduser())
    reason = "there is no home folder to keep kernels in; set FWP_CACHE to a folder"
    assert compiled.why_unavailable("answer") == reason
    assert compiled.outlook("answer") == (False, reason)


def test_a_library_that_cannot_be_loaded_says_how_to_go_on(small_source: Path) -> None:
    (small_source / "answer.cpp").write_text(
        'extern "C" int missing(); extern "C" int answer() { return missing(); }\n'
    )
    path = compiled.build(compiled.Recipe("answer", processor.level()))
    path.write_bytes(b"no library")
    compiled._seal(path)
    reason = compiled.why_unavailable("answer")
    assert "the kernel answer cannot be loaded" in str(reason)
    assert "set FWP_CACHE to another folder" in str(reason)


MAKESHIFT = {
    "no compiler": {"PATH": "/nonexistent"},
    "a compiler that is none": {"CXX": "no-such-compiler"},
    "no writable cache": {"FWP_CACHE": "/dev/null/cache"},
    "no CUDA_HOME": {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/nonexistent"},
}


@pytest.mark.parametrize("lacking", MAKESHIFT)
def test_everything_works_without(lacking: str, tmp_path: Path) -> None:
    script = """
import json, torch
from fwp_lightning import ops
from fwp_lightning.attention import AttentionConfig, build_attention, catalog
from fwp_lightning.models.retrieval import RetrievalModel
q, k, v, beta = (torch.rand(2, 9, 3, 5, requires_grad=True) for _ in range(4))
o, _ = ops.delta_rule(q, k, v, beta[..., 0])
o.sum().backward()
config = AttentionConfig("delta", "elu", phi_norm="sum")
build_attention(config, 8, 2)(torch.randn(1, 4, 8))[0].sum().backward()
RetrievalModel(config, 6, 8)(*(torch.randint(6, (2, n)) for n in (4, 4, 1))).sum().backward()
backends = {b.name: [b.available, b.reason] for b in catalog.backends()}
try:
    ops.sum_rule(q, k, v, backend="cpu")
except ValueError as error:
    refused = str(error)
print(json.dumps([ops.backends_of("delta", k), backends, refused]))
"""
    ran = run_python(script, **{"FWP_CACHE": str(tmp_path), "CXX": "", **MAKESHIFT[lacking]})
    computing, backends, refused = json.loads(ran.stdout)
    assert computing == ["chunked", "reference"]
    available, reason = backends["cpu"]
    assert not available
    assert refused == f"backend 'cpu' cannot run here: {reason}"
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr


# --- instruction sets -------------------------------------------------------------------------------------------------

X86 = {"v4": "avx2 bmi1 bmi2 f16c fma abm movbe avx512f avx512bw avx512cd avx512dq avx512vl", "baseline": "sse sse2"}
X86["v3"] = X86["v4"].split(" avx512f")[0]


def pretend(monkeypatch: pytest.MonkeyPatch, features: str, machine: str = "x86_64") -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset(features.split()))
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)


@pytest.mark.parametrize("level", X86)
def test_the_widest_instruction_set_of_the_processor_is_taken(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FWP_ISA", raising=False)
    pretend(monkeypatch, X86[level])
    assert processor.level() == level


@pytest.mark.parametrize(("features", "machine"), [("asimd sve", "aarch64"), ("", "x86_64"), ("", "riscv64")])
def test_other_processors_are_left_to_the_compiler(
    features: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FWP_ISA", raising=False)
    pretend(monkeypatch, features, machine)
    assert processor.level() == "native"
    monkeypatch.setenv("FWP_ISA", "v3")
    with pytest.raises(UserError, match=f"FWP_ISA=v3 chooses among the levels of x86-64, but this is .*{machine}"):
        processor.level()


def test_an_instruction_set_asked_for_by_name_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, X86["v3"])
    monkeypatch.setenv("FWP_ISA", "baseline")
    assert processor.level() == "baseline"
    monkeypatch.setenv("FWP_ISA", "v4")
    with pytest.raises(UserError, match=r"FWP_ISA=v4 needs avx512f, .*, which this processor does not have"):
        processor.level()
    monkeypatch.setenv("FWP_ISA", "avx2")
    with pytest.raises(UserError, match=r"FWP_ISA=avx2 is not known; choose one of v4, v3, baseline"):
        processor.level()


def test_a_refused_instruction_set_stops_auto_too(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FWP_ISA", "avx2")
    x = torch.rand(1, 2, 1, 3)
    with pytest.raises(UserError, match="FWP_ISA=avx2 is not known"):
        ops.sum_rule(x, x, x)
    available, reason = compiled.outlook("answer")
    assert not available
    assert "FWP_ISA=avx2" in reason


@pytest.mark.parametrize("level", processor.LEVELS)
def test_every_instruction_set_computes_the_same(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not processor.features().issuperset(processor.LEVELS[level]):
        pytest.skip(f"this processor cannot run {level}")
    library = ctypes.CDLL(str(compiled.build(compiled.Recipe("recurrence", level))))
    monkeypatch.setattr(compiled, "library", lambda name: library)
    compiled._function.cache_clear()
    generator = torch.Generator().manual_seed(3)
    # sizes around the lanes of each instruction set
    for b, t, h, n_features, d_value in ((1, 37, 2, 5, 3), (2, 33, 1, 17, 9), (1, 40, 1, 35, 33)):
        for dtype in (torch.float32, torch.float64):
            sizes = [(b, t, h, n_features)] * 2 + [(b, t, h, d_value), (b, t, h), (b, h, n_features, d_value)]
            inputs = [torch.rand(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]
            with torch.no_grad():
                inputs[1] /= inputs[1].sum(-1, keepdim=True)
            ours, theirs = (results_of_delta(inputs, backend) for backend in ("cpu", "reference"))
            for a, e in zip(ours, theirs, strict=True):
                # sums of at most 40 steps of numbers of order 1
                tolerance = 2e-5 if dtype == torch.float32 else 1e-13
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.detach().abs().max()))
    compiled._function.cache_clear()


def results_of_delta(inputs: list[Tensor], backend: str) -> list[Tensor]:
    o, state = ops.delta_rule(*inputs, backend=backend)
    assert o is not None
    return [o, state, *torch.autograd.grad(o.square().sum() + state.sin().sum(), inputs)]


# --- ahead of time ----------------------------------------------------------------------------------------------------


def test_build_kernels_builds_once_and_prints_a_line_each(
    small_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-kernels", "--isa", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["answer", level, "built"] for level in processor.LEVELS]
    assert main(["build-kernels"]) == 0
    assert f"answer           {processor.level():8} was built before" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("answer-*.so"))) == 3
    assert compiled.library("answer").answer() == 42


def test_build_kernels_says_what_failed_and_builds_the_others(
    small_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_source / "broken.cpp").write_text("this is not C++\n")
    (small_source / "zero.cpp").write_text('extern "C" int zero() { return 0; }\n')
    assert main(["build-kernels"]) == 1
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["answer", "zero"]
    (line,) = shown.err.splitlines()
    assert line.startswith(f"fwp: error: broken for {processor.level()}: ")
    assert "failed on broken.cpp" in line


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--isa", "v5"], {}, "invalid choice: 'v5'"),
        ([], {"FWP_ISA": "v5"}, "FWP_ISA=v5 is not known"),
        ([], {"CXX": "no-such-compiler"}, "CXX=no-such-compiler names no program"),
    ],
)
def test_build_kernels_refuses_in_a_sentence(
    small_source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    words: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["build-kernels", *arguments]) != 0
    shown = capsys.readouterr()
    assert words in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out


# what stands in for nvcc: it writes what g++ makes of the file
NVCC = 'for last; do :; done; [ "$1" = --version ] || exec g++ -shared -fPIC -x c++ "$TWO" -o "$last"'


@pytest.fixture
def cuda_source(small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA kernel `answer.cu`, and a toolkit whose nvcc is the host's compiler."""
    (small_source / "answer.cu").write_text('extern "C" int answer() { return 44; }\n')
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    stand_in(tmp_path / "toolkit" / "bin" / "nvcc", NVCC.replace("$TWO", str(small_source / "answer.cu")))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    return small_source


def test_build_kernels_builds_cuda_only_when_asked(
    cuda_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-kernels"]) == 0
    assert "answer.cu" not in capsys.readouterr().out
    assert main(["build-kernels", "--cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["answer", processor.level()], ["answer.cu", "cuda"]]
    assert compiled.library("answer.cu").answer() == 44
    assert compiled.library("answer").answer() == 42


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aEv' for 'sm_80'
ptxas info    : Function properties for _Z1aEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 520 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bEv' for 'sm_80'
ptxas info    : Function properties for _Z1bEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 178 registers, used 1 barriers, 520 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1aEv' for 'sm_90'
ptxas info    : Function properties for _Z1aEv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 520 bytes cmem[0]
"""


def test_build_kernels_shows_registers_and_spills_of_every_gpu_at_every_call(
    cuda_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ptxas").write_text(PTXAS)
    shown = f'[ "$1" = --version ] || cat {tmp_path}/ptxas >&2\n'
    stand_in(tmp_path / "toolkit" / "bin" / "nvcc", shown + NVCC.replace("$TWO", str(cuda_source / "answer.cu")))
    for _ in range(2):
        assert main(["build-kernels", "--cuda"]) == 0
        assert capsys.readouterr().out.splitlines()[2:] == [
            "answer.cu        sm_80    2 kernels, 40 to 178 registers a thread, no spills",
            "answer.cu        sm_90    1 kernels, 255 to 255 registers a thread, 1 spill, up to 20 bytes a thread",
        ]


def test_nvcc_is_looked_for_in_the_toolkit_that_is_named_then_on_path(
    cuda_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = str(tmp_path / "toolkit" / "bin" / "nvcc")
    assert compiled.cuda_compiler() == (nvcc,)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(compiled.KernelUnavailable, match=f"CUDA_HOME={tmp_path} has no bin/nvcc; name a CUDA toolkit"):
        compiled.cuda_compiler()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(Path(nvcc).parent))
    assert compiled.cuda_compiler() == (nvcc,)


def test_without_nvcc_build_kernels_says_so_and_builds_the_others(
    cuda_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(["build-kernels", "--cuda"]) == 1
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["answer"]
    expected = f"CUDA_HOME={tmp_path} has no bin/nvcc; name a CUDA toolkit's folder or unset it"
    assert shown.err == f"fwp: error: answer.cu for cuda: {expected}\n"


def test_what_nvcc_says_is_quoted(cuda_source: Path, tmp_path: Path) -> None:
    words = "nvcc fatal   : Unsupported gpu architecture 'compute_80'"
    stand_in(tmp_path / "toolkit" / "bin" / "nvcc", f'echo note >&2; echo "{words}" >&2; exit 1')
    assert compiled.why_unavailable("answer.cu") == f"{tmp_path}/toolkit/bin/nvcc failed on answer.cu: {words}"


@pytest.mark.parametrize(
    ("version", "driver", "words"),
    [
        ("2.13.0+cpu", None, "this PyTorch is built without CUDA"),
        ("2.13.0", None, "no NVIDIA driver is installed (libcuda.so.1)"),
        ("2.13.0", (100, 0), "no CUDA device was found"),
        ("2.13.0", (0, 0), "no CUDA device was found"),
        ("2.13.0", (0, 1), None),
    ],
)
def test_the_list_says_why_there_is_no_device(
    cuda_source: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    driver: tuple[int, int] | None,
    words: str | None,
) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return driver[0]  # type: ignore[index]

        def cuDeviceGetCount(self, number: Any) -> int:
            number._obj.value = driver[1]  # type: ignore[index]
            return 0

    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return Driver()

    monkeypatch.setattr(compiled.metadata, "version", lambda name: version)
    monkeypatch.setattr(compiled.ctypes, "CDLL", load)
    expected = (False, words) if words else (True, "nvcc builds it on first use, once")
    assert compiled.outlook("answer.cu") == expected


def test_sources_of_kernels_are_not_ignored_and_so_are_in_a_wheel() -> None:
    """The build backend takes what git does not ignore."""
    sources = [str(path.relative_to(ROOT)) for path in compiled.SOURCES.iterdir()]
    assert sources
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *sources], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # 1: none is ignored
    assert ignored.returncode == 1, ignored.stdout + ignored.stderr
