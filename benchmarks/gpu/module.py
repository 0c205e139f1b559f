# SPDX-License-Identifier: Apache-2.0
# Gets a `_hift_ext` with CUDA kernels for this process and its children: an installed one, or one
# built from the sources here; for a dry run, one linked with the simulated runtime.
"""Finding or building the compiled module."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "gpu_check"
ASK_CARD = "import torch; print(*torch.cuda.get_device_capability(0), sep='')"
ASK = "import _hift_ext as e, json; print(json.dumps([e.build_info(), e.__file__]))"


def path_with(*folders: Path) -> str:
    """PYTHONPATH with these folders first."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([before] if before else [])])


def searched(folder: Path | None) -> list[Path]:
    """Where imports are looked for first."""
    return [*([folder] if folder else []), ROOT, ROOT / "benchmarks"]


def use(folder: Path | None) -> None:
    """Lets this process and its children import from here, and `_hift_ext` from `folder`."""
    folders = searched(folder)
    os.environ["PYTHONPATH"] = path_with(*folders)
    sys.path[:0] = map(str, folders)


def works(folder: Path | None) -> bool:
    """Whether a module with CUDA kernels is importable, asked in another process."""
    folders = searched(folder)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "PYTHONPATH": path_with(*folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0 and bool(json.loads(done.stdout)[0]["cuda_built"])


def capability() -> str:
    """The card's compute capability, as HIFT_CUDA_ARCHS has it, asked in another process.

    Raises:
        RuntimeError: torch sees no card.
    """
    done = subprocess.run(
        [sys.executable, "-c", ASK_CARD], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(f"torch sees no CUDA device ({why[0]}); --dry-run needs none")
    return done.stdout.strip()


def run(command: list[str], environ: Mapping[str, str], seconds: float) -> None:
    """Runs a build.

    Raises:
        RuntimeError: It failed; with the end of what it printed.
        subprocess.TimeoutExpired: It took longer than `seconds`, and was ended.
    """
    build = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its compilers can be ended with it
    )
    try:
        said, _ = build.communicate(timeout=seconds)
    except BaseException:
        os.killpg(build.pid, signal.SIGKILL)
        build.wait()
        raise
    if build.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {said[-1500:]}")


def get_real(seconds: float) -> str:
    """Finds the module, or builds it for this card alone; says which."""
    arch = capability()
    if works(None):
        use(None)
        return "installed"
    if not works(BUILT):
        archs = os.environ.get("HIFT_CUDA_ARCHS") or arch
        environ = {"HIFT_CUDA": "1", "HIFT_CUDA_ARCHS": archs}
        folders = [f"--build-lib={BUILT}", f"--build-temp={BUILT / 'temp'}"]
        run([sys.executable, "setup.py", "-q", "build_ext", *folders], environ, seconds)
    use(BUILT)
    return f"built in {BUILT.relative_to(ROOT)}"


def cuda_headers() -> Path:
    """The folder of cuda_runtime.h, beside the nvcc that the build would use.

    Raises:
        RuntimeError: There is none.
    """
    spec = importlib.util.spec_from_file_location("hift_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    toolkit = Path("/usr/local/cuda")
    nvcc = build.find_nvcc(os.environ, toolkit, build.site_folders(os.environ))
    # Some systems have a wrapper of nvcc on PATH, and the headers in the toolkit only.
    places = [*([nvcc.resolve().parents[1]] if nvcc else []), toolkit]
    for include in (place / "include" for place in places):
        if (include / "cuda_runtime.h").is_file():
            return include
    raise RuntimeError(f"a dry run needs CUDA's headers: {build.INSTALL_NVCC}")


def get_simulated(folder: Path, seconds: float) -> str:
    """Finds the module that is linked with the simulated runtime in `folder`, or builds it there.

    A module that is there is taken as it is, without a look at its age.
    """
    if next(folder.glob("_hift_ext*.so"), None) is None:
        import pybind11

        version = re.search(
            r'__version__ = "(.+)"', (ROOT / "hift_ext" / "_version.py").read_text()
        )
        assert version is not None
        # Beside the interpreter, if its environment is not activated.
        path = {"PATH": f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"}
        configure = [
            *("cmake", "-S", str(ROOT / "tests" / "cuda_sim"), "-B", str(folder), "-G", "Ninja"),
            f"-DCUDA_HEADERS={cuda_headers()}",
            f"-DHIFT_VERSION={version[1]}",
            "-DPYTHON_MODULE=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        run(configure, path, seconds)
        run(["cmake", "--build", str(folder), "--target", "_hift_ext"], path, seconds)
    use(folder)
    return "linked with the simulated runtime"
