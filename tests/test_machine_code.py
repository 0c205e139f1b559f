# SPDX-License-Identifier: Apache-2.0
# The kernels' machine code for an A6000 passes every verdict, and each verdict can fail: planted
# faults in a small listing, in the compiler's flags and in the source are all found.

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hift_ext import ops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import inspect_kernels  # noqa: E402
import sass  # noqa: E402
import verdicts  # noqa: E402

COST = {
    "div": Counter({"FFMA": 5, "MUFU.RCP": 1, "FCHK": 1, "CALL": 1}),
    "sqrt": Counter({"FFMA": 2, "MUFU.RSQ": 1, "FTZ": 2, "CALL": 1}),
}

SASS = """
       MOV R1, c[0x0][0x28]
  @!P0 BRA scale
       LDG.E R2, [R2.64]
       FSETP.NEU.AND P0, PT, R2, RZ, PT
   @P0 EXIT
scale: MUFU.RCP R5, R0
       FCHK P0, R4, R0
       FFMA R6, -R0, R5, 1
       FFMA R5, R5, R6, R5
       FFMA R6, R4, R5, RZ
       FFMA R7, -R0, R6, R4
       FFMA R5, R5, R7, R6
  @!P0 BRA scaled
       MOV R8, scaled
       CALL.REL.NOINC slow
scaled: LDC.64 R30, c[0x0][R50+0x180]
loop:  LDG.E.128 R16, [R40.64]
       LDG.E.128 R8, [R44.64]
       FMUL R8, R8, R3
       FFMA R8, R16, R30, R8
       FFMA R9, R17, R30, R9
       FFMA R10, R18, R30, R10
       FFMA R11, R19, R30, R11
       FFMA R16, R8, R31, R16
       FFMA R17, R9, R31, R17
       FFMA R18, R10, R31, R18
       FFMA R19, R11, R31, R19
       STG.E.128 [R40.64], R16
       ISETP.GE.U32.AND P0, PT, R9, R52, PT
   @P0 CALL.REL.NOINC done
       BRA loop
done:  EXIT
slow:  MUFU.RCP R23, R0
       FFMA R22, R23, R0, 1
       RET.REL.NODEC R8 0x0
"""

PTX = """
.visible .entry kernel(
.param .align 8 .b8 argument[4064]
)
.maxntid 256, 1, 1
.minnctapersm 4
{
.reg .f32 %f<60>;
mov.b64 %rd1, argument;
@%p1 bra $L__BB0_1;
ld.global.f32 %f3, [%rd9];
setp.neu.f32 %p2, %f3, 0f00000000;
@%p2 bra $L__BB0_3;

$L__BB0_1: // the gradients' scale
div.rn.f32 %f1, %f2, %f3;
ld.param.v2.f32 {%f4, %f5}, [%rd1+32];
neg.f32 %f5, %f5;

$L__BB0_2:
.pragma "nounroll";
ld.global.v4.f32 {%f10, %f11, %f12, %f13}, [%rd2];
ld.global.v4.f32 {%f20, %f21, %f22, %f23}, [%rd3];
mul.rn.f32 %f24, %f20, %f1;
fma.rn.f32 %f30, %f10, %f4, %f24;
fma.rn.f32 %f31, %f11, %f4, %f21;
fma.rn.f32 %f32, %f12, %f4, %f22;
fma.rn.f32 %f33, %f13, %f4, %f23;
fma.rn.f32 %f40, %f30, %f5, %f10;
fma.rn.f32 %f41, %f31, %f5, %f11;
fma.rn.f32 %f42, %f32, %f5, %f12;
fma.rn.f32 %f43, %f33, %f5, %f13;
st.global.v4.f32 [%rd2], {%f40, %f41, %f42, %f43};
setp.lt.s64 %p3, %rd4, %rd5;
@%p3 bra $L__BB0_2;

$L__BB0_3:
ret;

}
"""

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:34 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:4416 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def assemble(source: str) -> str:
    """Lines with labels, in the form that cuobjdump prints."""
    rows, labels = [], {}
    for line in source.strip().splitlines():
        label, bare = re.fullmatch(r"(?:(\w+):)?\s*(.*?)\s*", line).groups()  # type: ignore[union-attr]
        if label:
            labels[label] = f"0x{16 * len(rows):x}"
        rows.append(bare)
    text = '\tcode for sm_86\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM86"\n'
    for index, row in enumerate([*rows, "NOP"]):
        words = [labels.get(word, word) for word in row.split(" ")]
        words = [labels.get(word[:-1], word) if word.endswith(",") else word for word in words]
        guard = words.pop(0) if words[0].startswith("@") else ""
        code = "/* 0x0123456789abcdef */"
        text += f"        /*{16 * index:04x}*/ {guard:>18} {' '.join(words)} ;  {code}\n"
        text += f"{'':40}/* 0x000fe40000000f00 */\n"
    return text + "\t\t..........\n"


def kernel(listing: str = SASS, ptx: str = PTX, usage: str = USAGE) -> verdicts.Kernel:
    """SGD in fp32, four elements a round."""
    return verdicts.Kernel(
        verdicts.RULES["Sgd"],
        "fp32",
        "fp32",
        sass.parse_ptx(ptx)["kernel"],
        sass.parse_sass(assemble(listing))["kernel"],
        sass.parse_usage(usage)["kernel"],
        *sass.parse_bounds(ptx)["kernel"],
    )


def failures(row: dict[str, Any]) -> set[str]:
    """The verdicts that fail."""
    assert row["ok"] == (not any(row["verdicts"].values()))
    return {name for name, reasons in row["verdicts"].items() if reasons}


def test_a_sound_listing_passes() -> None:
    row = verdicts.judge(kernel(), verdicts.ARCHS["86"], COST)
    assert failures(row) == set()
    assert (row["load_bits"], row["store_bits"]) == ({"128": 2}, {"128": 1})
    assert (row["bytes_per_param"], row["loop_elements"], row["blocks_per_sm"]) == (12, 4, 6)
    assert row["in_flight_bytes_per_sm"] == 6 * 256 * 2 * 16
    assert row["flops_per_param"] == (1 + 8 * 2) / 4


FAULTS = [
    ("sass", "LDG.E.128 R8", "LDG.E R8", {"width"}),
    ("sass", "STG.E.128 [R40.64], R16", "STG.E.64 [R40.64], R16", {"width", "fused"}),
    ("sass", "FMUL R8, R8, R3", "STL [R1], R8", {"spills"}),
    ("sass", "FMUL R8, R8, R3", "LDL.64 R8, [R1]", {"spills"}),
    ("sass", "LDG.E R2", "LD.E R2", {"argument"}),
    ("sass", "FMUL R8, R8, R3", "FFMA R8, R8, R3, R9", {"fused"}),
    ("sass", "FFMA R19, R11, R31, R19", "FMUL R19, R11, R31", {"fused"}),
    ("sass", "FMUL R8, R8, R3", "FMUL.FTZ R8, R8, R3", {"exact"}),
    ("sass", "FMUL R8, R8, R3", "MUFU.RCP R8, R8", {"exact"}),
    ("sass", "FMUL R8, R8, R3", "MUFU.SQRT R8, R8", {"exact"}),
    ("sass", "FCHK P0, R4, R0", "MOV R4, R4", {"exact"}),
    ("sass", "CALL.REL.NOINC slow", "MOV R9, R9", {"exact"}),
    ("sass", "LDG.E.128 R8, [R44.64]", "FADD R9, R19, R0\nLDG.E.128 R8, [R44.64]", set()),
    ("sass", "FMUL R8, R8, R3", "LOP3.LUT R8, R8, R3, RZ, 0xc0, !PT\n" * 900, {"memory_bound"}),
    ("ptx", "div.rn.f32", "div.full.f32", {"exact"}),
    ("ptx", "div.rn.f32", "div.approx.f32", {"exact"}),
    ("ptx", "mul.rn.f32 %f24, %f20, %f1", "sqrt.approx.ftz.f32 %f24, %f20", {"exact"}),
    ("ptx", "mul.rn.f32", "mul.f32", {"exact"}),
    ("ptx", "mul.rn.f32", "mul.rn.ftz.f32", {"exact"}),
    ("ptx", "setp.neu.f32", "setp.neu.ftz.f32", {"exact"}),
    ("ptx", "mul.rn.f32 %f24, %f20, %f1", "fma.rn.f32 %f24, %f20, %f1, %f1", {"fused"}),
    ("ptx", "fma.rn.f32 %f43, %f33, %f5, %f13", "mul.rn.f32 %f43, %f33, %f5", {"fused"}),
    ("ptx", "fma.rn.f32 %f43", "mad.rn.f32 %f43", {"exact", "fused"}),
    ("ptx", "mul.rn.f32 %f24, %f20, %f1", "st.local.f32 [%rd7], %f20", {"spills"}),
    ("ptx", "ld.global.f32 %f3", "ld.f32 %f3", {"argument"}),
    ("usage", "STACK:0", "STACK:16", {"spills"}),
    ("usage", "LOCAL:0", "LOCAL:8", {"spills"}),
    ("usage", "REG:34", "REG:72", {"occupancy"}),
    ("usage", "SHARED:0", "SHARED:30000", {"occupancy"}),
]


@pytest.mark.parametrize(("where", "old", "new", "wanted"), FAULTS)
def test_planted_faults_are_found(where: str, old: str, new: str, wanted: set[str]) -> None:
    texts = {"sass": SASS, "ptx": PTX, "usage": USAGE}
    assert texts[where].count(old) == 1
    texts[where] = texts[where].replace(old, new)
    broken = kernel(texts["sass"], texts["ptx"], texts["usage"])
    assert failures(verdicts.judge(broken, verdicts.ARCHS["86"], COST)) == wanted


def test_latency_must_be_covered() -> None:
    early = SASS.replace("LDG.E.128 R8", "FADD R9, R19, R0\nLDG.E.128 R8")
    narrow = verdicts.ARCHS["86"]
    row = verdicts.judge(kernel(early), narrow, COST)
    assert row["in_flight_bytes_per_sm"] == 6 * 256 * 16  # the second load comes after a use
    wide = dataclasses.replace(narrow, bandwidth=10 * narrow.bandwidth)
    assert failures(verdicts.judge(kernel(early), wide, COST)) == {"latency"}


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="names a place that is not in the listing"):
        kernel(SASS.replace("BRA loop", "BRA 0x7770"))
    with pytest.raises(ValueError, match="cannot follow"):
        verdicts.judge(kernel(SASS.replace("BRA loop", "BRX R4 -0x40")), verdicts.ARCHS["86"], COST)
    with pytest.raises(ValueError, match="no loop"):
        verdicts.judge(kernel(SASS.replace("BRA loop", "EXIT")), verdicts.ARCHS["86"], COST)
    with pytest.raises(ValueError, match="no function"):
        sass.parse_sass("")
    with pytest.raises(ValueError, match="no kernel"):
        sass.parse_ptx("")


def test_access_widths() -> None:
    def access(text: str) -> tuple[bool, str, int] | None:
        op, *operands = text.split(" ")
        return sass.access_of(sass.Instruction(text, op, tuple(operands), False))

    assert access("LDG.E.U16.CONSTANT R0, [R2.64]") == (False, "global", 2)
    assert access("LDG.E.64.STRONG.SYS R0, [R2.64]") == (False, "global", 8)
    assert access("STS.128 [R1], R4") == (True, "shared", 16)
    assert access("ld.global.nc.v2.u16 {%rs1, %rs2}, [%rd1]") == (False, "global", 4)
    assert access("st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4}") == (True, "global", 16)
    assert access("ld.param.u64 %rd1, [argument]") is None
    assert access("LDC.64 R2, c[0x0][R5]") is None


def test_barriers_and_far_blocks_belong_to_the_loop() -> None:
    text = """
         MOV R0, RZ
    head: BSSY B0, joined
     @P0 BRA far
         FADD R0, R0, R1
    back: BSYNC B0
    joined: STG.E [R2.64], R0
     @P1 BRA head
         EXIT
    far: FMUL R0, R0, R1
         BRA back
    """
    listing = sass.parse_sass(assemble("\n".join(row.strip() for row in text.strip().splitlines())))
    assert listing["kernel"].loops == ((1, 2, 3, 4, 5, 6, 8, 9),)


@pytest.mark.needs("nvcc")
def test_occupancy_is_what_the_toolkit_computes(tmp_path: Path) -> None:
    nvcc = inspect_kernels.find_tools().nvcc
    (tmp_path / "occupancy.cu").write_text(
        """
        #include <cuda_occupancy.h>
        #include <cstdio>
        #include <initializer_list>
        int main() {
          for (int arch : {80, 86, 89, 90}) {
            cudaOccDeviceProp p;
            p.computeMajor = arch / 10;
            p.computeMinor = arch % 10;
            p.maxThreadsPerBlock = 1024;
            p.maxThreadsPerMultiprocessor = arch == 80 || arch == 90 ? 2048 : 1536;
            p.regsPerBlock = p.regsPerMultiprocessor = 65536;
            p.warpSize = 32;
            p.sharedMemPerBlock = 48 << 10;
            p.sharedMemPerMultiprocessor = (arch == 80 ? 164 : arch == 90 ? 228 : 100) << 10;
            p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;
            p.reservedSharedMemPerBlock = 1024;
            p.numSms = 1;
            for (int registers = 16; registers <= 255; registers += 3) {
              for (int shared : {0, 5000, 30000}) {
                cudaOccFuncAttributes f;
                f.maxThreadsPerBlock = 1024;
                f.numRegs = registers;
                f.sharedSizeBytes = shared;
                cudaOccDeviceState state;
                state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
                cudaOccResult r;
                int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &state, 256, 0);
                std::printf("%d %d %d %d\\n", arch, registers, shared,
                            error ? -1 : r.activeBlocksPerMultiprocessor);
              }
            }
          }
        }
        """
    )
    program = tmp_path / "occupancy"
    subprocess.run([nvcc, "-o", program, tmp_path / "occupancy.cu"], check=True)
    told = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [tuple(map(int, line.split())) for line in told.splitlines()]
    assert len(rows) == 4 * 80 * 3
    for arch, registers, shared, blocks in rows:
        ours = verdicts.ARCHS[str(arch)].blocks_per_sm(registers, 256, shared)
        assert ours == blocks, (arch, registers, shared)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The real kernels, compiled for an A6000."""
    return inspect_kernels.inspect(inspect_kernels.find_tools(), "86")


@pytest.mark.needs("nvcc")
def test_every_kernel_passes_every_verdict(rows: list[dict[str, Any]]) -> None:
    assert {rule.name for rule in verdicts.RULES.values()} == set(ops.RULES)
    assert [(row["rule"], row["param"], row["grad"]) for row in rows] == verdicts.KERNELS
    failed = [(r["rule"], r["param"], r["grad"], r["verdicts"]) for r in rows if not r["ok"]]
    assert failed == []


@pytest.mark.needs("nvcc")
def test_the_figures_of_adamw(rows: list[dict[str, Any]]) -> None:
    by_types = {(r["param"], r["grad"]): r for r in rows if r["rule"] == "adamw"}
    full, half = by_types["fp32", "fp32"], by_types["bf16", "bf16"]
    assert full["load_bits"].keys() == full["store_bits"].keys() == {"128"}
    assert half["load_bits"].keys() == half["store_bits"].keys() == {"128", "64"}
    assert (full["bytes_per_param"], half["bytes_per_param"]) == (28, 22)
    assert verdicts.LLAMA_7B_BLOCK == 202_383_360
    assert full["memory_ms"] == pytest.approx(202_383_360 * 28 / 768e9 * 1e3)
    assert full["registers"] <= 64
    assert full["blocks_per_sm"] >= 4
    assert max(r["compute_ms"] / r["memory_ms"] for r in rows) < 0.3  # no conversion in integers


def change(folder: Path, file: str, old: str, new: str) -> None:
    """Replaces the one place where `old` stands in a copy of csrc/."""
    path = folder / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of csrc/ whose list of rules holds AdamW alone, so that it compiles quickly."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / "rules" / "all.h").read_text()
    start, end = text.index("#define HIFT_RULES(X)"), text.index("namespace")
    text = f"{text[:start]}#define HIFT_RULES(X) X(AdamRule<true>)\n\n{text[end:]}"
    (csrc / "rules" / "all.h").write_text(text)
    return csrc


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("flag", ["-fmad=true", "-ftz=true", "-prec-div=false", "-prec-sqrt=false"])
def test_wrong_flags_are_found(small: Path, flag: str) -> None:
    rows = inspect_kernels.inspect(inspect_kernels.find_tools(), "86", small, [flag])
    assert len(rows) == len(verdicts.TYPE_PAIRS)
    for row in rows:
        # -fmad=true leaves every operation open to contraction, whether or not any was contracted.
        assert {"exact"} <= failures(row) <= {"exact", "fused"}


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize(
    ("file", "old", "new", "wanted"),
    [
        ("cuda/kernel.h", "int kBlocksPerSm = 4", "int kBlocksPerSm = 6", "spills"),
        ("cuda/kernel.h", "sizeof(Grad) == 4 ? 4 : 8", "sizeof(Grad) == 4 ? 2 : 8", "width"),
        (
            "rules/adamw.h",
            "p -= h.step_size * exp_avg / denominator",
            "p = fmaf(-h.step_size, exp_avg / denominator, p)",
            "fused",
        ),
    ],
)
def test_faults_in_the_source_are_found(
    small: Path, file: str, old: str, new: str, wanted: str
) -> None:
    change(small, file, old, new)
    rows = inspect_kernels.inspect(inspect_kernels.find_tools(), "86", small)
    assert all(wanted in failures(row) for row in rows)


def test_tools_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = inspect_kernels.build()
    monkeypatch.setattr(build, "find_nvcc", lambda *_: None)
    with pytest.raises(SystemExit, match="there is no nvcc"):
        inspect_kernels.find_tools()
    monkeypatch.setattr(build, "find_nvcc", lambda *_: tmp_path / "nvcc")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="no cuobjdump and no nvdisasm: `pip install"):
        inspect_kernels.find_tools()
