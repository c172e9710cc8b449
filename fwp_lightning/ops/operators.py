"""A compiled rule as PyTorch knows functions: with a gradient, and as an operator that tracers see whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fwp_lightning import compiled
from fwp_lightning.ops.first_order import first_order

# tensors, or None where there is none
Tensors = list[Any]

_LIBRARY = torch.library.Library("fwp_lightning", "DEF")


@torch.compiler.assume_constant_result
def why_unavailable(kernel: str) -> str | None:
    """Return ``compiled.why_unavailable``, which a tracer need not look into."""
    return compiled.why_unavailable(kernel)


class CompiledRule:
    """``rule(options, q, k, ...)`` returns what the kernel returns; an absent input is None, an absent result too.

    Called with plain tensors it is an autograd Function; within ``torch.compile`` and other tracers it is
    ``torch.ops.fwp_lightning.<name>``, with ``<name>_backward`` for its gradients; absent results are empty tensors.

    ``inputs`` and ``options`` are arguments in the language of PyTorch's schemas. ``results`` names what callers get,
    ``saved`` what backward needs of them and beyond them. ``device`` is the dispatch key of the tensors: CPU or CUDA.

    * ``allocate(inputs, *options, keep=bool)`` returns tensors for results and for the rest of ``saved``, None for what
      does not exist or is not to be kept; it looks at nothing but sizes.
    * ``forward(inputs, outputs, *options)`` fills them.
    * ``backward(inputs, saved, incoming, *options)`` returns a gradient for each input, or None where that is absent;
      those of results come in, None where they are zero. Here and in ``forward`` all tensors are dense.
    """

    def __init__(
        self,
        name: str,
        device: str,
        *,
        inputs: str,
        results: tuple[str, ...],
        saved: tuple[str, ...],
        allocate: Callable[..., Tensors],
        forward: Callable[..., None],
        backward: Callable[..., Tensors],
        options: str = "",
    ) -> None:
        self.name, self.allocate, self.forward, self.backward = name, allocate, forward, backward
        outputs = tuple(dict.fromkeys(results + saved))
        self.n_inputs, self.n_results = inputs.count(",") + 1, len(results)
        self.saved = tuple(outputs.index(x) for x in saved)
        options = f", {options}" if options else ""
        needed = ", ".join([f"Tensor {x}" for x in saved] + [f"Tensor? grad_{x}" for x in results])
        _LIBRARY.define(f"{name}({inputs}{options}) -> ({', '.join(f'Tensor {x}' for x in outputs)})")
        _LIBRARY.define(f"{name}_backward({inputs}, {needed}{options}) -> ({', '.join(['Tensor'] * self.n_inputs)})")
        self.implement(_LIBRARY, device)
        torch.library.register_fake(f"fwp_lightning::{name}", self._shapes, lib=_LIBRARY)
        torch.library.register_fake(f"fwp_lightning::{name}_backward", self._backward_shapes, lib=_LIBRARY)
        torch.library.register_autograd(
            f"fwp_lightning::{name}", first_order(self._differentiate), setup_context=self._keep, lib=_LIBRARY
        )
        self.operator = getattr(torch.ops.fwp_lightning, name).default
        self.backward_operator = getattr(torch.ops.fwp_lightning, f"{name}_backward").default

    def implement(self, library: torch.library.Library, device: str) -> None:
        """Let the operators compute tensors of a dispatch key."""
        library.impl(self.name, self._operate, device)
        library.impl(f"{self.name}_backward", self._operate_backward, device)

    def __call__(self, options: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Compute the rule; tensors must fit together, the second is the keys."""
        # the dispatcher costs as much again as autograd: it is left to those who need it
        if torch.compiler.is_compiling() or type(inputs[1]) not in (Tensor, torch.nn.Parameter):
            return self.operator(*inputs, *options)[: self.n_results]
        return _Differentiable.apply(self, options, *inputs)

    def gradients(self, inputs: Tensors, saved: Tensors, incoming: Tensors, options: tuple[Any, ...]) -> Tensors:
        """Return the gradients of the inputs; these and what comes in may be laid out in any way."""
        return self.backward(list(map(compiled.dense, inputs)), saved, list(map(compiled.dense, incoming)), *options)

    def _operate(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, options = list(map(compiled.dense, arguments[: self.n_inputs])), arguments[self.n_inputs :]
        outputs = self.allocate(inputs, *options, keep=True)
        # where a kernel writes nothing there would be what the memory happened to hold, another time something else
        for x in outputs[self.n_results :]:
            if x is not None:
                x.zero_()
        self.forward(inputs, outputs, *options)
        return _present(outputs, inputs[1])

    def _operate_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, saved, incoming, options = self._parts(arguments)
        saved = list(map(compiled.dense, saved))
        return _present(self.gradients(inputs, saved, incoming, tuple(options)), inputs[1])

    def _shapes(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, options = list(arguments[: self.n_inputs]), arguments[self.n_inputs :]
        return _present(map(_row_after_row, self.allocate(inputs, *options, keep=True)), inputs[1])

    def _backward_shapes(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = self._parts(arguments)[0]
        return _present(map(_row_after_row, inputs), inputs[1])

    def _parts(self, arguments: tuple[Any, ...]) -> list[list[Any]]:
        """Split the arguments of the backward operator into inputs, saved tensors, incoming gradients and options."""
        rest = iter(arguments)
        return [list(islice(rest, n)) for n in (self.n_inputs, len(self.saved), self.n_results, None)]

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[self.n_inputs :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: self.n_inputs], *(output[i] for i in self.saved))

    def _differentiate(self, ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = self.backward_operator(*tensors, *incoming[: self.n_results], *ctx.options)
        given = (None if x is None else g for x, g in zip(tensors, found, strict=False))
        return (*given, *(None for _ in ctx.options))


def _row_after_row(x: Tensor | None) -> Tensor | None:
    """Return a tensor of the same shape, laid out as a kernel leaves its results whatever its inputs were like."""
    return None if x is None else x.new_empty(x.shape)


def _present(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Return what an operator can return: tensors, each its own."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


class _Differentiable(Function):
    @staticmethod
    def forward(ctx: Any, rule: CompiledRule, options: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        dense = list(map(compiled.dense, inputs))
        outputs = rule.allocate(dense, *options, keep=any(ctx.needs_input_grad))
        rule.forward(dense, outputs, *options)
        ctx.rule, ctx.options = rule, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *(outputs[i] for i in rule.saved))
        return tuple(outputs[: rule.n_results])

    @staticmethod
    @first_order
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, rule = ctx.saved_tensors, ctx.rule
        inputs, saved = tensors[: rule.n_inputs], tensors[rule.n_inputs :]
        return (None, None, *rule.gradients(inputs, saved, incoming, ctx.options))
