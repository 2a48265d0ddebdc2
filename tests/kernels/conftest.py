"""What the op tests share: random masks, the error rule, a record of the ops that run, a check of recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from granet_kernels import plan
from granet_kernels.cpu_backend import library, memory


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
def natively_with_nan_in_new_memory() -> Iterator[None]:
    """Native code runs, what it does not write is NaN, and the number of threads is what it was afterwards."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    memory.empty((1 << 22,)).fill_(torch.nan)  # what the kernels work in, too
    with plan.use("native"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


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


@pytest.fixture
def dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 in uint16, and tl.dot multiplies those integers: give it the numbers."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle: Any) -> Any:
        if handle.data.dtype != np.uint16 or handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, numbers(a), numbers(b), *rest)
    )


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else "interpreted"])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: on a CUDA device, or interpreted on tensors in CPU memory."""
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def results_of_garbage() -> Iterator[None]:
    """Memory that is not written shows: torch.empty is NaN, or all ones, in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
