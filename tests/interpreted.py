# SPDX-License-Identifier: Apache-2.0
# Tests under Triton's interpreter, which is chosen when triton is first imported: they run in a
# process of their own, which one test of their file starts.

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from triton.runtime import interpreter


def inside(test):
    """A test for the interpreter's process; there is none of that name in the other."""
    return test if INTERPRETED else None


def outside(test):
    """The reverse."""
    return None if INTERPRETED else test


def run_interpreted(file: str) -> None:
    """The tests of a file, in a process that interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """`x * y + z` of float32, rounded once. The interpreter's own rounds the product too."""
    with np.errstate(all="ignore"):
        product, z = x.astype(np.float64) * y, z.astype(np.float64)  # exact
        total = product + z
        # What the addition lost (Knuth's TwoSum). Where it lost anything, the last bit is made odd,
        # so that the second rounding cannot take the sum for a tie.
        virtual = total - product
        lost = (product - (total - virtual)) + (z - virtual)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (lost != 0) & even
        odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(np.float32)


@pytest.fixture(autouse=True)
def fma(monkeypatch):
    """Gives the interpreter a fused multiply-add, as every GPU has."""
    if INTERPRETED:

        def create_fma(self, x, y, z):
            arrays = np.broadcast_arrays(x.data, y.data, z.data)
            if arrays[0].dtype == np.float64:  # of squares of float32, which are exact
                result = arrays[0] * arrays[1] + arrays[2]
            else:
                result = fused(*(a.astype(np.float32) for a in arrays))
            return interpreter.TensorHandle(result, z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        with np.errstate(all="ignore"):  # lanes beyond a span's end divide by zero
            yield
    else:
        yield
