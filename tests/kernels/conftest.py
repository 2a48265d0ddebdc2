"""What the op tests share: random masks, the error rule, a record of the ops that run, a check of recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from granet_kernels.cpu_backend import library


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def random_mask() -> Callable[..., Tensor]:
    """A function shape, density -> bool mask with round(density * numel) kept."""

    def make(shape: tuple[int, ...], density: float) -> Tensor:
        numel = torch.Size(shape).numel()
        mask = torch.zeros(numel, dtype=torch.bool)
        mask[torch.randperm(numel)[: round(density * numel)]] = True
        return mask.reshape(shape)

    return make


@pytest.fixture
def assert_as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """A function that asserts error <= 2 x torch's own error in the same dtype, both against float64."""

    def check(actual: Tensor, torchs: Tensor, exact: Tensor) -> None:
        assert actual.dtype == torchs.dtype
        assert actual.shape == exact.shape
        if exact.numel() == 0:
            return
        error, torchs_error = ((t.double() - exact).abs().max() for t in (actual, torchs))
        atol = torch.finfo(actual.dtype).eps * exact.abs().max()
        assert error <= 2 * torchs_error + atol

    return check


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded_ops() -> Callable[[], AbstractContextManager[_Recorder]]:
    """A context manager whose .names lists the ops that run, without what only views or detaches."""

    @contextmanager
    def record() -> Iterator[_Recorder]:
        with _Recorder() as recorder:
            yield recorder
        recorder.names[:] = [name for name in recorder.names if not name.startswith(("aten.detach", "aten.view"))]

    return record


@pytest.fixture
def compiled_once() -> Iterator[Callable[..., Any]]:
    """A function that compiles without graph breaks; a second compilation of the same code raises."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def isa_used() -> Callable[[str], AbstractContextManager[None]]:
    """A context manager in which the named native code runs; the test is skipped where the CPU lacks it."""

    @contextmanager
    def use(name: str) -> Iterator[None]:
        try:
            context = library.isa_used(name)
            context.__enter__()
        except ValueError:
            pytest.skip(f"this CPU has no {name}")
        try:
            yield
        finally:
            context.__exit__(None, None, None)

    return use
