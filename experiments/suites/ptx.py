"""Counts of the instructions of a GPU's kernel, from what its compiler writes.

PTX is what the last stage of the compiler, ptxas, gets. It makes about as many machine
instructions of it, and says how many registers they need and what it spills to memory.
Their number is not a time.
"""

import re
from pathlib import Path

_LABEL = re.compile(r"(\$\w+):")
_INSTRUCTION = re.compile(r"\t(?:@!?%p\d+ )?[a-z].*;$")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_RESOURCES = {
    "registers": re.compile(r"Used (\d+) registers"),
    "spilled_bytes": re.compile(r"(\d+) bytes spill stores"),
}


def environment(folder: str) -> dict[str, str]:
    """Environment variables for Mosaic GPU to write PTX and resources to a folder."""
    return {
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def loop_instructions(text: str) -> list[int]:
    """The numbers of PTX instructions in each loop, without those of loops within it.

    Args:
      text: PTX of a kernel.

    Returns:
      One number per loop, the innermost first.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        elif _INSTRUCTION.match(line):
            count += 1
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], count))
    loop_of = [-1] * count
    loops.sort(key=lambda loop: loop[0] - loop[1])  # the outermost first
    for i, (begin, end) in enumerate(loops):
        loop_of[begin:end] = [i] * (end - begin)
    return [loop_of.count(i) for i in reversed(range(len(loops)))]


def resources(folder: Path, kernel: str) -> dict[str, int]:
    """Registers per thread, and bytes per thread that are spilled to memory."""
    (path,) = folder.glob(f"{kernel}_*.ptxas")
    text = path.read_text(encoding="utf-8")
    return {
        name: max(int(number) for number in pattern.findall(text))
        for name, pattern in _RESOURCES.items()
    }


def step_instructions(folder: Path, kernel: str, passes: int) -> int:
    """The number of PTX instructions of a step of a kernel with two loops.

    Args:
      folder: What Mosaic GPU has written for one program.
      kernel: Name of the kernel.
      passes: Iterations of the inner loop per step.
    """
    (path,) = folder.glob(f"{kernel}_*.ptx")
    inner, outer = loop_instructions(path.read_text(encoding="utf-8"))
    return inner * passes + outer
