# SPDX-License-Identifier: Apache-2.0
# From a module, or from parameter names, to layers in forward order, and from layers to groups.
# No model is known by name: a trunk is a list of like blocks; what lies around it is a layer too.
"""Finding layers, and cutting them into groups."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from hift_ext.tree import (
    Named,
    Node,
    Source,
    build_tree,
    clean_name,
    is_stage,
    named_parameters,
    say,
)

# A leftover below this share of the median block (a final norm) does not get a step of its own.
_TINY = 0.01

_WHAT_TO_PASS = (
    "HiFT trains layer by layer, and bare parameters do not say which layer they belong to. Pass "
    "hift_ext.AdamW(model, ...), or the parameters with model=model, or model.named_parameters(), "
    'or groups=[...], or layers_per_group="all" for one group; in the Hugging Face Trainer, '
    "optimizer_cls_and_kwargs=hift_ext.integrations.for_trainer(args)"
)


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are trained in the same step.

    Attributes:
        name: readable, and unique among the groups of one call.
        params: the parameters, in registration order; each in one group only.
        names: their names, "" where unknown.
    """

    name: str
    params: tuple[torch.Tensor, ...]
    names: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Elements of all parameters together."""
        return sum(p.numel() for p in self.params)


@dataclass
class _Layer:
    """A layer before filtering and joining: its parts by name, each with its parameters."""

    parts: list[tuple[str, list[Named]]] = field(default_factory=list)
    block: bool = False

    @property
    def numel(self) -> int:
        return sum(p.numel() for _, part in self.parts for _, p in part)


# Layers


def _add_around(node: Node, layers: list[_Layer], opened: list[_Layer]) -> None:
    """Adds what lies outside trunks to the layer that is open, or opens one."""

    def add(name: str, params: list[Named]) -> None:
        if not opened:
            opened.append(_Layer())
            layers.append(opened[0])
        opened[0].parts.append((name, params))

    if not node.has_trunk:
        add(node.path, list(node.walk()))
        return
    for name, param in node.params:
        add(clean_name(name), [(name, param)])
    if not node.blocks:
        for child in node.children.values():
            _add_around(child, layers, opened)
        return
    for item in node.children.values():
        if is_stage(item, lone=len(node.children) == 1):
            _add_around(item, layers, opened)
        else:
            opened.clear()
            whole = [(item.path, list(item.walk()))]
            layers.append(_Layer(whole, block=any(item is b for b in node.blocks)))


def _add_modules(node: Node, layers: list[_Layer]) -> None:
    """Without a trunk: every module that directly holds parameters is a layer."""
    if node.path and node.params:
        layers.append(_Layer([(node.path, node.params)]))
    elif node.params:
        layers.append(_Layer([(clean_name(name), [(name, p)]) for name, p in node.params]))
    for child in node.children.values():
        _add_modules(child, layers)


def _join(layers: list[_Layer], small: list[bool]) -> list[_Layer]:
    """Joins each small layer to the one before it, or to the first that is not small."""
    joined: list[_Layer] = []
    waiting: list[tuple[str, list[Named]]] = []
    for layer, is_small in zip(layers, small, strict=True):
        if not is_small:
            joined.append(_Layer(waiting + layer.parts, layer.block))
            waiting = []
        elif joined:
            joined[-1].parts.extend(layer.parts)
        else:
            waiting.extend(layer.parts)
    return [*joined, _Layer(waiting)] if waiting else joined


def _layers(source: Source, trainable: dict[int, torch.Tensor] | None) -> list[_Layer]:
    """Layers of `source` in forward order, with only the trainable parameters (None: all)."""
    root = build_tree(source)
    layers: list[_Layer] = []
    if root.has_trunk:
        _add_around(root, layers, [])
    else:
        _add_modules(root, layers)
        flat = [all(p.dim() < 2 for _, part in layer.parts for _, p in part) for layer in layers]
        layers = _join(layers, flat)
    for layer in layers:
        kept = [
            (name, [(n, p) for n, p in part if trainable is None or id(p) in trainable])
            for name, part in layer.parts
        ]
        layer.parts = [(name, part) for name, part in kept if part]
    layers = [layer for layer in layers if layer.parts]
    sizes = [layer.numel for layer in layers if layer.block]
    if not sizes:
        return layers
    floor = _TINY * statistics.median(sizes)
    return _join(layers, [layer.numel < floor for layer in layers])


def find_layers(source: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> list[Group]:
    """Finds the layers of a model, in forward (registration) order.

    Args:
        source: a module, or (name, parameter) pairs as `named_parameters()` gives them.

    Returns:
        One Group per layer; every parameter of `source` is in exactly one, tied weights in the
        first that holds them.

    Raises:
        TypeError: `source` is neither.
        ValueError: a parameter has no shape yet.
    """
    return [_group([layer]) for layer in _layers(source, None)]


# Groups


def make_groups(
    source: Source,
    trainable: Sequence[torch.Tensor],
    *,
    layers_per_group: int | Literal["all"] = 1,
    groups: Sequence[Sequence[str | torch.Tensor]] | None = None,
) -> list[Group]:
    """Cuts the trainable parameters into the groups that HiFT trains in turn.

    Args:
        source: a module or (name, parameter) pairs; None where neither is known.
        trainable: the parameters the optimizer trains; no others appear in the groups.
        layers_per_group: m consecutive layers per group, ceil(n / m) groups; "all" for one group.
        groups: instead of layers, lists of parameter-name prefixes, parameters, or both.

    Returns:
        The groups, in forward order (in the given order with `groups`).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a parameter in no group or in two, a prefix that matches nothing, an empty
            group, a bad `layers_per_group`, or a source that says nothing about layers.
    """
    if source is not None and not isinstance(source, nn.Module):
        source = named_parameters(source)
    wanted = {id(p): p for p in trainable}
    _check_layers_per_group(layers_per_group)
    if groups is not None:
        if layers_per_group != 1:
            raise ValueError(
                f"groups= already says what is trained together; layers_per_group="
                f"{layers_per_group!r} cannot be given as well"
            )
        made = _given_groups(source, wanted, groups)
    elif layers_per_group == "all":
        names = {id(p): name for name, p in named_parameters(source)}
        made = [Group("all", tuple(wanted.values()), tuple(names.get(i, "") for i in wanted))]
        made = made if wanted else []
    elif source is None:
        raise ValueError(_WHAT_TO_PASS)
    else:
        layers = _layers(source, wanted)
        m = int(layers_per_group)
        made = [_group(layers[i : i + m]) for i in range(0, len(layers), m)]
    _check_partition(source, wanted, made)
    return made


def _group(layers: list[_Layer]) -> Group:
    parts = [part for layer in layers for part in layer.parts]
    labels = [name for name, _ in parts]
    members = [member for _, part in parts for member in part]
    name = _label(labels) if len(layers) == 1 else f"{labels[0]} .. {labels[-1]}"
    return Group(name, tuple(p for _, p in members), tuple(n for n, _ in members))


def _label(labels: list[str]) -> str:
    return " + ".join(labels) if len(labels) <= 3 else f"{labels[0]} .. {labels[-1]}"


def _check_layers_per_group(m: object) -> None:
    if m != "all" and (isinstance(m, bool) or not isinstance(m, int) or m < 1):
        raise ValueError(f'layers_per_group must be a positive integer or "all", got {m!r}')


def _given_groups(
    source: Source,
    wanted: dict[int, torch.Tensor],
    groups: Sequence[Sequence[str | torch.Tensor]],
) -> list[Group]:
    """Groups as the user lists them: by prefix, by parameter, or both."""
    named = named_parameters(source)
    names = {id(p): name for name, p in named}
    order = {id(p): i for i, (_, p) in enumerate(named)}
    made = []
    for index, entries in enumerate(groups):
        if isinstance(entries, str | torch.Tensor | nn.Module):
            raise TypeError(
                f"groups[{index}] must be a list of prefixes or parameters, got {say(entries)}"
            )
        members: dict[int, torch.Tensor] = {}
        labels: list[str] = []
        for entry in entries:
            where = f"groups[{index}]"
            if isinstance(entry, str):
                found = _matching(entry, named, where)
                labels.append(entry.rstrip("."))
            elif isinstance(entry, torch.Tensor):
                if id(entry) not in wanted and entry.requires_grad:
                    raise ValueError(
                        f"{where} holds {_describe(entry, names)}, which is not among the "
                        "optimizer's parameters"
                    )
                found = [entry]
                labels.extend(filter(None, [clean_name(names.get(id(entry), ""))]))
            else:
                raise TypeError(
                    f"{where} must hold parameter-name prefixes or parameters, got {say(entry)}"
                )
            members.update((id(p), p) for p in found if id(p) in wanted)
        if not members:
            raise ValueError(
                f"groups[{index}] = {_label(labels) or '[]'} holds no parameter to train: it is "
                "empty, or all of it is frozen or not among the optimizer's parameters"
            )
        params = sorted(members.values(), key=lambda p: order.get(id(p), len(order)))
        name = _label(labels) if labels else f"group {index}"
        made.append(Group(name, tuple(params), tuple(names.get(id(p), "") for p in params)))
    return made


def _matching(prefix: str, named: list[Named], where: str) -> list[torch.Tensor]:
    """Parameters whose name is `prefix`, or begins with it at a dot."""
    if not named:
        raise ValueError(
            f"{where} names {prefix!r}, but no parameter names are known: pass model=model or "
            "model.named_parameters(), or list the parameters themselves"
        )
    stem = prefix.rstrip(".")
    found = [
        p
        for name, p in named
        if any(n == stem or n.startswith(stem + ".") for n in (name, clean_name(name)))
    ]
    if not found:
        known = {".".join(n.split(".")[:i]) for n, _ in named for i in range(1, n.count(".") + 2)}
        near = difflib.get_close_matches(stem, sorted(known), n=3, cutoff=0.4)
        near = near or sorted({n.split(".")[0] for n in known})[:5]
        raise ValueError(
            f"{where} names {prefix!r}, which no parameter's name is or begins with; near it: "
            f"{', '.join(near)}"
        )
    return found


def _check_partition(source: Source, wanted: dict[int, torch.Tensor], made: list[Group]) -> None:
    """Every trainable parameter in exactly one group, or an error that names it."""
    names = {id(p): name for name, p in named_parameters(source)}
    owner: dict[int, str] = {}
    for group in made:
        for p in group.params:
            if id(p) in owner:
                raise ValueError(
                    f"{_describe(p, names)} is in two groups, {owner[id(p)]!r} and {group.name!r}"
                )
            owner[id(p)] = group.name
    missing = [p for i, p in wanted.items() if i not in owner]
    if missing:
        first = ", ".join(_describe(p, names) for p in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{first}{more} would never be trained: in no group. Name every trainable parameter in "
            "groups=, pass the module that holds it, or freeze it (requires_grad_(False))"
        )


def _describe(param: torch.Tensor, names: dict[int, str]) -> str:
    name = names.get(id(param), "")
    shape = f"of shape {tuple(param.shape)}"
    return f"parameter {name!r} {shape}" if name else f"an unnamed parameter {shape}"
