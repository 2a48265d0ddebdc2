"""Time the sparse linear kernels on a GPU, each direction beside its dense peers, and beside what the chip allows.

Peers, named in the CSV: torch's dense product in float32 (IEEE), in TF32 and in bfloat16 (cuBLAS), the sparse CSR
products of torch (cuSPARSE) in the layout that suits them best, and torch's own block-sparse (BSR) product. Every
result is checked against float64 before it is timed. bench.roofline says how the floor is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu, plots
from bench.records import TIMES, Row, append, markdown, percent
from bench.roofline import Chip, Product, floor
from bench.timing import Budget, Timing
from bench.verify import check_close, check_zero_off
from granet_kernels.triton_backend import tilings
from granet_kernels.triton_backend.block_index import block_index
from granet_kernels.triton_backend.block_linear import block_linear, block_linear_dgrad, block_linear_wgrad
from granet_kernels.triton_backend.block_tilings import matmul_tilings, wgrad_tilings
from granet_kernels.triton_backend.chip import capability
from granet_kernels.triton_backend.csr_index import csr_index
from granet_kernels.triton_backend.csr_linear import csr_linear, csr_linear_dgrad, csr_linear_wgrad
from granet_kernels.triton_backend.sampled_wgrad import sampled_linear_wgrad

DIRECTIONS = ("forward", "dgrad", "wgrad")
COLUMNS = (
    *("n", "inputs", "outputs", "dtype", "granularity", "sparsity", "direction", "implementation", *TIMES),
    *("flops", "bytes", "gathered", "bound", "floor_ms", "of_floor", "peer", "over_peer"),
    *gpu.MACHINE,
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One layer to measure: a square weight of `size`, on as many examples, and which of it is kept."""

    size: int
    dtype: torch.dtype
    block: int
    sparsity: float

    @property
    def granularity(self) -> str:
        return "unstructured" if self.block == 1 else f"block {self.block}"

    @property
    def product(self) -> Product:
        name = str(self.dtype).removeprefix("torch.")
        return Product(self.size, self.size, self.size, 1 - self.sparsity, self.block, name)


_FULL = 4096
CASES = (
    *(Case(_FULL, torch.bfloat16, block, s) for block in (128, 64, 32) for s in (0.9, 0.95)),
    *(Case(_FULL, torch.float32, 1, s) for s in (0.9, 0.95, 0.98)),
    *(Case(_FULL, torch.bfloat16, 1, s) for s in (0.98, 0.99, 0.9)),
    Case(_FULL, torch.bfloat16, 16, 0.95),
)
TILED_CASES = (
    *(Case(_FULL, torch.bfloat16, block, 0.9) for block in (128, 64, 32)),
    Case(_FULL, torch.float32, 1, 0.95),
    Case(_FULL, torch.bfloat16, 1, 0.98),
)
DRY_CASES = (Case(64, torch.float32, 32, 0.5), Case(32, torch.float32, 1, 0.9))


def main(argv: Sequence[str] | None = None) -> int:
    options = gpu.parser(__doc__, "linear_gpu")
    options.add_argument("--tilings", action="store_true", help="time all tilings of the kernels, at one sparsity each")
    args = options.parse_args(argv)
    try:
        on = gpu.device(args.dry)
    except ValueError as error:
        options.error(str(error))
    about = gpu.described(on)
    chip = gpu.chip(on, args.dry)
    print(f"{about['gpu']}, driver {about['driver']}: {chip}")
    cases = DRY_CASES if args.dry else TILED_CASES if args.tilings else CASES
    budget = Budget(args.seconds, len(cases) * len(DIRECTIONS))
    rows: list[Row] = []
    for case in cases:
        layer = Layer(case, on)
        for direction in DIRECTIONS:
            runs = tiled_runs(layer, direction) if args.tilings else all_runs(layer, direction)
            found = measure(layer, direction, runs, 2 if args.dry else 50, budget.share(), chip)
            append(args.csv, COLUMNS, [{**row, **about} for row in found])
            rows += found
            print(progress(found), flush=True)
    print(summary(rows))
    if not args.dry and not args.tilings:
        plots.save_speedups(
            curves(rows), args.csv.with_suffix(".png"), f"Linear {_FULL}x{_FULL}x{_FULL}, {about['gpu']}"
        )
    return 0


class Layer:
    """The operands of a case, its implementations, and the exact results in float64."""

    def __init__(self, case: Case, on: torch.device) -> None:
        generator = torch.Generator(on).manual_seed(0)
        draw = partial(torch.randn, case.size, case.size, generator=generator, device=on)
        self.case, self.on = case, on
        self.x, self.grad, self.weight = (draw().to(case.dtype) for _ in range(3))
        units = case.size // case.block
        kept = torch.zeros(units * units, dtype=torch.bool, device=on)
        kept[
            torch.randperm(units * units, generator=generator, device=on)[: round((1 - case.sparsity) * len(kept))]
        ] = True
        mask = kept.view(units, units).repeat_interleave(case.block, 0).repeat_interleave(case.block, 1)
        self.mask = mask.contiguous()
        self.weight.mul_(self.mask)

    def exact(self, direction: str) -> Tensor:
        """The result in float64."""
        x, grad, weight = (each.double() for each in (self.x, self.grad, self.weight))
        if direction == "forward":
            return x @ weight.t()
        return grad @ weight if direction == "dgrad" else torch.where(self.mask, grad.t() @ x, 0)

    def granet(self, direction: str) -> Run:
        x, grad, weight, mask = self.x, self.grad, self.weight, self.mask
        if self.case.block > 1:
            index = block_index(mask)
            assert index is not None
            return {
                "forward": lambda: block_linear(x, weight, index, None),
                "dgrad": lambda: block_linear_dgrad(grad, weight, index),
                "wgrad": lambda: block_linear_wgrad(grad, x, mask, index),
            }[direction]
        rows = csr_index(mask)
        return {
            "forward": lambda: csr_linear(x, weight, rows, None),
            "dgrad": lambda: csr_linear_dgrad(grad, weight, rows),
            "wgrad": lambda: csr_linear_wgrad(grad, x, mask, rows),
        }[direction]

    def dense(self, direction: str) -> Run:
        x, grad, weight = self.x, self.grad, self.weight
        return {
            "forward": lambda: F.linear(x, weight),
            "dgrad": lambda: grad @ weight,
            "wgrad": lambda: grad.t() @ x,
        }[direction]

    def cusparse(self, direction: str) -> Run:
        """Transposed operands and indices lie ready; for wgrad the product is sampled at the kept positions."""
        if direction == "wgrad":
            pattern = self.mask.to(self.case.dtype).to_sparse_csr()
            left, right = self.grad.t().contiguous(), self.x.contiguous()
            return lambda: torch.sparse.sampled_addmm(pattern, left, right, beta=0)
        weight = self.weight if direction == "forward" else self.weight.t()
        csr = weight.contiguous().to_sparse_csr()
        right = (self.x if direction == "forward" else self.grad).t().contiguous()
        return lambda: csr @ right

    def bsr(self) -> Run:
        weight = self.weight.to_sparse_bsr((self.case.block, self.case.block))
        return lambda: F.linear(self.x, weight)


def all_runs(layer: Layer, direction: str) -> dict[str, Run]:
    """granet, alone and as one graph, and its peers."""
    case = layer.case
    runs: dict[str, Run] = {"granet": layer.granet(direction), "granet, one graph": layer.granet(direction)}
    runs[_dense_name(case.dtype)] = layer.dense(direction)
    if case.dtype == torch.float32:
        runs["dense tf32"] = _with_tf32(layer.dense(direction))
    if case.block == 1 and case.dtype == torch.float32:
        _add_if_it_runs(runs, "csr", lambda: layer.cusparse(direction))
    elif case.block > 1 and direction == "forward" and layer.on.type == "cuda":
        _add_if_it_runs(runs, "torch bsr", layer.bsr)
    if case.block == 1 and direction == "wgrad":
        runs["granet, dense tiles"] = partial(sampled_linear_wgrad, layer.grad, layer.x, layer.mask)
    return runs


def _add_if_it_runs(runs: dict[str, Run], name: str, make: Callable[[], Run]) -> None:
    """A rival may not take every size of blocks; that is said, and is no reason to measure nothing else."""
    try:
        run = make()
        run()
    except Exception as error:
        print(f"{name}: left out, it raises {type(error).__name__}: {error}")
    else:
        runs[name] = run


def tiled_runs(layer: Layer, direction: str) -> dict[str, Run]:
    """granet by each of its tilings, and the dense peer."""
    x, grad, weight, mask = layer.x, layer.grad, layer.weight, layer.mask
    runs: dict[str, Run] = {_dense_name(layer.case.dtype): layer.dense(direction)}
    index = block_index(mask)
    if index is not None:
        choices = (wgrad_tilings if direction == "wgrad" else matmul_tilings)(index.size, x, "ieee")
        for each in choices:
            runs[f"granet, {each}"] = {
                "forward": partial(block_linear, x, weight, index, None, each),
                "dgrad": partial(block_linear_dgrad, grad, weight, index, each),
                "wgrad": partial(block_linear_wgrad, grad, x, mask, index, each),
            }[direction]
        return runs
    rows, on = csr_index(mask), capability(x.device)
    for tiling in tilings.wgrad_tilings(x.dtype, on) if direction == "wgrad" else tilings.product_tilings(x.dtype, on):
        runs[f"granet, {tiling}"] = {
            "forward": partial(csr_linear, x, weight, rows, None, tiling),
            "dgrad": partial(csr_linear_dgrad, grad, weight, rows, tiling),
            "wgrad": partial(csr_linear_wgrad, grad, x, mask, rows, tiling),
        }[direction]
    for tile in tilings.sampled_tilings(x.dtype, on, True) if direction == "wgrad" else ():
        runs[f"granet, {tile}"] = partial(sampled_linear_wgrad, grad, x, mask, tile)
    return runs


def measure(layer: Layer, direction: str, runs: dict[str, Run], rounds: int, seconds: float, chip: Chip) -> list[Row]:
    """Rows of some implementations of one direction, checked first."""
    exact = layer.exact(direction)
    for name in list(runs):
        check(name, runs[name](), layer, direction, exact)
    del exact
    if "granet, one graph" in runs:
        runs["granet, one graph"] = gpu.captured(runs["granet"], layer.on)
    times = gpu.alternate(runs, layer.on, rounds, seconds)
    return [_row(name, timing, layer.case, direction, times, chip) for name, timing in times.items()]


def check(name: str, got: Tensor, layer: Layer, direction: str, exact: Tensor) -> None:
    """Raise WrongResultError unless a result is right within its precision."""
    what = f"{name} {direction}, {layer.case}"
    tolerance = TOLERANCES[layer.case.dtype] if "tf32" not in name else TOLERANCES[torch.bfloat16]
    if got.layout != torch.strided:
        got = got.to_dense()
    if name == "csr" and direction != "wgrad":
        got = got.t()
    if direction == "wgrad":
        if name.startswith("granet"):
            check_zero_off(what, got, layer.mask)
        got = torch.where(layer.mask, got, 0)
    check_close(what, got, exact, tolerance)


def _dense_name(dtype: torch.dtype) -> str:
    return "dense float32 (IEEE)" if dtype == torch.float32 else f"dense {str(dtype).removeprefix('torch.')}"


def _with_tf32(run: Run) -> Run:
    def computed() -> Tensor:
        with _tf32():
            return run()

    return computed


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _row(name: str, timing: Timing, case: Case, direction: str, times: dict[str, Timing], chip: Chip) -> Row:
    product = case.product
    if not name.startswith("granet"):
        dtype = "tf32" if name == "dense tf32" else product.dtype
        product = replace(product, kept=1.0 if name.startswith("dense") else product.kept, dtype=dtype)
    bound, least = floor(product, chip)
    peer = _dense_name(case.dtype)
    return {
        "n": case.size,
        "inputs": case.size,
        "outputs": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "granularity": case.granularity,
        "sparsity": case.sparsity,
        "direction": direction,
        "implementation": name,
        **timing.columns(),
        "flops": product.flops,
        "bytes": product.bytes,
        "gathered": product.gathered,
        "bound": bound,
        "floor_ms": 1000 * least,
        "of_floor": timing.median / least,
        "peer": peer,
        "over_peer": times[peer].median / timing.median,
    }


def progress(rows: Sequence[Row]) -> str:
    """One line on a direction just measured."""
    first = rows[0]
    times = ", ".join(f"{row['implementation']} {row['ms_median']:.3f} ms ({row['over_peer']:.2f}x)" for row in rows)
    return f"{first['dtype']} {first['granularity']} {percent(first['sparsity'])} {first['direction']}: {times}"


def summary(rows: Sequence[Row]) -> str:
    """Markdown: granet and its sparse rivals, one line a case, the directions in columns, as times the dense peer."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if not row["implementation"].startswith("dense"):
            key = (row["implementation"], row["granularity"], percent(row["sparsity"]), row["peer"])
            lines.setdefault(key, {})[row["direction"]] = f"{row['over_peer']:.2f}x ({row['of_floor']:.1f})"
    header = ["times the dense speed (times the floor)", "granularity", "sparsity", "dense peer", *DIRECTIONS]
    return markdown(header, [[*key, *(found.get(each, "") for each in DIRECTIONS)] for key, found in lines.items()])


def curves(rows: Sequence[Row]) -> plots.Curves:
    """Speed-up over the dense peer by sparsity: one panel a direction, one line a dtype and granularity."""
    found: plots.Curves = {}
    for row in rows:
        if row["implementation"] == "granet":
            line = f"{row['granularity']}, {row['dtype']}"
            found.setdefault(row["direction"], {}).setdefault(line, {})[row["sparsity"]] = row["over_peer"]
    return found


if __name__ == "__main__":
    sys.exit(main())
