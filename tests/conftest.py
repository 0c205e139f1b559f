# SPDX-License-Identifier: Apache-2.0
# What every test shares: hypothesis' profiles, and the one function that skips, with its reasons.
# A test that needs something says `@pytest.mark.needs("avx512")`; what can be needed is in SKIPS.

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import _hift_ext
import filelock
import hypothesis
import pytest
import torch
from filesystems import can_mount, mounted

from hift_ext import __version__, ops

# Every run tries the same; `--hypothesis-profile=wide` looks further, and elsewhere each time.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.register_profile("wide", deadline=None, max_examples=200)
hypothesis.settings.load_profile("same")

MOST_WORKERS = 8  # each holds torch and compiles: a large machine has cores, not the memory
# Their module's fixtures take seconds to make: one worker runs them all. Not `--dist loadgroup`,
# which groups nothing under pytest 9.2 (pytest-xdist issue 1386).
TOGETHER = {
    "test_gpu_check",
    "test_machine_code",
    "test_reflink",
    "test_reflink_faults",
    "test_state_dict",
    "test_triton_compile",
}


def _flushes() -> bool:
    try:
        return torch.set_flush_denormal(True)
    finally:
        torch.set_flush_denormal(False)


def _nvcc() -> Path | None:
    """nvcc, where the build would find it."""
    path = Path(__file__).resolve().parents[1] / "setup.py"
    spec = importlib.util.spec_from_file_location("hift_setup", path)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    found: Path | None = build.find_nvcc(
        os.environ, Path("/usr/local/cuda"), build.site_folders(os.environ)
    )
    return found


def _has_triton() -> bool:
    try:
        return tuple(map(int, version("triton").split(".")[:2])) >= (3, 6)
    except PackageNotFoundError:
        return False


def cuda_include() -> Path | None:
    """The folder of cuda_runtime.h: beside nvcc, or where a toolkit usually is."""
    nvcc = _nvcc()
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    if nvcc is not None:
        homes.insert(0, nvcc.resolve().parents[1])
    folders = (home / "include" for home in homes)
    return next((f for f in folders if (f / "cuda_runtime.h").is_file()), None)


SKIPS: dict[str, tuple[int, str, Callable[[], bool]]] = {
    "avx2": (
        1,
        "this processor has no AVX2 with FMA",
        lambda: "avx2" in ops.build_info()["isas"],
    ),
    "avx512": (
        2,
        "this processor has no AVX-512 (F, BW, DQ, VL)",
        lambda: "avx512" in ops.build_info()["isas"],
    ),
    "grad_dtype": (
        3,
        "this torch has no Tensor.grad_dtype: a 16-bit parameter cannot have a float32 gradient",
        lambda: hasattr(torch.Tensor, "grad_dtype"),
    ),
    "torch_fma": (
        4,
        "torch's CPU kernels are not known to fuse multiply and add here, so their bits differ",
        lambda: torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
    ),
    "flush_denormal": (
        5,
        "torch.set_flush_denormal is not supported on this processor",
        _flushes,
    ),
    "proc": (
        6,
        "no /proc: the names of the process's threads cannot be read",
        Path("/proc/self/task").is_dir,
    ),
    "nvcc": (
        8,
        "no nvcc: CUDA code cannot be compiled here",
        lambda: _nvcc() is not None,
    ),
    "cuda_headers": (
        9,
        "no headers of CUDA's runtime: nothing can be built against the simulated one",
        lambda: cuda_include() is not None,
    ),
    "triton": (
        10,
        "Triton 3.6 or later is not installed",
        _has_triton,
    ),
    "triton_compiler": (
        11,
        "TRITON_INTERPRET=1 has replaced Triton's compiler",
        lambda: os.environ.get("TRITON_INTERPRET") != "1",
    ),
    "exchange": (
        7,
        "this torch has no C exchange of tensors: each is looked at from Python",
        lambda: hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    ),
    "reflink": (
        12,
        "no XFS of its own can be mounted (by root, with loop devices and xfsprogs)",
        lambda: can_mount("xfs"),
    ),
    "btrfs": (
        13,
        "no Btrfs of its own can be mounted (by root, with loop devices and btrfs-progs)",
        lambda: can_mount("btrfs"),
    ),
    "ext4": (
        14,
        "no ext4 of its own can be mounted (by root, with loop devices)",
        lambda: can_mount("ext4"),
    ),
    "tmpfs": (
        15,
        "no file system in memory at /dev/shm",
        Path("/dev/shm").is_dir,
    ),
    "decoupled_adam": (
        16,
        "this torch's Adam knows no decoupled_weight_decay",
        lambda: "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters,
    ),
    "fsdp2_on_cpu": (
        17,
        "this torch's fully_shard asks a CPU's stream for events, which it has not",
        lambda: hasattr(torch.cpu.Stream, "record_event"),
    ),
    "compile": (
        18,
        "torch before 2.7 compiles nothing anew when requires_grad has changed",
        lambda: tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7),
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"needs(what, ...): skips, for a numbered reason, without {', '.join(SKIPS)}"
    )
    # Fixtures of modules run before `one_thread`; torch's bits depend on its number of threads.
    torch.set_num_threads(1)
    if hasattr(config, "workerinput"):
        # Beside other workers: the programs that tests start are not to take every core each.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, but one for a run of named files or tests: it starts at once."""
    if any(".py" in str(arg) for arg in config.args):
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hands out tests one by one, and the modules in TOGETHER whole."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            return module if Path(module).stem in TOGETHER else nodeid

    return Scheduler(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose needs are not met."""
    for mark in item.iter_markers("needs"):
        for need in mark.args:
            number, reason, met = SKIPS[need]
            if not met():
                pytest.skip(f"reason {number}: {reason}")


@pytest.fixture(
    params=[
        "baseline",
        pytest.param("avx2", marks=pytest.mark.needs("avx2")),
        pytest.param("avx512", marks=pytest.mark.needs("avx512")),
    ]
)
def isa(request):
    """Each instruction set in turn."""
    before = ops.build_info()["isa"]
    _hift_ext.use_instruction_set(request.param)
    assert ops.build_info()["isa"] == request.param
    yield request.param
    _hift_ext.use_instruction_set(before)


@pytest.fixture(scope="session")
def cuda_sim(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The programs of tests/cuda_sim, and `_hift_ext` on the simulated CUDA runtime.

    Built once a run: the first worker that asks builds, others wait for it.
    """
    run = tmp_path_factory.getbasetemp()
    folder = (run if worker_id == "master" else run.parent) / "cuda_sim"
    built = folder / "built"
    with filelock.FileLock(f"{folder}.lock"):
        if not built.is_file():
            _build_cuda_sim(folder)
            built.touch()
    return folder


def _build_cuda_sim(folder: Path) -> None:
    import pybind11

    settings = {
        "CUDA_HEADERS": cuda_include(),
        "HIFT_VERSION": __version__,
        "PYTHON_MODULE": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_CXX_FLAGS": "-Werror",
    }
    source = Path(__file__).resolve().parent / "cuda_sim"
    configure = ["cmake", "-S", str(source), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("xfs", marks=pytest.mark.needs("reflink")),
        pytest.param("btrfs", marks=pytest.mark.needs("btrfs")),
    ],
)
def reflinks(request, tmp_path_factory):
    """A file system that shares blocks."""
    with mounted(request.param, tmp_path_factory.mktemp("disk")) as place:
        yield place


@pytest.fixture
def disk(reflinks, monkeypatch, caplog):
    """An empty folder there, where unlinked page files are put, too."""
    folder = reflinks / "test"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    caplog.set_level(logging.INFO, "hift_ext")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def one_thread():
    """torch's loops over few elements would mostly wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
