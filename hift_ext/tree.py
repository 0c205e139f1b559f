# SPDX-License-Identifier: Apache-2.0
# A model as a tree of dotted names, and its trunks: lists of like blocks, found by structure alone.
# With a module its containers and classes are known too; names are enough for nearly every model.
"""The tree of a model's parameters, and the trunks in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Named: TypeAlias = tuple[str, torch.Tensor]
Source: TypeAlias = nn.Module | Iterable[Named] | None

# torch.compile puts this between a module and its children; it is nobody's name for anything.
_COMPILED = "_orig_mod"


@dataclass(eq=False)
class Node:
    """A module, known by its dotted path; `module` stays None when only names are known."""

    path: str = ""
    params: list[Named] = field(default_factory=list)
    children: dict[str, Node] = field(default_factory=dict)
    module: nn.Module | None = None
    # Filled by _survey, children first.
    suffixes: frozenset[str] = frozenset()
    matrices: int = 0
    blocks: tuple[Node, ...] = ()
    has_trunk: bool = False

    def walk(self) -> Iterable[Named]:
        """Named parameters of the subtree: a module's own first, then its children's."""
        yield from self.params
        for child in self.children.values():
            yield from child.walk()


def clean_name(name: str) -> str:
    """The name as it is without torch.compile."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def named_parameters(source: Source) -> list[Named]:
    """Lists `source` by name, each tensor once, under the first name that holds it."""
    if source is None:
        return []
    if not isinstance(source, nn.Module | Iterable):
        raise TypeError(f"layers are found from a module or named parameters, got {say(source)}")
    items = source.named_parameters() if isinstance(source, nn.Module) else source
    found: dict[int, Named] = {}
    for item in items:
        if not (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], torch.Tensor)
        ):
            raise TypeError(f"layers are found from (name, parameter) pairs, got {say(item)}")
        if is_lazy(item[1]):
            raise ValueError(
                f"parameter {item[0]!r} has no shape yet (a lazy module): run one forward before "
                "making the optimizer"
            )
        found.setdefault(id(item[1]), item)
    return list(found.values())


def build_tree(source: Source) -> Node:
    """The tree of `source`, with its trunks found; a child keeps its place of registration."""
    root = Node()
    for name, param in named_parameters(source):
        path = clean_name(name).split(".")[:-1]
        if "parametrizations" in path:  # weight_norm's and its like's tensors are the module's own
            path = path[: path.index("parametrizations")]
        node = root
        for depth, part in enumerate(path, 1):
            node = node.children.setdefault(part, Node(".".join(path[:depth])))
        node.params.append((name, param))
    if isinstance(source, nn.Module):
        _attach(root, source)
    _survey(root)
    return root


def _attach(root: Node, module: nn.Module) -> None:
    """Gives every node its module; under torch.compile's wrapper, the wrapped one."""
    for raw, sub in module.named_modules(remove_duplicate=False):
        node: Node | None = root
        for part in filter(None, clean_name(raw).split(".")):
            node = node.children.get(part) if node else None
        if node is not None:
            node.module = sub


def _survey(node: Node) -> None:
    """Fills in, from the leaves up, what decides whether a node is a trunk."""
    suffixes = {name.rpartition(".")[2] for name, _ in node.params}
    node.matrices = sum(p.dim() > 1 for _, p in node.params)
    for key, child in node.children.items():
        _survey(child)
        suffixes.update(f"{key}.{suffix}" for suffix in child.suffixes)
        node.matrices += child.matrices
    node.suffixes = frozenset(suffixes)
    node.blocks = _like_blocks(node, by_class=True)
    node.has_trunk = bool(node.blocks) or any(c.has_trunk for c in node.children.values())


def _like_blocks(node: Node, by_class: bool) -> tuple[Node, ...]:
    """The repeated blocks of a list, or () where `node` is no trunk.

    A trunk's children are list items, and at least half of them are composite and alike: of one
    class, or sharing more than half of the parameter names of the smaller. A first block with an
    extra table, or every eighth with attention instead of a state-space mixer, is still alike.
    """
    listed = isinstance(node.module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if not node.children or not (listed or all(key.isdecimal() for key in node.children)):
        return ()
    composite = [child for child in node.children.values() if child.children]
    kinds = Counter(
        (child.suffixes, _block_class(child) if by_class else None) for child in composite
    )
    best: set[object] = set()
    most = 0
    for suffixes, cls in kinds:
        alike = {k for k in kinds if (cls and k[1] is cls) or _overlap(suffixes, k[0]) > 0.5}
        count = sum(kinds[k] for k in alike)
        if count > most:
            best, most = set(alike), count
    if 2 * most < len(node.children) or (most == 1 and len(node.children) > 1):
        return ()
    return tuple(
        c for c in composite if (c.suffixes, _block_class(c) if by_class else None) in best
    )


def _block_class(node: Node) -> type | None:
    """The class that makes two blocks alike; a bare container says nothing."""
    cls = type(node.module)
    return None if cls in (type(None), nn.Sequential, nn.ModuleList, nn.ModuleDict) else cls


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, min(len(a), len(b)))


def _inner_trunks(node: Node) -> Iterable[tuple[Node, tuple[Node, ...]]]:
    """Trunks in `node` that are alike by names: sublayers of one wrapper class are no trunk."""
    blocks = _like_blocks(node, by_class=False)
    if blocks:
        yield node, blocks
    elif node.has_trunk:
        for child in node.children.values():
            yield from _inner_trunks(child)


def is_stage(item: Node, lone: bool) -> bool:
    """Whether a list item is no block but a stage: a list of blocks, with little beside it.

    Beside an expert list stand attention and a router, more matrices than an expert holds; beside
    a stage's blocks stands at most a downsampling. `lone`, an only item, may also be a whole model
    in a Sequential: its blocks are nested deeper than experts are.
    """
    if not item.has_trunk:
        return False
    trunks = list(_inner_trunks(item))
    largest = max((b.matrices for _, blocks in trunks for b in blocks), default=0)
    beside = item.matrices - sum(trunk.matrices for trunk, _ in trunks)
    if largest >= 2 and beside < largest:
        return True
    return lone and any(
        len(blocks) > 1 and any(c.children for b in blocks for c in b.children.values())
        for _, blocks in trunks
    )


def say(value: object) -> str:
    """`value` for an error message; a tensor by its shape."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"
