"""What a program calls: `best` gives the kernel for its tensors, `call` runs it, also under torch.compile and autograd.

Importing this module defines a torch custom op `rooftune::<operator>` for every operator that is here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache, partial
from threading import get_ident
from typing import Any

from rooftune import registry
from rooftune.autotune.dispatch import choose
from rooftune.autotune.inprocess import build, layout, problem_of, where_is, words
from rooftune.autotune.runtime import Kernel
from rooftune.core import PRECISIONS, Problem, UsageError

KEPT = 4096  # kernels of one process; a program with endlessly many shapes drops the oldest
_kernels: dict[Any, Kernel] = {}


def best(
    what: Problem | str,
    *tensors: Any,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    **flags: str | bool,
) -> Kernel:
    """The best measured competitor for a problem, built in this process: `kernel(out, *inputs)`.

    >>> kernel = rooftune.best("softmax", x)                      # doctest: +SKIP
    >>> kernel(out, x)                                            # doctest: +SKIP
    >>> kernel = rooftune.best("gemm[m=4096,n=4096,k=4096,bf16]") # doctest: +SKIP

    The first call for a shape reads the records and builds, which may take seconds (a compiler runs). The
    next ones, from the same thread, find the kernel by the tensors' shapes and types (1.2 us for one tensor, 2.3
    for three, on a Zen 3 core); what was chosen stays until `forget()`, whatever is measured meanwhile.

    Args:
        what: a problem, or an operator with the tensors it will get, from which sizes are read.
        device: `cpu`, `cuda:1`, ...; that of the tensors, else the first GPU, else the CPU.
        precision: where the tensors' type does not say it (tf32 is float32).
        flags: of the operator, such as `causal=True`, `transpose="nt"`.
    Raises:
        UsageError: no such problem, tensors that do not fit it, or flags beside a problem, which has its own.
    """
    # A kernel may own workspaces, so a thread never gets another thread's.
    key = (what, device, precision, threads, get_ident(), *flags.items())
    for tensor in tensors:
        key += (tensor.shape, tensor.dtype, tensor.device)
    found = _kernels.get(key)
    if found is None:
        found = _choose(what, tensors, device, precision, threads, flags)
        if len(_kernels) >= KEPT:
            _kernels.pop(next(iter(_kernels)), None)
        _kernels[key] = found
    return found


def forget() -> None:
    """Choose and build anew at the next call: after tuning in the same process, for example."""
    _kernels.clear()


def _choose(
    what: Problem | str,
    tensors: Sequence[Any],
    device: str | None,
    precision: str | None,
    threads: int | None,
    flags: dict[str, str | bool],
) -> Kernel:
    text = what if isinstance(what, str) else str(what)
    if "[" not in text:
        asked = problem_of(text, tensors, flags, precision)
    else:
        asked = registry.problem(text)
        if flags or precision:
            raise UsageError(f"{text} says its precision and flags itself; name the operator alone to give others")
        if tensors and problem_of(asked.op, tensors, dict(asked.flags), asked.precision) != asked:
            raise UsageError(f"{text} is not for tensors of shape {', '.join(str(list(t.shape)) for t in tensors)}")
    choice = choose(asked, device or where_is(tensors), threads)
    return build(asked, choice.use.impl, choice.use.config, choice.use.why)


def call(op: str, *tensors: Any, precision: str | None = None, **flags: Any) -> Any:
    """The operator's result in a new tensor, by the best measured competitor for these tensors.

    >>> y = rooftune.call("attention", q, k, v, causal=True)      # doctest: +SKIP

    Tensors that are not contiguous are copied first. Inside torch.compile, for tensors that need gradients
    and for tensor subclasses it is the custom op `rooftune::<op>`; gradients come from torch's own formula.

    Raises:
        UsageError: no such operator, or tensors that do not fit it.
    """
    if not _is_compiling() and _forward_ad._current_level < 0:
        key = (op, None, precision, None, get_ident(), *flags.items())  # as in `best`, without its second walk
        for t in tensors:
            if (t.requires_grad and _is_grad_enabled()) or type(t) not in _PLAIN or not t.is_contiguous():
                break
            key += (t.shape, t.dtype, t.device)
        else:  # nobody but the kernel has to know about the call
            return (_kernels.get(key) or best(op, *tensors, precision=precision, **flags)).fresh(*tensors)
        registry.op(op)  # says which there are
    if _forward_ad._current_level >= 0 and any(_forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UsageError(f"{op} has no forward-mode derivatives; use torch's own call for them")
    return getattr(_torch.ops.rooftune, op).default(list(tensors), _text(flags), precision or "")


def _text(flags: dict[str, str | bool]) -> str:
    return ",".join(
        name if value is True else f"{name}={value}" for name, value in flags.items() if value not in (False, None)
    )


@cache
def _flags(text: str) -> dict[str, Any]:
    parts = [part.partition("=") for part in text.split(",") if part]
    return {name: value if eq else True for name, eq, value in parts}


# --- custom ops -----------------------------------------------------------------------------------------------------


def _register() -> Any:
    """Define `rooftune::<op>` and `rooftune::<op>_gradients`."""
    library: Any = importlib.import_module("torch.library")
    ours = library.Library("rooftune", "FRAGMENT")
    back = "Tensor gradient, Tensor[] inputs, str flags, str precision) -> Tensor[]"
    for op in registry.op_names():
        for name, run, fake, schema in (
            (op, _run, _like_output, "Tensor[] inputs, str flags, str precision) -> Tensor"),
            (f"{op}_gradients", _back, _like_inputs, back),
        ):
            ours.define(f"{name}({schema}")
            ours.impl(name, partial(run, op), "CompositeExplicitAutograd")
            library.register_fake(f"rooftune::{name}", partial(fake, op), lib=ours)
        library.register_autograd(f"rooftune::{op}", partial(_backward, op), setup_context=_save, lib=ours)
    return ours


def _run(op: str, inputs: list[Any], flags: str, precision: str) -> Any:
    kernel = best(op, *inputs, precision=precision or None, **_flags(flags))
    return kernel.fresh(*[t.contiguous() for t in inputs])


def _back(op: str, gradient: Any, inputs: list[Any], flags: str, precision: str) -> list[Any]:
    from rooftune.autotune.gradients import gradients

    problem = problem_of(op, inputs, _flags(flags), precision or None)
    return [g.contiguous() for g in gradients(problem, inputs, gradient)]


def _like_output(op: str, inputs: list[Any], flags: str, precision: str) -> Any:
    """The shape of the result; sizes may be symbolic."""
    import torch

    kind = precision or next(p for p in registry.op(op).precisions if _is(inputs[0], p))
    output = layout(op, kind, words(_flags(flags))).output
    if output is None:
        shape, dtype = registry.op(op).output(problem_of(op, inputs, _flags(flags), precision or None))
    else:
        shape, dtype = output.shape(layout(op, kind, words(_flags(flags))).sizes(op, inputs)), output.dtype
    return torch.empty(shape, dtype=getattr(torch, dtype), device=inputs[0].device)


def _is(tensor: Any, precision: str) -> bool:
    return str(tensor.dtype) == f"torch.{PRECISIONS[precision].storage}"


def _like_inputs(op: str, gradient: Any, inputs: list[Any], flags: str, precision: str) -> list[Any]:
    import torch

    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.flags, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _backward(op: str, ctx: Any, gradient: Any) -> tuple[Any, None, None]:
    import torch

    back = getattr(torch.ops.rooftune, f"{op}_gradients")
    found = back(gradient, list(ctx.saved_tensors), ctx.flags, ctx.precision)
    if torch.is_grad_enabled():  # create_graph=True: someone may differentiate them
        found = [_once().apply(g, gradient, *ctx.saved_tensors) for g in found]
    return found, None, None


@cache
def _once() -> Any:
    """Lets a gradient through, and refuses to be differentiated: torch would warn and go on with zeros."""
    import torch

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, found: Any, *inputs: Any) -> Any:
            return found.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise UsageError("no second derivatives; where gradients are differentiated, use torch's own call")

    return Once


_library = _register()  # owns the definitions: they go when it goes
_torch = importlib.import_module("torch")  # `call` cannot afford an import statement: 0.4 us
_PLAIN = (_torch.Tensor, _torch.nn.Parameter)
_forward_ad = _torch.autograd.forward_ad
_is_compiling, _is_grad_enabled = _torch.compiler.is_compiling, _torch.is_grad_enabled
