"""Package metadata is in pyproject.toml; this file builds the native CPU library, which needs a C++17 compiler only.

Without one, or if it fails, the installation succeeds without the library: sparse layers then run on plain PyTorch.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

CSRC = "kernels/granet_kernels/cpu_backend/csrc"
FLAGS = ["-std=c++17", "-O3"]
FLAGS_IF_ACCEPTED = [
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-maybe-uninitialized",  # GCC's own AVX-512 header sets these two off
    "-Wno-uninitialized",
]

# Another compiler's OpenMP code calls another runtime than the GNU one that torch has on Linux.
OPENMP_PROGRAM = """
#include <omp.h>
#if !defined(__linux__) || defined(__clang__)
#error "this compiler does not use the OpenMP runtime of torch"
#endif
int threads() {
    int n = 0;
#pragma omp parallel reduction(+ : n)
    n += omp_get_num_threads();
    return n;
}
"""


class BuildNative(build_ext):
    """Compiles the sources side by side, with the flags that this compiler accepts."""

    def build_extension(self, extension):
        compile_all = self.compiler.compile

        def compile_in_parallel(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in objects for path in paths]

        try:
            extension.extra_compile_args = self._flags()
            self.compiler.compile = compile_in_parallel
            super().build_extension(extension)
        except (BaseError, CCompilerError) as error:
            for path in self._libraries(extension.name):
                path.unlink(missing_ok=True)  # of an earlier build: not of this code
            self.warn(f"granet is built without its native CPU library, sparse layers run at dense cost: {error}")
            raise  # setuptools goes on, the extension is optional
        finally:
            self.compiler.compile = compile_all

    def _libraries(self, name):
        """Where the library is built, and where an editable install runs it."""
        built = Path(self.get_ext_fullpath(name))
        return [built, Path("kernels", self.get_ext_filename(name))] if self.editable_mode else [built]

    def _flags(self):
        """What to compile with. No flag reaches the linker: the library is to find torch's OpenMP runtime, not its own.

        See granet_kernels/cpu_backend/library.py.
        """
        self._compile("int one() { return 1; }", FLAGS)
        flags = FLAGS + [flag for flag in FLAGS_IF_ACCEPTED if self._compiles("int one() { return 1; }", [flag])]
        if self._compiles(OPENMP_PROGRAM, ["-fopenmp"]):
            return [*flags, "-fopenmp"]
        self.warn("the compiler has no GNU OpenMP: granet's native CPU library will use one thread")
        return flags

    def _compiles(self, program, flags):
        try:
            self._compile(program, flags)
        except (BaseError, CCompilerError):
            return False
        return True

    def _compile(self, program, flags):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(program)
            self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)


native = Extension(
    "granet_kernels.cpu_backend._native",
    sources=sorted(glob(f"{CSRC}/*.cpp")),
    depends=[*sorted(glob(f"{CSRC}/*.h") + glob(f"{CSRC}/*.inl")), "setup.py"],
    language="c++",
    optional=True,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
