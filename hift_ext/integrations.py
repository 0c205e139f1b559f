# SPDX-License-Identifier: Apache-2.0
"""What makes HiFT one line in the Hugging Face Trainer: its optimizer, and what it logs.

Nothing here imports transformers before it is used.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from hift_ext.adamw import AdamW
from hift_ext.freezing import frozen_in_copy
from hift_ext.optimizer import HiFTOptimizer

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from hift_ext.trainer_callback import HiFTCallback, MonitorCallback

__all__ = ["HiFTCallback", "MonitorCallback", "TrainerOptimizer", "for_trainer", "watch"]


def __getattr__(name: str) -> Any:
    # Subclasses of transformers' class; they exist only where they are wanted.
    if name in ("HiFTCallback", "MonitorCallback"):
        from hift_ext import trainer_callback

        return getattr(trainer_callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def for_trainer(
    args: TrainingArguments,
    optimizer_class: type[HiFTOptimizer] = AdamW,
    **settings: Any,
) -> tuple[TrainerOptimizer, dict[str, Any]]:
    """The pair for `Trainer(optimizer_cls_and_kwargs=...)`.

    The Trainer hands over its model when it trains, so `model_init` and hyper-parameter search work
    too. Rate, betas and eps are those of `args`, and weight decay spares what the Trainer spares
    (norms and biases), unless `settings` say otherwise.

    Args:
        args: The Trainer's arguments; read when the optimizer is made.
        optimizer_class: One of this package's optimizers.
        **settings: Arguments of that class, such as `lr=` or `layers_per_group=`.

    Raises:
        TypeError: `optimizer_class` is no HiFT optimizer.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, HiFTOptimizer)):
        raise TypeError(
            f"for_trainer makes HiFT optimizers, hift_ext.AdamW and its siblings, not "
            f"{optimizer_class!r}"
        )
    return TrainerOptimizer(args, optimizer_class), settings


class TrainerOptimizer:
    """What the Trainer takes for an optimizer's factory: `factory()(model, **settings)`.

    Args:
        args: The Trainer's arguments.
        optimizer_class: What to make.
    """

    def __init__(self, args: TrainingArguments, optimizer_class: type[HiFTOptimizer]) -> None:
        self._args = args
        self._class = optimizer_class

    def __call__(self, *params: object, **settings: object) -> Any:
        """The function that makes the optimizer of a model.

        Raises:
            TypeError: A Trainer from before such factories gave parameters.
        """
        if params or settings:
            raise TypeError(
                "this release of transformers hands over parameters instead of the model: use "
                "Trainer(optimizers=(hift_ext.AdamW(model, ...), None))"
            )
        return self.make

    def make(self, model: nn.Module, **settings: Any) -> HiFTOptimizer:
        """The optimizer of `model`, with the Trainer's two param_groups."""
        from transformers import Trainer

        args = self._args
        offered = inspect.signature(self._class).parameters
        from_args = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        if "betas" not in offered:  # Adagrad's eps is none of adam_epsilon
            from_args = {"lr": args.learning_rate}
        settings = {**from_args, **settings}
        decay = settings.pop("weight_decay", args.weight_decay)
        # The method asks nothing of its Trainer, which a factory does not see.
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        frozen_before = frozen_in_copy(model)
        trained = [
            (name, p)
            for name, p in model.named_parameters()
            if p.requires_grad or name in frozen_before
        ]
        groups = [
            {"params": [p for name, p in trained if name in decayed], "weight_decay": decay},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]
        return self._class(groups, model=model, **settings)  # type: ignore[arg-type]


def watch(trainer: Trainer) -> HiFTCallback:
    """Adds a `HiFTCallback` ahead of the Trainer's reporters, so that they get its values too.

    With `Trainer(callbacks=[HiFTCallback()])` the values reach `log_history` and the console, but
    reporters (TensorBoard, ...) have had their turn when it comes.

    Returns:
        The callback.
    """
    from hift_ext.trainer_callback import HiFTCallback

    callback = HiFTCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
