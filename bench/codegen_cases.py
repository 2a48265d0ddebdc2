"""Which launches of the Triton kernels are compiled: those that the launchers make, recorded instead of made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from granet_kernels.triton_backend import chip

_TYPES = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
}
CHIPS = ("sm_70", "sm_80", "sm_90")
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what its compilation depends on, and the chips that it is made on."""

    kernel: Any
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]
    chips: tuple[str, ...] = CHIPS


@dataclass
class _Recorder:
    """Stands for a kernel: kernel[grid](...) is written down."""

    kernel: Any
    case: str
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        is_constant = {parameter.name: parameter.is_constexpr for parameter in self.kernel.params}
        as_it_comes = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        signature, constants, divisible = {}, {}, []
        for name in self.kernel.arg_names:
            value = given[name]
            if (
                is_constant[name]
                or value is None
                or (isinstance(value, int) and value == 1 and name not in as_it_comes)
            ):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
                divisible += [name] * (value.data_ptr() % 16 == 0)
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible += [name] * (value % 16 == 0 and name not in as_it_comes)
        self.launches.append(Launch(self.kernel, self.case, signature, constants, tuple(divisible), options))


def recorded(modules: Sequence[ModuleType], case: str, run: Callable[[], object]) -> list[Launch]:
    """The launches of the kernels that `run` finds in these modules."""
    from triton.runtime.jit import JITFunction

    with ExitStack() as stack:
        recorders = [
            stack.enter_context(patch.object(module, name, _Recorder(value, case)))
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, JITFunction)
        ]
        run()
    return [launch for recorder in recorders for launch in recorder.launches]


def distinct(launches: Iterator[Launch]) -> list[Launch]:
    """The first of those that compile to the same code."""
    found: dict[str, Launch] = {}
    for each in launches:
        key = f"{each.kernel.__name__} {each.signature} {each.constants} {each.divisible} {each.options} {each.chips}"
        found.setdefault(key, each)
    return list(found.values())


def selections() -> Iterator[Launch]:
    """Few scores and many; with and without eligible ones; wherever they begin."""
    from granet_kernels.triton_backend import selection, table, topk

    def select(n: int, begin: int, eligible: bool) -> None:
        scores = torch.zeros(n + begin)[begin:]
        flags = torch.ones(n, dtype=torch.bool) if eligible else None
        topk.topk_mask_triton([scores], torch.tensor([1]), torch.tensor([0, n]), flags, True)

    yield from recorded([selection], "small", lambda: select(1000, 0, False))
    yield from recorded([selection], "many", lambda: select(table.LARGE + 1, 0, False))
    yield from recorded([selection], "many, eligible", lambda: select(table.LARGE + 1, 0, True))
    yield from recorded([selection], "unaligned, eligible", lambda: select(1000, 1, True))


_CAPABILITIES = {"sm_70": (7, 0), "sm_80": (8, 0), "sm_90": (9, 0)}


def block_linear() -> Iterator[Launch]:
    """Every size of blocks and both precisions, cut as each chip has it."""
    for name, capability in _CAPABILITIES.items():
        with patch.object(chip, "capability", return_value=capability):
            half = torch.bfloat16 if capability >= (8, 0) else torch.float16
            for size in (128, 64, 32, 16):
                yield from (replace(launch, chips=(name,)) for launch in _blocks(size, half))
            yield from (replace(launch, chips=(name,)) for launch in _blocks(64, torch.float32))


def _blocks(size: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Forward and both gradients of a layer in which every other block is kept; of large blocks wgrad is split."""
    from granet_kernels.triton_backend import block_linear as launchers
    from granet_kernels.triton_backend.block_index import block_index

    blocks, n = torch.arange(4 if size == 128 else 32), 16384
    width = len(blocks) * size
    mask = ((blocks[:, None] + blocks) % 2 == 0).repeat_interleave(size, 0).repeat_interleave(size, 1)
    index = block_index(mask)
    assert index is not None
    x, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((n, width), (width, width), (width,)))
    case = f"{size}, {str(dtype).removeprefix('torch.')}"
    yield from recorded([launchers], f"forward {case}", lambda: launchers.block_linear(x, weight, index, bias))
    yield from recorded([launchers], f"dgrad {case}", lambda: launchers.block_linear_dgrad(x, weight, index))
    yield from recorded([launchers], f"wgrad {case}", lambda: launchers.block_linear_wgrad(x, x, mask, index))


def csr_linear() -> Iterator[Launch]:
    """A linear layer with an unstructured mask, on each chip with the tilings that it is given there.

    Each case runs with two masks of different density: if it appears twice, a change of the mask compiles anew.
    """
    from granet_kernels.triton_backend import csr_index, panels, sampled_wgrad
    from granet_kernels.triton_backend import csr_linear as launchers

    def run(n: int, size: int, dtype: torch.dtype) -> None:
        for kept in (1 / 64, 1 / 3):
            mask = torch.zeros(size, size, dtype=torch.bool)
            mask.view(-1)[: int(kept * mask.numel())] = True
            x, weight = torch.zeros(n, size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
            index = csr_index.csr_index(mask, 256 if size >= 1024 else None)
            launchers.csr_linear(x, weight, index, weight[0])
            launchers.csr_linear_dgrad(x, weight, index)
            launchers.csr_linear_wgrad(x, x, mask, index)
            sampled_wgrad.sampled_linear_wgrad(x, x, mask)

    modules = (csr_index, panels, launchers, sampled_wgrad)
    for dtype, size in ((torch.float32, 1024), (torch.bfloat16, 1024), (torch.float16, 63)):
        name = f"{str(dtype).removeprefix('torch.')}, {'even' if size % 16 == 0 else 'odd'}"
        for on in CHIPS if size % 16 == 0 else CHIPS[-1:]:
            with patch.object(chip, "capability", return_value=_CAPABILITIES[on]):
                found = recorded(modules, name, partial(run, size, size, dtype))
            yield from (replace(launch, chips=(on,)) for launch in found)


def events() -> Iterator[Launch]:
    """An update that prunes and exchanges, and one that only prunes, of a large network; an exchange of a small one.

    Of the last two, only the kernels that are not those of the selections."""
    from granet_kernels.triton_backend import event, selection, table

    def update(n: int, begin: int, keep: list[int] | None, ratio: float | None) -> None:
        values = [torch.zeros(n + begin)[begin:] for _ in range(3)]
        states = [values[2], values[0].bfloat16()]
        event.update_masks_triton(
            [torch.ones(n, dtype=torch.bool)],
            values[:1],
            values[1:2] if ratio is not None else [],
            *(states, [0, 0], [0.0, 0.0]),
            *(keep, ratio, True, [True], True),
        )

    def own(case: str, *arguments: Any) -> Iterator[Launch]:
        launches = recorded([event, selection], case, lambda: update(*arguments))
        return (each for each in launches if each.kernel.__name__ in vars(event))

    yield from recorded([event, selection], "many", lambda: update(table.LARGE + 16, 0, [1], 0.5))
    yield from own("many, prune", table.LARGE + 16, 0, [1], None)
    yield from own("unaligned, exchange", 1000, 1, None, 0.5)


SUITES: dict[str, Callable[[], Iterator[Launch]]] = {
    "selection": selections,
    "event": events,
    "block linear": block_linear,
    "csr linear": csr_linear,
}
