"""Other implementations to be measured beside ours: torch's SDPA, idiap's causal product, flash-linear-attention.

None of them is needed. idiap's kernel is one file of a source distribution on PyPI, which `fwp bench --peers` fetches
into the cache folder of kernels and builds there; what is not to be had is one line.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention

from fwp_lightning import compiled
from fwp_lightning.bench.candidates import Candidate, truth_of
from fwp_lightning.errors import sentence_of

IDIAP = "pytorch-fast-transformers==0.4.0"
# of the source distribution on PyPI
IDIAP_SHA256 = "d1826bc31b9dfbcd018998b897667e89fc6566bd3f8c424cda9f0943544f7e90"
IDIAP_SOURCE = "fast_transformers/causal_product/causal_product_cpu.cpp"
# how its setup.py builds it (setuptools adds -O3), and the same for this processor
IDIAP_FLAGS = {
    "idiap -O3": ("-O3", "-fopenmp", "-ffast-math"),
    "idiap -O3 -march=native": ("-O3", "-fopenmp", "-ffast-math", "-march=native"),
}
FETCH_SECONDS = 600

Tell = Callable[[str], None]


def peers_of(rule: str, device: str, dtype: torch.dtype, *, fetch: bool, tell: Tell) -> list[Candidate]:
    """Return the peers of a rule that are here; ``fetch`` gets and builds those that can be had, once."""
    found = [Candidate("sdpa", _sdpa, _softmax, heads_first=True, counts=False)]
    if device == "cpu":
        return found + (_idiap(fetch, tell) if rule == "sum" else [])
    return found + _flash_linear_attention(rule, dtype, tell)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _softmax(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None) -> Tensor:
    """Causal softmax attention written out, for [B, T, H, D]."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(future, -torch.inf).softmax(-1), v)


# --- idiap's fast-transformers ---------------------------------------------------------------------------------------


def _idiap(fetch: bool, tell: Tell) -> list[Candidate]:
    found = []
    for number, (name, flags) in enumerate(IDIAP_FLAGS.items()):
        try:
            module = _idiap_module(f"idiap_causal_product_{number}", flags, fetch)
        except (OSError, RuntimeError, ImportError, subprocess.SubprocessError, tarfile.TarError) as error:
            tell(f"{name} is not measured: {sentence_of(error).splitlines()[0][:300]}")
            continue
        found.append(Candidate(name, _causal_product(module), truth_of("sum"), heads_first=True))
    return found


def _idiap_module(name: str, flags: tuple[str, ...], fetch: bool) -> Any:
    """Return the extension, fetched and built if need be and allowed."""
    if name in sys.modules:
        return sys.modules[name]
    folder = compiled.cache_folder() / "peers" / torch.__version__
    built = folder / name / f"{name}.so"
    if not built.is_file():
        if not fetch:
            raise RuntimeError(
                f"it is not in {compiled.cache_folder() / 'peers'}; `fwp bench --peers` fetches and builds it"
            )
        from torch.utils import cpp_extension

        source = _fetched(folder.parent)
        built.parent.mkdir(parents=True, exist_ok=True)
        cpp_extension.load(name, [str(source)], extra_cflags=list(flags), build_directory=str(built.parent))
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _fetched(folder: Path) -> Path:
    """Return the source file, out of the distribution that pip gets and checks."""
    target = folder / Path(IDIAP_SOURCE).name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{IDIAP} --hash=sha256:{IDIAP_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--dest", str(folder), "--requirement", str(requirement)]
    # where its setup.py finds nvcc it asks for a CUDA build of torch
    nvcc, path = shutil.which("nvcc"), os.environ.get("PATH", "")
    kept = [place for place in path.split(os.pathsep) if not (nvcc and (Path(place) / "nvcc").exists())]
    environment = os.environ | {"PATH": os.pathsep.join(kept)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    archive = next(folder.glob("*.tar.gz"), None)
    if done.returncode or archive is None:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"pip could not fetch {IDIAP} ({said})")
    with tarfile.open(archive) as content:
        member = next(x for x in content.getnames() if x.endswith(IDIAP_SOURCE))
        file = content.extractfile(member)
        assert file is not None
        target.write_bytes(file.read())
    return target


def _causal_product(module: Any) -> Callable[..., Tensor]:
    """Return the function with the gradient that fast-transformers gives it, for [B, H, T, D]."""

    class CausalProduct(Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            product = torch.zeros_like(v)
            module.causal_dot_product(q.data, k.data, v.data, product)
            return product

        @staticmethod
        def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor, ...]:
            q, k, v = ctx.saved_tensors
            gradients = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            module.causal_dot_backward(q.data, k.data, v.data, grad_o, *gradients)
            return gradients

    return CausalProduct.apply


# --- flash-linear-attention ------------------------------------------------------------------------------------------


def _flash_linear_attention(rule: str, dtype: torch.dtype, tell: Tell) -> list[Candidate]:
    """Its chunked form has no float32 for the delta rule; its step-by-step form takes any dtype."""
    try:
        if rule == "sum":
            attention = importlib.import_module("fla.ops.linear_attn")
            functions = {
                "fla chunk": attention.chunk_linear_attn,
                "fla fused recurrent": attention.fused_recurrent_linear_attn,
            }
            options: dict[str, Any] = {"scale": 1.0, "normalize": False}
        else:
            delta = importlib.import_module("fla.ops.delta_rule")
            functions = {
                "fla chunk": delta.chunk_delta_rule,
                "fla fused recurrent": delta.fused_recurrent_delta_rule,
            }
            options = {"scale": 1.0}
    # a version of triton that it does not know ends its import in other ways too
    except Exception as error:  # noqa: BLE001
        tell(f"flash-linear-attention is not measured: {sentence_of(error)}")
        return []
    if rule == "delta" and dtype == torch.float32:
        del functions["fla chunk"]
    return [
        Candidate(name, lambda *inputs, f=function: f(*inputs, **options)[0], truth_of(rule))
        for name, function in functions.items()
    ]
