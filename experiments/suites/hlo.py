"""Counts of the kernels and bytes of a compiled program, from the text of its HLO.

Kernels are what a device starts one by one: fusions, library calls, and operations that
are not fused. The bytes of a kernel are those of its operands and results in the memory
of the device, with the padding of their tiles. An array of which it only reads or
writes a slice counts as the slice. Single numbers, and arrays in another memory space,
such as the memory on the chip of a TPU, `S(1)` in a layout, cost nothing. What a TPU
does with single numbers, outside fusions, is left to its scalar unit and not counted.
"""

import functools
import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(
    r"(?:calls|condition|body|to_apply|true_computation|false_computation"
    r"|branch_computations)=(\{[^}]*\}|%[\w.-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_PRODUCTS = ("dot", "convolution")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATE = "dynamic-update-slice"
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
)
_FREE_CALLS = re.compile('"(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')


class Instruction(NamedTuple):
    """One instruction; `shape` and `attributes` are text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self) -> list[str]:
        """Names of the computations that it runs; of a loop, condition and body."""
        return re.findall(r"%([\w.-]+)", str(_CALLED.findall(self.attributes)))


class Cost(NamedTuple):
    """Cost of a computation; a loop of unknown length counts as one iteration.

    Attributes:
      kernels: Number of kernels.
      products: Number of matrix products, fused or not.
      transposes: Number of transposes, fused or not.
      copies: Number of copies, fused or not.
      bytes: Bytes that kernels read and write in the memory of the device.
    """

    kernels: int = 0
    products: int = 0
    transposes: int = 0
    copies: int = 0
    bytes: int = 0


def array_bytes(shape: str, *, padded: bool = True, anywhere: bool = False) -> int:
    """Bytes of an array, or of those of a tuple, in the memory of the device.

    Args:
      shape: The text of a shape, such as `f32[8,30]{1,0:T(8,128)S(1)}`.
      padded: Whether to include the padding of tiles.
      anywhere: Whether to include arrays in other memory spaces.
    """
    total = 0
    for dtype, dims, order, layout in _ARRAY.findall(shape):
        sizes = [int(size) for size in dims.split(",") if size]
        if math.prod(sizes) == 1 or ("S(" in layout and not anywhere):
            continue
        if padded and (tile := re.search(r"T\(([\d,]+)\)", layout)):
            minor_first = [sizes[int(i)] for i in order.split(",") if i]
            tiles = [int(size) for size in reversed(tile[1].split(","))]
            rank = max(len(tiles), len(minor_first))
            minor_first += [1] * (rank - len(minor_first))
            tiles += [1] * (rank - len(tiles))
            sizes = [-(-n // t) * t for n, t in zip(minor_first, tiles, strict=True)]
        bits = 8 if dtype == "pred" else int("".join(re.findall(r"\d+", dtype)[:1]))
        total += math.prod(sizes) * bits // 8
    return total


class Module:
    """The computations of a compiled program."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        instructions: list[Instruction] = []
        self._entry = ""
        for line in text.splitlines():
            if _INSTRUCTION.match(line):
                instructions.append(_instruction(line))
            elif header := _COMPUTATION.match(line):
                instructions = self._computations.setdefault(header[2], [])
                self._entry = header[2] if header[1] else self._entry
        self.cost = functools.cache(self._cost)

    def step_loop(self) -> Instruction | None:
        """The innermost loop with matrix products; of several, that of most kernels."""
        loops = [
            each
            for instructions in self._computations.values()
            for each in instructions
            if each.opcode == "while" and self.cost(self.body(each)).products
        ]
        innermost = [
            loop
            for loop in loops
            if not any(inner in loops for inner in self._reachable(self.body(loop)))
        ]
        return max(innermost, key=lambda i: self.cost(self.body(i)), default=None)

    def body(self, loop: Instruction) -> str:
        """Name of the body of a loop."""
        return loop.called()[1]

    def trip_count(self, loop: Instruction) -> int | None:
        """Number of iterations of a loop, if it is known to the compiler."""
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition = {each.name: each for each in self._computations[loop.called()[0]]}
        (root,) = (each for each in condition.values() if each.is_root)
        if root.opcode != "compare":
            return None
        for operand in root.operands:
            if condition[operand].opcode == "constant":
                return int(condition[operand].literal)
        return None

    def _reachable(self, computation: str) -> list[Instruction]:
        """All instructions of a computation and of those that it runs."""
        found = list(self._computations.get(computation, []))
        for each in self._computations.get(computation, []):
            for name in each.called():
                found += self._reachable(name)
        return found

    def _cost(self, computation: str = "", target: str = "") -> Cost:
        """The cost of running a computation once.

        Args:
          computation: Its name; the default is the whole program.
          target: Counts only custom calls of this target, if not empty.
        """
        instructions = self._computations[computation or self._entry]
        shapes = {each.name: each.shape for each in instructions}
        total, times = [0] * len(Cost._fields), 1
        for each in instructions:
            if each.opcode in _FREE or _FREE_CALLS.search(each.attributes):
                continue
            if each.opcode == "while":
                times = self.trip_count(each) or 1
                cost = self.cost(self.body(each), target)
            elif each.opcode == "conditional":
                branches = [self.cost(name, target) for name in each.called()]
                times, cost = 1, max(branches, key=lambda cost: cost.bytes)
            elif each.opcode == "call":
                times, cost = 1, self.cost(each.called()[0], target)
            elif target and f'custom_call_target="{target}"' not in each.attributes:
                continue
            else:
                times, cost = 1, self._kernel(each, shapes)
            total = [a + times * b for a, b in zip(total, cost, strict=True)]
        return Cost(*total)

    def _kernel(self, kernel: Instruction, shapes: dict[str, str]) -> Cost:
        is_number = re.fullmatch(r"\w+\[[1,]*\]\{.*T\(.*", kernel.shape)
        if is_number and kernel.opcode not in ("fusion", "custom-call", "reduce"):
            return Cost()
        is_fused = kernel.opcode in ("fusion", "async-start")
        inner = self._reachable(kernel.called()[0]) if is_fused else [kernel]
        opcodes = [each.opcode for each in inner]
        is_library = kernel.opcode == "custom-call" and "gemm" in kernel.attributes
        return Cost(
            kernels=not kernel.opcode.endswith(("-done", "-update")),
            products=is_library + sum(opcodes.count(name) for name in _PRODUCTS),
            transposes=opcodes.count("transpose"),
            copies=opcodes.count("copy") + opcodes.count("copy-start"),
            bytes=self._bytes(kernel, shapes),
        )

    def _bytes(self, kernel: Instruction, shapes: dict[str, str]) -> int:
        """Bytes that a kernel reads and writes."""
        operands = [shapes[name] for name in kernel.operands]
        results = [found[0] for found in _ARRAY.finditer(kernel.shape)]
        if kernel.opcode.endswith("-done"):  # writes what its start reads
            return array_bytes(kernel.shape)
        if kernel.opcode.endswith("-start"):
            reads = sum(map(array_bytes, operands))
            if "slice" not in kernel.opcode:
                return reads
            parts = (array_bytes(shape, anywhere=True) for shape in results)
            return min(reads, *filter(None, parts))
        # In a fusion: the instructions, the parameters in order, and the results.
        inner, names, roots = [kernel], kernel.operands, [kernel]
        if kernel.opcode == "fusion":
            inner = self._computations[kernel.called()[0]]
            numbers = {i.literal: i.name for i in inner if i.opcode == "parameter"}
            names = [numbers[str(i)] for i in range(len(operands))]
            by_name = {each.name: each for each in inner}
            shapes = {name: each.shape for name, each in by_name.items()}
            roots = [each for each in inner if each.is_root]
            if roots[0].opcode == "tuple":
                roots = [by_name[name] for name in roots[0].operands]
        read = sum(
            _bytes_read(shape, name, inner)
            for shape, name in zip(operands, names, strict=True)
        )
        return read + sum(
            _bytes_written(shape, root, shapes)
            for shape, root in zip(results, roots, strict=False)
        )


def _bytes_read(shape: str, name: str, users: list[Instruction]) -> int:
    """Bytes that these instructions read of an operand, of which some take slices."""
    slices = []
    for user in users:
        if name not in user.operands:
            continue
        is_first = user.operands.index(name) == 0 and user.operands.count(name) == 1
        if not is_first or user.opcode not in (*_SLICES, _UPDATE):
            return array_bytes(shape)
        if user.opcode in _SLICES:  # an update reads nothing of what it updates
            slices.append(array_bytes(user.shape, anywhere=True))
    return min(array_bytes(shape), sum(slices))


def _bytes_written(shape: str, root: Instruction, shapes: dict[str, str]) -> int:
    """Bytes of a result, of which only a part may be updated."""
    if root.opcode != _UPDATE:
        return array_bytes(shape)
    part = array_bytes(shapes[root.operands[1]], anywhere=True)
    return min(array_bytes(shape), part)


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    assert found is not None
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    return Instruction(
        name=found[2],
        shape=line[start:end],
        opcode=line[end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.-]+)", line[opening:closing])),
        literal=line[opening + 1 : closing - 1],
        attributes=line[closing:],
        is_root=bool(found[1]),
    )


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"expected a closing parenthesis in {text[start:]!r}")
