"""Op: an operation of torch's dispatcher that plain tensors reach without it.

The dispatcher and what torch.library puts around a kernel take longer than a small layer computes, and large kernels
find their caches filled with it. Where nothing could tell, a call goes to the kernel at once, by an autograd Function
with the same derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._C import _FunctionBase
from torch.autograd import Function, _profiler_enabled

from granet_kernels.eager import is_eager
from granet_kernels.layout import through_dispatcher

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


class Op:
    """A ``torch.library.custom_op`` that changes none of its operands.

    Args:
        name: with its namespace, e.g. "granet::linear".
        reference: computes it on any device.
        schema: its operands and results; tensors come first.

    Attributes:
        reference: as given.
    """

    def __init__(self, name: str, reference: Callable[..., Any], schema: str) -> None:
        self._op = torch.library.custom_op(name, reference, mutates_args=(), schema=schema)
        self.reference = reference
        self._name = name.replace("::", "_")
        self._kernels: dict[str, Callable[..., Any]] = {"cpu": reference, "cuda": reference}
        self._function: Callable[..., Any] | None = None
        self._finding: Callable[..., Any] | None = None
        self._gradients: dict[str, tuple[Callable[..., Any], list[tuple[Op, Callable[..., Any]]]]] = {}

    def __call__(self, *operands: Any) -> Any:
        return self.run(is_eager(*operands), *operands)

    def run(self, eager: bool, *operands: Any) -> Any:
        """A call whose caller knows what `is_eager` says of its operands."""
        if not eager or _profiler_enabled():
            _refuse_jvp(self._name)
            return self._op(*operands)
        if self._function is None or not torch.is_grad_enabled():
            return self.kernel(operands[0].device.type)(*operands)
        return self._function(*operands, None)

    def again(self, found: Any, *operands: Any) -> Any:
        """A call like one before, on a CPU, of which `found` is what the kernel worked out; None where it is for `run`.

        The caller knows that `is_eager` is true of the operands.
        """
        kernel = self._finding
        if kernel is None or kernel is not self._kernels["cpu"] or _profiler_enabled():
            return None
        if self._function is None or not torch.is_grad_enabled():
            return kernel(*operands, found)
        return self._function(*operands, found)

    def kernel(self, device: str) -> Callable[..., Any]:
        """What computes it on devices of a type; the op itself on those that nothing is known of."""
        return self._kernels.get(device, self._op)

    def register_kernel(self, device: str, finding: bool = False) -> Callable[[Kernel], Kernel]:
        """Decorates what computes it on devices of a type: "cpu" or "cuda".

        finding: whether it takes, after the operands, what was found for a call like this one, for `again`.
        """

        def register(kernel: Kernel) -> Kernel:
            self._op.register_kernel(device)(_dispatched(kernel))
            self._kernels[device] = kernel
            if finding:
                self._finding = kernel
            return kernel

        return register

    def register_gradients(self, device: str, *ops: Op) -> Callable[[Kernel], Kernel]:
        """Decorates what `gradients` calls on devices of a type, as long as this op and `ops`, which compute the same
        gradients one by one, have the kernels that they have now."""

        def register(function: Kernel) -> Kernel:
            self._gradients[device] = function, [(op, op.kernel(device)) for op in (self, *ops)]
            return function

        return register

    def gradients(self, *operands: Any) -> Any:
        """Several of its gradients in one call, or None where each is for an op of its own.

        Ops have to be called where gradients are differentiated again, or something looks at ops.
        """
        device = operands[0].device.type
        if device not in self._gradients or torch.is_grad_enabled() or not is_eager(*operands):
            return None
        function, kernels = self._gradients[device]
        replaced = any(op.kernel(device) is not kernel for op, kernel in kernels)
        return None if replaced or _profiler_enabled() else function(*operands)

    @contextmanager
    def computed_by(self, device: str, kernel: Callable[..., Any]) -> Iterator[None]:
        """Within it, the kernel takes the place of the one registered for a type of device."""
        before = self._kernels[device]
        self.register_kernel(device)(kernel)
        try:
            yield
        finally:
            self.register_kernel(device)(before)

    def register_fake(self, fake: Kernel) -> Kernel:
        """Decorates what gives results of the right shapes, dtypes and strides without computing them."""
        self._op.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Its derivative, as ``torch.library.register_autograd`` takes it."""
        self._op.register_autograd(backward, setup_context=setup_context)
        self._function = _function(self, self._name, backward, setup_context)


def _refuse_jvp(name: str) -> None:
    """Raise where torch.func.jvp is at work: it takes the derivative of a custom op for zero."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == torch._C._functorch.TransformType.Jvp:
        raise NotImplementedError(f"{name}: expected reverse-mode differentiation, got torch.func.jvp")


def _dispatched(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as the dispatcher calls it."""

    @wraps(kernel)
    def run(*operands: Any) -> Any:
        with through_dispatcher():
            return kernel(*operands)

    return run


def _function(
    op: Op, name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The autograd Function of an op: of its operands, and what was found for `Op.again`, or None."""

    def forward(ctx: Any, *operands_and_found: Any) -> Any:
        *operands, found = operands_and_found
        kernel = op.kernel(operands[0].device.type)
        results = kernel(*operands) if found is None else kernel(*operands, found)
        setup_context(ctx, operands, results)
        return results

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        results = backward(ctx, *grads)
        return (*results, None) if isinstance(results, tuple) else (results, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(name, (Function,), methods)
    # Function.apply would look for transforms and default arguments first, of which `is_eager` knows there are none.
    apply: Callable[..., Any] = vars(_FunctionBase)["apply"].__get__(None, function)
    return apply
