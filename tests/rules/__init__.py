# SPDX-License-Identifier: Apache-2.0
# A case per rule of csrc/rules: data only. Every file here is found by its name and adds its CASES;
# a new rule needs a file here and no other edit.

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hift_ext import HiFTOptimizer

State = Mapping[str, np.ndarray]
Reference = Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Case:
    """One rule: who implements it, with which arguments it is tried, and what it must compute.

    Attributes:
        rule: Its name in `hift_ext.ops.RULES`.
        ours: The optimizer that uses it.
        theirs: torch's optimizer of the same meaning.
        hypers: Keyword arguments of both classes that lead to this rule.
        typical: One set of them, for tests whose subject is not the arithmetic.
        divides: Whether weights move by a quotient with a root, which torch rounds differently.
        reference: `(p, g, state, t, **hypers) -> (p, state)`, the t-th step (from 1) in float64.
    """

    rule: str
    ours: type[HiFTOptimizer]
    theirs: type[torch.optim.Optimizer]
    hypers: st.SearchStrategy[dict[str, Any]]
    typical: dict[str, Any]
    divides: bool
    reference: Reference

    def __str__(self) -> str:
        return self.rule


def log_floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Positive floats, evenly spread over their orders of magnitude."""
    return st.floats(np.log(low), np.log(high)).map(lambda x: float(np.exp(x)))


def rates() -> st.SearchStrategy[float]:
    """Learning rates at which 50 steps move a weight by far more than its rounding."""
    return log_floats(1e-3, 0.1)


def decays() -> st.SearchStrategy[float]:
    """Weight decays, often none."""
    return st.just(0.0) | log_floats(1e-3, 1.0)


def find_cases() -> list[Case]:
    """The CASES of every file in this folder."""
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    return [case for module in modules for case in module.CASES]
