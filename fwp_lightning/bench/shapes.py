"""The sizes at which the memories are measured, and the arithmetic that a call of them takes."""

from __future__ import annotations

from dataclasses import dataclass

from fwp_lightning.errors import UserError
from fwp_lightning.registry import did_you_mean


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement: batch, steps, heads, features of a key, values."""

    name: str
    batch: int
    steps: int
    heads: int
    keys: int
    values: int
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = f"B{self.batch} H{self.heads} T{self.steps} {self.keys}x{self.values}"
        return f"{self.name} {sizes}".strip()


def _named(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


# S: a batch that one core handles; P: the paper's batches (Sec. 6.3, 96 and 56 segments); heads of its small and medium
# language model, of the small one with DPFP-3 (S4), and of today's models (S3, M)
SHAPES = _named(
    Shape("S1", 8, 256, 8, 16, 16),
    Shape("S2", 8, 384, 8, 32, 32),
    Shape("S3", 1, 4096, 8, 64, 64),
    Shape("S4", 8, 256, 8, 96, 16),
    Shape("P1", 96, 256, 8, 16, 16),
    Shape("P2", 56, 384, 8, 32, 32),
    Shape("M", 8, 4096, 16, 128, 128, "bfloat16"),
)
# a minute of a CPU for each backend; asked for by name it is measured there too
NOT_ON_CPU = ("M",)
QUICK = Shape("Q", 1, 40, 2, 8, 8)
LENGTHS = (256, 1024, 4096, 16384, 65536)
# d of the raw keys; DPFP-3 makes 6 d features of them
FUSED = (Shape("S1", 8, 256, 8, 16, 16), Shape("S2", 8, 384, 8, 32, 32))
NU = 3


def shapes_for(names: list[str] | None, device: str) -> list[Shape]:
    """Return the named shapes, or all that are meant for a device."""
    if names is None:
        return [shape for name, shape in SHAPES.items() if device != "cpu" or name not in NOT_ON_CPU]
    for name in names:
        if name not in SHAPES:
            raise UserError(f"--shapes {name}: unknown shape {name!r}. {did_you_mean(name, list(SHAPES))}")
    return [SHAPES[name] for name in names]


def growing(steps: int) -> Shape:
    """Return the shape of one sequence of ``steps`` steps."""
    return Shape("", 1, steps, 4, 32, 32)


def gigaflop(rule: str, shape: Shape, passes: str) -> float:
    """Return the 10^9 operations of a call, counted from the recurrence, the same for every backend.

    A step of a head needs products of ``2 K V`` operations each. Forward: a write and a read, under the delta rule also
    what the write retrieves: 4 K V (sum), 6 K V (delta). Backward, with ``D`` the gradient of the memory: the memory is
    written anew (the delta rule retrieves anew too), D takes the query's and, under the delta rule, gives up the
    write's outer product, and dq, dk and dv are a product each, dk of the delta rule two: 10 K V (sum), 16 K V (delta).
    Together 14 K V and 22 K V. A backend may do more (a chunked form does) or avoid some; this measures none of that.
    """
    forward, both = {"sum": (4, 14), "delta": (6, 22)}[rule]
    products = forward if passes == "forward" else both
    return products * shape.keys * shape.values * shape.batch * shape.heads * shape.steps / 1e9
