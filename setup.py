# SPDX-License-Identifier: Apache-2.0
"""Builds the extension module `_hift_ext`: setuptools asks, CMake and Ninja compile.

Neither torch nor a GPU is needed. CUDA code is built when nvcc is found; README.md lists the
environment variables.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;86;89;90"
INSTALL_NVCC = (
    "install it with `pip install nvidia-cuda-nvcc`, or install the CUDA toolkit and set CUDA_HOME "
    "to its folder"
)


def check_platform(platform: str) -> None:
    """Refuses platforms whose system calls (mmap, O_DIRECT) the extension does not have."""
    if not platform.startswith("linux"):
        raise SystemExit(
            f"hift_ext builds on Linux only, and this is {platform!r}; use a container or WSL 2"
        )


def switch(environ: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]) -> str:
    """The value of environment variable `name`, one of `choices`; `default` if unset or empty."""
    value = environ.get(name) or default
    if value not in choices:
        raise SystemExit(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def job_count(environ: Mapping[str, str]) -> int | None:
    """Compile jobs from MAX_JOBS, or None: CMAKE_BUILD_PARALLEL_LEVEL or Ninja decides."""
    value = environ.get("MAX_JOBS", "")
    if not value:
        return None
    if not value.isdigit() or int(value) == 0:
        raise SystemExit(f"MAX_JOBS must be a positive integer, not {value!r}")
    return int(value)


def parse_archs(text: str) -> list[str]:
    """CUDA architectures ("80", "90a") of a list with commas, semicolons or spaces, in order."""
    archs = list(dict.fromkeys(re.split(r"[\s,;]+", text.strip(" \t\n,;"))))
    bad = [arch for arch in archs if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch)]
    if bad:
        raise SystemExit(
            f"HIFT_CUDA_ARCHS holds {', '.join(map(repr, bad))}; write compute capabilities "
            f"without the dot, such as {DEFAULT_ARCHS!r}"
        )
    return archs


def site_folders(environ: Mapping[str, str]) -> list[Path]:
    """Site-packages of the installing environment: isolation hides them from import only."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefixes = [
        environ.get("VIRTUAL_ENV"),
        environ.get("CONDA_PREFIX"),
        sys.prefix,
        sys.base_prefix,
    ]
    folders = [Path(prefix, "lib", version, "site-packages") for prefix in prefixes if prefix]
    return [Path(sysconfig.get_path("purelib")), *folders, Path(site.getusersitepackages())]


def find_nvcc(environ: Mapping[str, str], toolkit: Path, sites: Iterable[Path]) -> Path | None:
    """The CUDA compiler: of CUDA_HOME, CUDA_PATH, PATH, `toolkit`, or pip's nvidia-cuda-nvcc."""
    homes = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    places = [home / "bin" / "nvcc" for home in homes]
    places += [Path(on_path)] if on_path else []
    places += [toolkit / "bin" / "nvcc"]
    for folder in sites:
        places += sorted(folder.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def choose_nvcc(environ: Mapping[str, str], toolkit: Path, sites: Iterable[Path]) -> Path | None:
    """The compiler to build CUDA code with, or None to leave CUDA out, as HIFT_CUDA says."""
    wanted = switch(environ, "HIFT_CUDA", "auto", ("auto", "0", "1"))
    nvcc = None if wanted == "0" else find_nvcc(environ, toolkit, sites)
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "HIFT_CUDA=1, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH, "
            f"{toolkit} or the Python environment: {INSTALL_NVCC}"
        )
    return nvcc


def build_tools(environ: Mapping[str, str]) -> tuple[Path, Path, Path]:
    """Paths of cmake, ninja and pybind11's CMake folder: the build requirements."""
    # PATH comes first, since pip puts its isolated environment there; then the scripts of a venv
    # that is not activated.
    path = os.pathsep.join([environ.get("PATH", ""), sysconfig.get_path("scripts")])
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    pybind11 = importlib.util.find_spec("pybind11")
    if cmake is None or ninja is None or pybind11 is None or pybind11.origin is None:
        raise SystemExit(
            "without build isolation, `pip install -U setuptools cmake ninja pybind11` first"
        )
    return Path(cmake), Path(ninja), Path(pybind11.origin).parent / "share" / "cmake" / "pybind11"


class CMakeBuild(build_ext):
    """Compiles csrc/ with CMake and Ninja instead of setuptools' own compiler calls."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds `ext`; the module lands where setuptools expects it."""
        check_platform(sys.platform)
        cmake, ninja, pybind11 = build_tools(os.environ)
        nvcc = choose_nvcc(os.environ, Path("/usr/local/cuda"), site_folders(os.environ))
        werror = switch(os.environ, "HIFT_WERROR", "0", ("0", "1"))
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            str(cmake),
            *("-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DHIFT_VERSION={self.distribution.get_version()}",
            f"-DHIFT_WERROR={werror}",
            f"-DHIFT_CUDA={int(nvcc is not None)}",
        ]
        if nvcc is None:
            print(
                f"hift_ext: building without CUDA; for the CUDA kernels {INSTALL_NVCC}", flush=True
            )
        else:
            archs = parse_archs(os.environ.get("HIFT_CUDA_ARCHS") or DEFAULT_ARCHS)
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DHIFT_CUDA_ARCHS={';'.join(archs)}"]
            print(f"hift_ext: building CUDA code for {', '.join(archs)} with {nvcc}", flush=True)
        self._configure(build, configure)
        jobs = job_count(os.environ)
        self._run([str(cmake), "--build", str(build), *(["--parallel", str(jobs)] if jobs else [])])

    def _configure(self, build: Path, command: list[str]) -> None:
        # A cache names the tools it was made with, and pip's isolated environments vanish: only a
        # cache made by this very command is reused. That is what makes rebuilding quick with
        # `pip install --no-build-isolation .`.
        names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
        made_by = json.dumps([command, {name: os.environ.get(name) for name in names}])
        stamp = build / "configured.json"
        if stamp.is_file() and stamp.read_text() == made_by:
            return
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        self._run(command)
        stamp.write_text(made_by)

    def _run(self, command: list[str]) -> None:
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            raise SystemExit(
                f"hift_ext: `{' '.join(command)}` failed with status {code}; the lines above say "
                "why. It needs a C++17 compiler (Debian: `apt-get install g++`); if nvcc failed, "
                "HIFT_CUDA=0 builds without it"
            )


if __name__ == "__main__":
    setup(ext_modules=[Extension("_hift_ext", sources=[])], cmdclass={"build_ext": CMakeBuild})
