# SPDX-License-Identifier: Apache-2.0
# Reads a kernel's two listings, nvcc's PTX and cuobjdump's SASS, as one kind of thing: instructions
# with the targets of their branches, from which loops and memory accesses follow.
"""A parser of PTX and SASS listings, as far as the inspection of our kernels needs it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

VOID = re.compile(r"EXIT|RET|BRA|BRX|JMP|JMX|BSYNC|ST|RED|ret|exit|bra|st|red")
"""What writes no register; every other instruction writes its first operand, if that is one."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: The whole instruction as listed, for messages.
        op: Opcode with its modifiers, such as `LDG.E.128` or `fma.rn.f32`.
        operands: What follows the opcode, split at commas.
        guarded: Whether a predicate decides if it is executed.
        target: Index of the instruction that it names (a branch, or a barrier's end), if any.
    """

    text: str
    op: str
    operands: tuple[str, ...]
    guarded: bool
    target: int | None = None

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.op.split(".")[0]

    @property
    def writes(self) -> frozenset[str]:
        """SASS registers that it writes, a wide load's neighbours included."""
        if VOID.fullmatch(self.base) or not self.operands:
            return frozenset()
        first = re.fullmatch(r"R(\d+)", self.operands[0])
        if first is None:
            return frozenset()
        access = access_of(self)
        count = max(1, access.bytes // 4) if access else 2 if ".64" in self.op else 1
        return frozenset(f"R{int(first[1]) + k}" for k in range(count))

    @property
    def reads(self) -> frozenset[str]:
        """SASS registers that it reads, as far as their names are spelled out."""
        skip = 1 if self.writes else 0
        named = re.findall(r"\bR\d+", " ".join(self.operands[skip:]))
        return frozenset(named)


class Access(NamedTuple):
    """One access to memory by one thread: direction, address space, width."""

    store: bool
    space: str  # "global", "local", "shared", "generic"
    bytes: int


SASS_SPACES = {"G": "global", "L": "local", "S": "shared", "": "generic"}


def access_of(i: Instruction) -> Access | None:
    """The memory access that an instruction makes, or None; constants do not count."""
    parts = i.op.split(".")
    sass = re.fullmatch(r"(LD|ST)([GLS]?)", parts[0])
    if sass is not None:
        bits = [
            int(m[1]) for part in parts[1:] if (m := re.fullmatch(r"[US]?(8|16|32|64|128)", part))
        ]
        return Access(sass[1] == "ST", SASS_SPACES[sass[2]], (bits[0] if bits else 32) // 8)
    if parts[0] in ("ld", "ldu", "st") and parts[1] not in ("param", "const"):
        space = next((part for part in parts if part in ("global", "local", "shared")), "generic")
        vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        return Access(parts[0] == "st", space, vector * int(re.sub(r"\D", "", parts[-1])) // 8)
    return None


def accesses(instructions: Iterable[Instruction], space: str = "global") -> Iterator[Access]:
    """The accesses among `instructions` to one address space."""
    return (a for i in instructions if (a := access_of(i)) is not None and a.space == space)


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions, in the order of the listing."""

    name: str
    instructions: tuple[Instruction, ...]

    def enters_subroutine(self, i: Instruction) -> bool:
        """Whether a call is one: the assembler writes far jumps as calls too, to what ends in EXIT.

        Subroutines, which return, come last in a listing.
        """
        if i.base != "CALL":
            return False
        if i.target is None:
            raise ValueError(f"{self.name}: cannot follow {i.text!r}")
        ends = (after.base for after in self.instructions[i.target :])
        return next((end for end in ends if end in ("EXIT", "RET")), "EXIT") == "RET"

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For each instruction, those that may be executed next. A subroutine returns."""
        ends: dict[str, set[int]] = {}
        for i in self.instructions:
            if i.base == "BSSY" and i.target is not None:
                ends.setdefault(i.operands[0], set()).add(i.target)
        return tuple(tuple(self._after(index, ends)) for index in range(len(self.instructions)))

    def _after(self, index: int, ends: dict[str, set[int]]) -> list[int]:
        i = self.instructions[index]
        following = [index + 1] if index + 1 < len(self.instructions) else []
        if i.base in ("BRX", "JMX", "JMP", "brx"):
            raise ValueError(f"{self.name}: cannot follow {i.text!r}")
        if i.base == "BSYNC":  # goes on where the barrier's BSSY says
            there = ends.get(i.operands[0], set())
            return following if set(following) & there or not there else sorted(there)
        if i.base in ("EXIT", "RET", "ret", "exit"):
            return following if i.guarded else []
        if i.base in ("BRA", "bra") or (i.base == "CALL" and not self.enters_subroutine(i)):
            if i.target is None:
                raise ValueError(f"{self.name}: no target in {i.text!r}")
            # `BRA P0, target`: a predicate among the operands decides too.
            maybe = i.guarded or len(i.operands) > 1
            return [i.target, *(following if maybe else [])]
        return following

    @cached_property
    def reached(self) -> tuple[Instruction, ...]:
        """What can be executed without entering a subroutine: slow paths are left out."""
        seen, todo = {0}, [0]
        while todo:
            new = set(self.successors[todo.pop()]) - seen
            seen |= new
            todo += new
        return tuple(self.instructions[index] for index in sorted(seen))

    @cached_property
    def loops(self) -> tuple[tuple[int, ...], ...]:
        """The natural loops: the indices of each one's instructions, its head first.

        A jump back closes a loop if its target dominates it: if the kernel cannot be entered in
        a way that reaches the jump but not the target.
        """
        before: list[list[int]] = [[] for _ in self.instructions]
        for index, nexts in enumerate(self.successors):
            for successor in nexts:
                before[successor].append(index)
        bodies: dict[int, set[int]] = {}
        for index, nexts in enumerate(self.successors):
            for head in nexts:
                if head > index:
                    continue
                body, todo = {head}, [index]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo += before[at]
                if 0 not in body or head == 0:
                    bodies.setdefault(head, set()).update(body)
        return tuple(
            tuple(sorted(body, key=lambda at, head=head: (at < head, at)))  # type: ignore[misc]
            for head, body in sorted(bodies.items())
        )

    def body(self, loop: Sequence[int]) -> list[Instruction]:
        """A loop's instructions."""
        return [self.instructions[index] for index in loop]


def _listing(
    name: str, rows: Sequence[tuple[str, bool, str]], labels: dict[str, int], label: re.Pattern[str]
) -> Listing:
    """Instructions of (text, guarded, text without guard); `label` finds what names a target."""
    made = []
    for text, guarded, bare in rows:
        op, _, rest = bare.partition(" ")
        operands = tuple(part.strip() for part in rest.split(",")) if rest.strip() else ()
        named = label.search(operands[-1]) if operands else None
        target = None
        if named is not None and re.match(r"BRA|BSSY|CALL|bra", op):
            target = labels.get(named[0])
            if target is None:
                raise ValueError(f"{name}: {text!r} names a place that is not in the listing")
        made.append(Instruction(text, op, operands, guarded, target))
    return Listing(name, tuple(made))


def parse_sass(text: str) -> dict[str, Listing]:
    """The functions of what `cuobjdump -sass` prints, by their (mangled) name."""
    functions: dict[str, Listing] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name = part.split(maxsplit=1)[0]
        rows: list[tuple[str, bool, str]] = []
        labels: dict[str, int] = {}
        line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][^;]*?)\s*;")
        for address, guard, bare in line.findall(part):
            if bare == "NOP":
                continue  # padding; a jump to it would be reported as one to nowhere
            labels[f"{int(address, 16):#x}"] = len(rows)
            rows.append((f"{guard.strip()} {bare}".strip(), bool(guard), bare))
        functions[name] = _listing(name, rows, labels, re.compile(r"0x[0-9a-f]+$"))
    if not functions:
        raise ValueError("the disassembly has no function")
    return functions


def parse_ptx(text: str) -> dict[str, Listing]:
    """The kernels of a PTX file, by their (mangled) name."""
    kernels: dict[str, Listing] = {}
    text = re.sub(r"//.*", "", text)
    for name, body in re.findall(r"\.entry\s+(\w+)[^{]*\{(.*?)^\}", text, flags=re.S | re.M):
        rows: list[tuple[str, bool, str]] = []
        labels: dict[str, int] = {}
        for statement in re.findall(
            r"\$\w+(?=:)|(?:@!?%\w+\s+)?[a-z][^;]*(?=;)|\.[a-z][^;]*;", body
        ):
            if statement.startswith("$"):
                labels[statement] = len(rows)
            elif not statement.startswith("."):
                statement = " ".join(statement.split())
                guard, bare = re.fullmatch(r"((?:@\S+ )?)(.*)", statement).groups()  # type: ignore[union-attr]
                rows.append((statement, bool(guard), bare))
        kernels[name] = _listing(name, rows, labels, re.compile(r"\$\w+"))
    if not kernels:
        raise ValueError("the PTX has no kernel")
    return kernels


def parse_bounds(text: str) -> dict[str, tuple[int, int]]:
    """Launch bounds by kernel of a PTX file: threads of a block, blocks wanted on an SM."""
    found = re.findall(
        r"\.entry\s+(\w+)[^{]*?\.maxntid\s+(\d+)[^{]*?\.minnctapersm\s+(\d+)[^{]*\{", text
    )
    return {name: (int(threads), int(blocks)) for name, threads, blocks in found}


def parse_usage(text: str) -> dict[str, dict[str, int]]:
    """Registers, stack, shared and local bytes by function, of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", row)}
        for name, row in found
    }
