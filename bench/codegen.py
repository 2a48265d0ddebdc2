"""Compile every Triton kernel as its launcher calls it, for chips that need not be here: registers, spills, loads.

The launchers run on tensors in CPU memory, and their launches are recorded instead of made. So what is compiled is what
is shipped.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.codegen_cases import SUITES, Launch, distinct
from bench.records import RESULTS, Row, markdown
from granet.files import write_text_atomically

CHIPS = {"sm_70": 96 * 1024, "sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a program may have."""

COLUMNS = (
    *("kernel", "case", "chip", "warps", "stages", "registers", "local_bytes", "shared_bytes", "shared_limit"),
    *("loads_128", "loads_64", "loads_32", "loads_narrow", "stores_128", "hmma", "hgmma", "ffma", "instructions"),
    "triton",
)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__, allow_abbrev=False)
    options.add_argument("--csv", type=Path, default=RESULTS / "codegen.csv", metavar="FILE", help="written anew")
    options.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    options.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    args = options.parse_args(argv)
    try:
        check_triton()
    except ValueError as error:
        options.error(str(error))
    os.environ["TRITON_INTERPRET"] = "0"
    launches = distinct(launch for suite in args.suite for launch in SUITES[suite]())
    rows = compiled_rows([(launch, chip) for launch in launches for chip in args.chip if chip in launch.chips])
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(args.csv, table.getvalue())
    print(summary(rows))
    return 0


def check_triton() -> None:
    """Raise ValueError if Triton is older than the interface by which this compiles."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        raise ValueError(f"expected Triton 3.3 or newer, got {triton.__version__}")


def compiled_rows(cases: Sequence[tuple[Launch, str]]) -> list[Row]:
    """`row_of` of each case, by as many processes as there are cores: forked ones, so cases need no pickling."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork"), _take, (cases,)) as pool:
        return list(pool.map(_row, range(len(cases))))


_taken: Sequence[tuple[Launch, str]] = ()


def _take(cases: Sequence[tuple[Launch, str]]) -> None:
    global _taken
    _taken = cases


def _row(number: int) -> Row:
    return row_of(*_taken[number])


def row_of(launch: Launch, chip: str) -> Row:
    """Compile for a chip, and read the machine code."""
    import triton

    compiled = _compile(launch, chip)
    with _file(compiled.asm["cubin"]) as cubin:
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": launch.kernel.__name__,
        "case": launch.case,
        "chip": chip,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "registers": found["REG"],
        "local_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": CHIPS[chip],
        "loads_128": _count(r"LDG\.E[.\w]*\.128|LDGSTS[.\w]*\.128|UTMALDG", sass),
        "loads_64": _count(r"LDG\.E[.\w]*\.64|LDGSTS[.\w]*\.64", sass),
        "loads_32": _count(r"LDG\.E(?![.\w]*\.(128|64|U8|S8|U16|S16))", sass),
        "loads_narrow": _count(r"LDG\.E[.\w]*\.(U8|S8|U16|S16)", sass),
        "stores_128": _count(r"STG\.E[.\w]*\.128", sass),
        "hmma": _count(r"\bHMMA", sass),
        "hgmma": _count(r"\bHGMMA", sass),
        "ffma": _count(r"\bFFMA", sass),
        "instructions": _count(r"^\s*/\*[0-9a-f]{4,}\*/", sass),
        "triton": triton.__version__,
    }


def _compile(launch: Launch, chip: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=launch.options)


@contextmanager
def _file(data: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(data)
        yield str(path)


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that come with triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def _count(pattern: str, text: str) -> int:
    return sum(1 for _ in re.finditer(pattern, text, re.MULTILINE))


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a kernel, case and chip."""
    header = ["kernel", "case", "chip", "warps", "registers", "local", "shared", "128-bit loads", "HMMA", "HGMMA"]
    names = ("warps", "registers", "local_bytes", "shared_bytes", "loads_128", "hmma", "hgmma")
    return markdown(
        header, [[row["kernel"], row["case"], row["chip"], *(str(row[name]) for name in names)] for row in rows]
    )


if __name__ == "__main__":
    sys.exit(main())
