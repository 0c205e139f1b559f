# SPDX-License-Identifier: Apache-2.0
"""Full-parameter fine-tuning, one group of layers a step, with paged optimizer state.

`hift_ext.AdamW(model, lr=1e-5)` stands in for `torch.optim.AdamW(model.parameters(), lr=1e-5)`.
"""

from typing import TYPE_CHECKING

from hift_ext import integrations
from hift_ext._version import __version__
from hift_ext.adagrad import Adagrad
from hift_ext.adamw import Adam, AdamW
from hift_ext.checkpoint import load, save
from hift_ext.layers import Group
from hift_ext.monitoring import Monitor, monitor
from hift_ext.optimizer import HiFTOptimizer
from hift_ext.options import HiFTOptions
from hift_ext.sgd import SGD
from hift_ext.shards import CheckpointError

if TYPE_CHECKING:
    from hift_ext.plan import make_plan

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CheckpointError",
    "Group",
    "HiFTOptimizer",
    "HiFTOptions",
    "Monitor",
    "__version__",
    "integrations",
    "load",
    "make_plan",
    "monitor",
    "save",
]


def __getattr__(name: str) -> object:
    """`make_plan`, at its first use: tracing imports what training does not need."""
    if name == "make_plan":
        from hift_ext.plan import make_plan

        return make_plan
    raise AttributeError(f"module 'hift_ext' has no attribute {name!r}")
