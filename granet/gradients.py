"""GradientTap: between backward and the optimizer, take the dense gradient of an update and leave the sparse one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet.topology import Layer, layer_offsets


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or inf in the step of an update; nothing was changed."""


class GradientTap:
    """Looks at `weight.grad` in the hooks around `optimizer.step()`.

    Args:
        layers: the sparse weights, each with the optimizer that holds it.
        dense_wgrad: 0-dim bool CPU tensor that the layers read in backward: true makes them deliver the dense gradient.

    Attributes:
        growth: (units,) float32, mean |dense gradient| of each unit in the step that last asked for it.
        has_gradient: whether each layer had a gradient in that step.
        masks_every_step: whether gradients are masked in every step, because not only the layers produce them.
    """

    def __init__(self, layers: Sequence[tuple[Layer, Optimizer]], dense_wgrad: Tensor) -> None:
        self._layers = layers
        self._dense_wgrad = dense_wgrad
        self._bounds = layer_offsets([layer for layer, _ in layers]).tolist()
        self._maybe_dense: set[int] = set()  # ids of optimizers whose gradients may be dense
        self._to_capture: set[int] = set()  # ids of optimizers whose dense gradient this step still wants
        self._withheld: list[tuple[nn.Parameter, Tensor]] = []
        self._skipped = False
        self.growth: Tensor | None = None
        self.has_gradient = [False] * len(layers)
        self.masks_every_step = False

    @property
    def asks(self) -> bool:
        """Whether backward delivers the dense gradient now."""
        return bool(self._dense_wgrad)

    def ask(self, dense: bool) -> None:
        """Say, after a step, whether the backward passes of the next one are to deliver the dense gradient."""
        if dense != self.asks:
            self._dense_wgrad.fill_(dense)
        self._to_capture = {id(optimizer) for _, optimizer in self._layers} if dense else set()
        self._maybe_dense |= self._to_capture
        if dense:
            self.has_gradient = [False] * len(self._layers)

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], *, update: bool, withhold: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The optimizer's pre-step hook.

        Args:
            optimizer: the one that steps.
            args, kwargs: of its `step`, `self` first. A closure is wrapped: the gradients exist only after it.
            update: whether this step ends with an update.
            withhold: whether to hide all gradients from the optimizer, so that it changes nothing in this step.

        Raises:
            NonFiniteGradientError: an update meets NaN or inf; the optimizer has not stepped.
        """
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler that lets a fused optimizer skip by itself
        self._skipped = found_inf is not None and bool(found_inf)
        if self._skipped:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take(optimizer, update, withhold)
            return None
        wrapped = self._wrap(closure, optimizer, update, withhold)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def after_step(self) -> bool:
        """The optimizer's post-step hook: give back withheld gradients. Returns whether the step was skipped."""
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld.clear()
        return self._skipped

    def _wrap(
        self, closure: Callable[[], Any], optimizer: Optimizer, update: bool, withhold: bool
    ) -> Callable[[], Any]:
        def wrapped() -> Any:
            self.after_step()  # a closure that does not zero the gradients accumulates into them
            loss = closure()
            self._take(optimizer, update, withhold)
            # Of a line search only the first evaluation, at the weights of this step, needs the dense gradient.
            if not self._to_capture:
                self._dense_wgrad.fill_(False)
            return loss

        return wrapped

    def _take(self, optimizer: Optimizer, update: bool, withhold: bool) -> None:
        if not (update or withhold or self.masks_every_step or id(optimizer) in self._maybe_dense):
            return  # most steps: small networks are over before the lists are made
        held = [(i, layer) for i, (layer, owner) in enumerate(self._layers) if owner is optimizer]
        if update:
            self._check_finite(optimizer, [layer for _, layer in held])
        if id(optimizer) in self._to_capture:
            self._capture(optimizer, held)
            self._to_capture.discard(id(optimizer))
        if id(optimizer) in self._maybe_dense or self.masks_every_step:
            for _, layer in held:
                if layer.weight.grad is not None:
                    layer.weight.grad.masked_fill_(~layer.mask, 0)
            if not self.asks:
                self._maybe_dense.discard(id(optimizer))
        if withhold:
            self._withhold(optimizer)

    def _check_finite(self, optimizer: Optimizer, layers: list[Layer]) -> None:
        gradients = [layer.weight.grad for layer in layers if layer.weight.grad is not None]
        if not gradients or _are_finite(gradients):
            return
        for layer in layers:
            gradient = layer.weight.grad
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise NonFiniteGradientError(
                    f"layer '{layer.name}': expected a finite gradient in the step of an update, got NaN or inf; "
                    f"no mask was changed and {type(optimizer).__name__} has not stepped"
                )

    def _capture(self, optimizer: Optimizer, held: list[tuple[int, Layer]]) -> None:
        if self.growth is None:
            self.growth = torch.zeros(self._bounds[-1], device=self._layers[0][0].weight.device)
        scale = getattr(optimizer, "grad_scale", None)
        for i, layer in held:
            part = self.growth[self._bounds[i] : self._bounds[i + 1]]
            gradient = layer.weight.grad
            self.has_gradient[i] = gradient is not None
            if gradient is not None:
                layer.granularity.write_magnitude(gradient, part)
                if scale is not None:
                    part.div_(scale.to(part.device))

    def _withhold(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value is NaN or inf; may also say False where sums overflow."""
    # A sum with a NaN or an inf in it is not finite, and takes a small part of the time. One answer for all tensors
    # waits once for the device.
    device = tensors[0].device
    sums = torch.stack([tensor.sum().to(device, torch.float32) for tensor in tensors])
    return bool(torch.isfinite(sums).all())
