# SPDX-License-Identifier: Apache-2.0
"""The build: what setup.py decides, what the source distribution carries, what the extension needs.

The decisions are called with invented environments; the extension is the one installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import hift_ext

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hift_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library() -> Path:
    spec = importlib.util.find_spec("_hift_ext")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def make_nvcc(home: Path, mode: int = 0o755) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(mode)
    return nvcc


@pytest.mark.parametrize(
    "text", ["80;86;90a", "80,86,90a", "80 86  90a", " 80, 86; 90a,", "80 86 80 90a"]
)
def test_architectures(build: ModuleType, text: str) -> None:
    assert build.parse_archs(text) == ["80", "86", "90a"]


@pytest.mark.parametrize("text", ["8.6", "sm_86", "80;native", "8", "8600", ";", "80-real", "86x"])
def test_bad_architectures_are_refused(build: ModuleType, text: str) -> None:
    with pytest.raises(SystemExit, match="HIFT_CUDA_ARCHS"):
        build.parse_archs(text)


def test_the_default_architectures_are_valid(build: ModuleType) -> None:
    assert build.parse_archs(build.DEFAULT_ARCHS) == ["80", "86", "89", "90"]


def test_nvcc_is_found_in_the_documented_order(build: ModuleType, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    toolkit = tmp_path / "toolkit"
    environ: dict[str, str] = {}
    assert build.choose_nvcc(environ, toolkit, [site]) is None
    older, newer = (make_nvcc(site / "nvidia" / name) for name in ("cu13", "cu14"))
    assert build.choose_nvcc(environ, toolkit, [site]) == newer
    newer.chmod(0o644)
    assert build.choose_nvcc(environ, toolkit, [site]) == older
    for place, name in (
        (toolkit, None),
        (tmp_path / "path", "PATH"),
        (tmp_path / "b", "CUDA_PATH"),
        (tmp_path / "a", "CUDA_HOME"),
    ):
        found = make_nvcc(place)
        if name is not None:
            environ[name] = str(found.parent if name == "PATH" else place)
        assert build.choose_nvcc(environ, toolkit, [site]) == found
    environ["CUDA_HOME"] = str(tmp_path / "nowhere")
    assert build.choose_nvcc(environ, toolkit, [site]) == tmp_path / "b" / "bin" / "nvcc"


def test_cuda_can_be_left_out_or_demanded(build: ModuleType, tmp_path: Path) -> None:
    nvcc = make_nvcc(tmp_path / "cuda")
    environ = {"CUDA_HOME": str(tmp_path / "cuda"), "HIFT_CUDA": "0"}
    assert build.choose_nvcc(environ, tmp_path, []) is None
    assert build.choose_nvcc({**environ, "HIFT_CUDA": "1"}, tmp_path, []) == nvcc
    with pytest.raises(SystemExit, match=r"HIFT_CUDA=1.*pip install nvidia-cuda-nvcc.*CUDA_HOME"):
        build.choose_nvcc({"HIFT_CUDA": "1"}, tmp_path, [tmp_path])
    with pytest.raises(SystemExit, match=r"HIFT_CUDA must be one of auto, 0, 1, not 'yes'"):
        build.choose_nvcc({"HIFT_CUDA": "yes"}, tmp_path, [])


def test_the_installing_environment_is_searched(build: ModuleType, tmp_path: Path) -> None:
    folders = build.site_folders({"VIRTUAL_ENV": str(tmp_path)})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert tmp_path / "lib" / version / "site-packages" in folders
    assert Path(sys.base_prefix, "lib", version, "site-packages") in folders


def test_jobs(build: ModuleType) -> None:
    assert build.job_count({}) is None
    assert build.job_count({"MAX_JOBS": "3"}) == 3
    for bad in ("0", "-1", "many"):
        with pytest.raises(SystemExit, match="MAX_JOBS"):
            build.job_count({"MAX_JOBS": bad})


def test_other_platforms_are_refused_with_advice(build: ModuleType) -> None:
    build.check_platform("linux")
    with pytest.raises(SystemExit, match=r"Linux only.*'darwin'.*container"):
        build.check_platform("darwin")


def test_missing_build_tools_are_named(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="pip install -U setuptools cmake ninja pybind11"):
        build.build_tools({"PATH": str(tmp_path)})


def test_a_cache_of_other_tools_is_not_reused(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    command = build.CMakeBuild.__new__(build.CMakeBuild)
    monkeypatch.setattr(command, "_run", ran.append)
    folder = tmp_path / "build"

    def configure(*argv: str) -> None:
        command._configure(folder, list(argv))
        (folder / "CMakeCache.txt").touch()

    configure("cmake", "-DCMAKE_MAKE_PROGRAM=/gone/ninja")
    configure("cmake", "-DCMAKE_MAKE_PROGRAM=/gone/ninja")
    assert len(ran) == 1
    (folder / "CMakeCache.txt").touch()
    command._configure(folder, ["cmake", "-DCMAKE_MAKE_PROGRAM=/here/ninja"])
    assert len(ran) == 2
    assert not (folder / "CMakeCache.txt").exists()
    monkeypatch.setenv("CXXFLAGS", "-g")
    configure("cmake", "-DCMAKE_MAKE_PROGRAM=/here/ninja")
    assert len(ran) == 3


def test_source_distribution_carries_everything(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(
        "build*", ".*cache*", "__pycache__", "*.egg-info", ".venv", ".git", "dist"
    )
    shutil.copytree(ROOT, tree, ignore=left_out)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        carried = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert name == f"hift_ext-{hift_ext.__version__}.tar.gz"
    expected = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "setup.py",
        ".ci/run",
        ".clang-format",
    }
    for folder in ("csrc", "hift_ext", "tests", "benchmarks", "examples"):
        inside = {
            path.relative_to(tree).as_posix()
            for path in (tree / folder).rglob("*")
            if path.is_file()
        }
        assert inside, f"{folder} is empty"
        expected |= inside
    assert expected <= carried, sorted(expected - carried)


def readelf(option: str, library: Path) -> str:
    return subprocess.run(
        ["readelf", option, "-W", str(library)], capture_output=True, text=True, check=True
    ).stdout


def test_the_extension_needs_neither_cuda_nor_openmp_nor_torch(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", library))
    assert "libc.so.6" in needed
    foreign = [
        name
        for name in needed
        if re.match(r"lib(cuda|cudart|gomp|omp|iomp|torch|c10|python)", name)
    ]
    assert foreign == []


def test_the_extension_exports_its_entry_only(library: Path) -> None:
    symbols = [line.split() for line in readelf("--dyn-syms", library).splitlines()]
    exported = {
        s[7] for s in symbols if len(s) > 7 and s[4] in {"GLOBAL", "WEAK"} and s[6] != "UND"
    }
    assert "PyInit__hift_ext" in exported
    assert not {name for name in exported if name.startswith(("cuda", "cu", "__cuda"))}
    assert not {name for name in exported if name.startswith("_ZN4hift")}


def test_the_extension_imports_without_torch(tmp_path: Path, library: Path) -> None:
    code = "import _hift_ext, sys; assert 'torch' not in sys.modules; print(_hift_ext.__version__)"
    environ = {**os.environ, "PYTHONPATH": str(library.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hift_ext.__version__


def test_build_info_names_what_was_built() -> None:
    info = hift_ext.ops.build_info()
    assert info["version"] == hift_ext.__version__
    assert re.match(r"\w+ \d+", info["compiler"])
    if info["cuda_built"]:
        assert re.fullmatch(r"\d+[af]?(,\d+[af]?)*", info["cuda_archs"])
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc_version"])
        assert hift_ext.ops.cuda_info()["runtime"] // 1000 == int(
            info["nvcc_version"].split(".")[0]
        )
    else:
        assert info["cuda_archs"] == info["nvcc_version"] == ""


def test_a_module_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_hift_ext.py").write_text("__version__ = '0.0.0'\n")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import hift_ext"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert re.search(r"ImportError: hift_ext \S+ found .* 0\.0\.0: run `pip install", done.stderr)
