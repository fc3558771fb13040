"""Build the compiled extension, and install `benchmarks/` as `cliperase_fast.benchmarks`. Metadata: pyproject.toml.

The extension is built with CMake where there is a C++17 compiler, and it is optional: where it cannot be built the
install goes on, and `cliperase_fast.backends()` says why. In the environment:

    CLIPERASE_EXTENSION=0    do not build it; 1: fail when it cannot be built
    CLIPERASE_CUDA=OFF       without the CUDA kernels, though there is an nvcc; ON: fail without one
    CMAKE_ARGS               more arguments for CMake
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "cliperase_fast"
NAME = f"{PACKAGE}._C"
BENCHMARKS = f"{PACKAGE}.benchmarks"
REASON_FILE = "_C_missing.txt"  # read by cliperase_fast/ops/native/extension.py
# What a build leaves in the package: the module under each name that this Python would import, or the reason.
BUILT = (*(f"_C{suffix}" for suffix in EXTENSION_SUFFIXES), REASON_FILE)


class BuildError(Exception):
    """Why the extension could not be built, in a sentence."""


class CMakeBuild(build_ext):
    """Hands the whole build to CMake."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("CLIPERASE_EXTENSION", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"CLIPERASE_EXTENSION={wanted} must be 0 (not built) or 1 (fails if it cannot be built)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_built(target.parent)
        reason = target.parent / REASON_FILE
        if wanted == "0":
            reason.write_text("CLIPERASE_EXTENSION=0 at install; unset it and install again\n", encoding="utf-8")
            return
        try:
            self._build(target)
        except BuildError as error:
            if wanted == "1":
                raise SystemExit(f"CLIPERASE_EXTENSION=1, but {error}") from error
            reason.write_text(f"{error}, then install cliperase_fast again\n", encoding="utf-8")
            self.warn(f"cliperase_fast is installed without its compiled extension: {error}")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the extension, or the reason it is missing, in place of an earlier build's."""
        package = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        _remove_built(package)
        for path in (Path(self.build_lib) / PACKAGE / name for name in BUILT):
            if path.exists():
                shutil.copy2(path, package)

    def _build(self, target: Path) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise BuildError("there is no C++ compiler: apt install g++ (or your system's)")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise BuildError("there is no cmake: pip install cmake")
        folder = Path(self.build_temp).resolve() / "cmake"
        # CMake remembers the folder, the compiler and pip's temporary environment of an earlier build.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        configure = [
            cmake, "-S", str(Path(__file__).resolve().parent), "-B", str(folder),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCLIPERASE_CUDA={os.environ.get('CLIPERASE_CUDA', 'AUTO')}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self._run(configure, "cmake could not set the build up (is the compiler one for C++17?)")
        self._run([cmake, "--build", str(folder), "--target", "_C", "--parallel"], "the extension did not compile")
        (built,) = folder.glob(f"_C*{target.suffix}")
        shutil.copy2(built, target)

    def _run(self, command: list[str], failure: str) -> None:
        self.announce(shlex.join(command), level=2)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(done.stdout, flush=True)
        if done.returncode != 0:
            errors = [line.strip() for line in done.stdout.splitlines() if "rror" in line]
            raise BuildError(f"{failure}: {errors[0]}" if errors else failure)


def _remove_built(package: Path) -> None:
    """Another Python's module stays: it may share this checkout."""
    for name in BUILT:
        (package / name).unlink(missing_ok=True)


# A wheel takes all of build/lib*: nothing of an earlier build may be in it.
for earlier in (Path(__file__).resolve().parent / "build").glob("lib*"):
    shutil.rmtree(earlier)

setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), BENCHMARKS],
    package_dir={BENCHMARKS: "benchmarks"},
    ext_modules=[Extension(NAME, sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
