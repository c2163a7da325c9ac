"""Reads machine code as text, and counts what decides a kernel's speed: instructions, and widths of accesses.

A kernel of this library has a body that it runs for nearly every element: a loop over a row, or the whole
kernel if a program is one block. Loops are found as in a compiler: by a branch back to a block through which
every way into the loop leads. In a body with branches we follow the path that loads the most bytes; if there
are several, the one with the fewest predicates on its accesses, which whole blocks take. The instructions on
that path are counted once and divided by the number of elements that a thread loads on it, which follows from
the number of its loads and their widths. So the counts are right for an unrolled loop, and for a software
pipeline, in which a load belongs to a later iteration than the arithmetic beside it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Instruction(NamedTuple):
    opcode: str
    conditional: bool  # runs under a predicate, or branches on one
    target: str | None = None  # label of a branch
    ends: bool = False  # nothing after it runs, unless it is conditional
    load: int = 0  # bytes from global memory for each thread
    store: int = 0


@dataclass(frozen=True)
class Block:
    """Instructions without a branch among them, and which blocks may run next."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Body:
    """What a thread does once through a loop, or through a kernel."""

    loop: bool
    instructions: tuple[Instruction, ...]

    @cached_property
    def loads(self) -> Counter[int]:
        """Number of loads by width in bytes."""
        return Counter(i.load for i in self.instructions if i.load)

    @cached_property
    def stores(self) -> Counter[int]:
        return Counter(i.store for i in self.instructions if i.store)

    @property
    def load_width(self) -> int:
        return _main_width(self.loads)

    @property
    def store_width(self) -> int:
        return _main_width(self.stores)

    @property
    def predicated(self) -> int:
        return sum(i.conditional for i in self.instructions if i.load or i.store)

    @property
    def bytes_loaded(self) -> int:
        """Bytes loaded. Outside loops only the main width counts; the rest is label and statistics."""
        return sum(width * n for width, n in self.loads.items() if self.loop or width == self.load_width)

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)


def _main_width(accesses: Counter[int]) -> int:
    """The width in which the most bytes move, the wider one of two equals."""
    return max(accesses, key=lambda width: (width * accesses[width], width), default=0)


# Text to instructions ----------------------------------------------------------------------------------

Line = str | Instruction  # a label, or an instruction

_SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"(\.L_x_\d+|\$[\w$]+):")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def read_sass(listing: str) -> Iterator[Line]:
    """The instructions of a listing by `nvdisasm -c`."""
    for line in listing.splitlines():
        if label := _SASS_LABEL.match(line):
            yield label[1]
        elif found := _SASS.match(line):
            yield _sass_instruction(*found.groups())


def _sass_instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    name, *modifiers = opcode.split(".")
    width = next((_SASS_WIDTHS[m] for m in reversed(modifiers) if m in _SASS_WIDTHS), 4)
    target = re.search(r"(.*)`\((.+?)\)", operands) if name in ("BRA", "CALL") else None
    jumps = target is not None and (
        name == "BRA" or predicate is not None
    )  # else a subroutine, which returns
    return Instruction(
        opcode,
        conditional=predicate is not None or bool(target and jumps and target[1].strip()),
        target=target[2] if target and jumps else None,
        ends=jumps or name in ("EXIT", "RET"),
        load=width if name in ("LDG", "LDGSTS") else 0,
        store=width if name == "STG" else 0,
    )


_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_GCN_WIDTHS = {
    "dwordx4": 16,
    "b128": 16,
    "dwordx3": 12,
    "b96": 12,
    "dwordx2": 8,
    "b64": 8,
    "dword": 4,
    "b32": 4,
}
_GCN_ENDS = ("s_endpgm", "s_branch", "s_setpc_b64")


def read_amdgcn(listing: str) -> Iterator[Line]:
    """The instructions of Triton's assembly for AMD's GPUs, whose predicate is a register."""
    for line in listing.partition(".Lfunc_end0:")[0].splitlines():
        text = line.partition(";")[0].strip()
        if label := re.fullmatch(r"([.\w$]+):", text):
            yield label[1]
        elif text and text[0] != ".":
            opcode, *operands = text.split()
            yield _gcn_instruction(opcode, operands)


def _gcn_instruction(opcode: str, operands: list[str]) -> Instruction:
    access = _GCN_ACCESS.match(opcode)
    width = (_GCN_WIDTHS.get(access[2]) or (1 if re.search(r"byte|[ui]8", access[2]) else 2)) if access else 0
    branch = opcode.startswith(("s_branch", "s_cbranch"))
    return Instruction(
        opcode,
        conditional=opcode.startswith("s_cbranch"),
        target=operands[0] if branch else None,
        ends=branch or opcode in _GCN_ENDS,
        load=width if access and access[1] == "load" else 0,
        store=width if access and access[1] == "store" else 0,
    )


# Instructions to blocks --------------------------------------------------------------------------------


def blocks(lines: Iterable[Line]) -> list[Block]:
    """The basic blocks; the first is where a kernel begins."""
    found: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if found[-1] and (isinstance(line, str) or found[-1][-1].ends):
            found.append([])
        if isinstance(line, str):
            labels[line] = len(found) - 1
        else:
            found[-1].append(line)
    return [Block(tuple(b), _successors(b, i, labels, len(found))) for i, b in enumerate(found)]


def _successors(block: list[Instruction], at: int, labels: dict[str, int], total: int) -> tuple[int, ...]:
    last = block[-1] if block else None
    following = [at + 1] if at + 1 < total and not (last and last.ends and not last.conditional) else []
    jump = [labels[last.target]] if last and last.target in labels else []
    return tuple(dict.fromkeys(following + jump))


# Blocks to bodies --------------------------------------------------------------------------------------


def bodies(code: list[Block]) -> list[Body]:
    """All of the kernel, and each innermost loop that touches global memory."""
    order = _order(code)
    dominators = _dominators(code, order)
    back = {(a, b) for a in order for b in code[a].successors if b in dominators[a]}
    touching = {header: loop for header, loop in _loops(code, back).items() if _touches(code, loop)}
    innermost = {h: loop for h, loop in touching.items() if not any(o < loop for o in touching.values())}
    found = [_body(code, set(order), 0, back, None)]
    return found + [_body(code, loop, header, back, header) for header, loop in sorted(innermost.items())]


def _order(code: list[Block]) -> list[int]:
    """Blocks that can be reached, each before those that follow it, apart from branches back."""
    seen: set[int] = set()
    finished: list[int] = []
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(code[0].successors))]
    seen.add(0)
    while stack:
        at, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            finished.append(at)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(code[following].successors)))
    return finished[::-1]


def _dominators(code: list[Block], order: list[int]) -> dict[int, set[int]]:
    """For each block, the blocks through which every way to it leads."""
    before: dict[int, list[int]] = {b: [] for b in order}
    for a in order:
        for b in code[a].successors:
            before[b].append(a)
    found = {b: set(order) for b in order} | {order[0]: {order[0]}}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = {b} | set.intersection(*(found[a] for a in before[b]))
            changed |= new != found[b]
            found[b] = new
    return found


def _loops(code: list[Block], back: set[tuple[int, int]]) -> dict[int, set[int]]:
    """The blocks of every loop, under its first block."""
    before: dict[int, set[int]] = {}
    for a, block in enumerate(code):
        for b in block.successors:
            before.setdefault(b, set()).add(a)
    loops: dict[int, set[int]] = {}
    for latch, header in back:
        loop = loops.setdefault(header, {header})
        todo = [latch]
        while todo:
            at = todo.pop()
            if at not in loop:
                loop.add(at)
                todo += before.get(at, ())
    return loops


def _touches(code: list[Block], loop: set[int]) -> bool:
    return any(i.load or i.store for b in loop for i in code[b].instructions)


def _body(
    code: list[Block], region: set[int], start: int, back: set[tuple[int, int]], header: int | None
) -> Body:
    """The path to follow through a region; in a loop it comes back to the header."""
    within = [i for b in region for i in code[b].instructions]
    loads = Counter(i.load for i in within if i.load)
    stores = Counter(i.store for i in within if i.store)
    score = _scorer(_main_width(loads), _main_width(stores))
    best: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # block -> score to the end, and path
    for at in reversed([b for b in _order(code) if b in region]):
        ways = [best[b] for b in code[at].successors if b in best]  # which leaves out branches back
        ends = (at, header) in back or (header is None and not code[at].successors)
        ways += [((0,) * 5, ())] if ends else []
        if ways:
            rest, path = max(ways)
            best[at] = tuple(x + y for x, y in zip(score(code[at]), rest, strict=True)), (at, *path)
    path = best[start][1]
    return Body(header is not None, tuple(i for b in path for i in code[b].instructions))


def _scorer(load_width: int, store_width: int) -> Callable[[Block], tuple[int, ...]]:
    """Ranks by bytes loaded, then stored, in the main widths; fewest masks; fewest other accesses; length."""

    def score(block: Block) -> tuple[int, ...]:
        loads = [i for i in block.instructions if i.load == load_width > 0]
        stores = [i for i in block.instructions if i.store == store_width > 0]
        masked = sum(i.conditional for i in loads + stores)
        others = sum(bool(i.load or i.store) for i in block.instructions) - len(loads + stores)
        sizes = len(loads) * load_width, len(stores) * store_width
        return *sizes, -masked, -others, len(block.instructions)

    return score


def main_bodies(found: list[Body], elements: float, bytes_read: int) -> list[Body]:
    """The bodies that nearly all elements go through: one that reads, one that reads and writes, or both.

    They are loops that load as many elements as a thread has in a block; if there are none, the whole kernel.
    """
    whole, *loops = found
    large = [b for b in loops if b.bytes_loaded >= max(elements, 1) * bytes_read]
    if not large:
        return [whole]
    kinds = ([b for b in large if not b.stores], [b for b in large if b.stores])
    return [max(kind, key=_preference) for kind in kinds if kind]


def _preference(body: Body) -> tuple[float, ...]:
    size = body.bytes_loaded
    return body.load_width, body.store_width, -body.predicated / size, size, len(body.instructions) / size
