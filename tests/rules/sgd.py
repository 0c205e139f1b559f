# SPDX-License-Identifier: Apache-2.0
# SGD, plain and with momentum. The reference is the recursion torch.optim.SGD documents: the first
# buffer is the gradient, and dampening counts from the second step on.

from __future__ import annotations

import torch
from hypothesis import strategies as st

import hift_ext
from rules import Case, decays, rates


def reference(p, g, state, t, *, lr, momentum, dampening, weight_decay, nesterov, maximize):
    g = (-g if maximize else g) + weight_decay * p
    if momentum == 0:
        return p - lr * g, {}
    buffer = g if t == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * g
    return p - lr * (g + momentum * buffer if nesterov else buffer), {"momentum_buffer": buffer}


def hypers(momentum, form):
    """`form`: how dampening and nesterov, which exclude each other, are drawn."""
    return st.builds(
        lambda shared, form: {**shared, **form},
        st.fixed_dictionaries(
            {
                "lr": rates(),
                "momentum": momentum,
                "weight_decay": decays(),
                "maximize": st.booleans(),
            }
        ),
        form,
    )


DAMPED = st.fixed_dictionaries({"dampening": st.floats(0.0, 1.0), "nesterov": st.just(False)})
PLAIN = st.just({"dampening": 0.0, "nesterov": False})
NESTEROV = st.just({"dampening": 0.0, "nesterov": True})
TYPICAL = {"lr": 0.05, "weight_decay": 0.1, "maximize": False, "nesterov": False}

CASES = [
    Case(
        rule="sgd",
        ours=hift_ext.SGD,
        theirs=torch.optim.SGD,
        hypers=hypers(st.just(0.0), PLAIN),
        typical={**TYPICAL, "momentum": 0.0, "dampening": 0.0},
        divides=False,
        reference=reference,
    ),
    Case(
        rule="momentum",
        ours=hift_ext.SGD,
        theirs=torch.optim.SGD,
        hypers=hypers(st.floats(0.01, 0.99), DAMPED | NESTEROV),
        typical={**TYPICAL, "momentum": 0.9, "dampening": 0.2},
        divides=False,
        reference=reference,
    ),
]
