"""Counts of the instructions of a TPU's kernel, from the last code of its compiler.

libtpu writes the instructions that the core issues together as one line, a bundle.
Their number is not a time: a bundle may wait for memory or for a matrix unit.
Of kernels that XLA makes, with loops whose lengths are not in the text, nothing is
counted.
"""

import re
from pathlib import Path

# A bundle: its address, a mark, one ">" per loop that it is in, and its instructions.
_BUNDLE = re.compile(
    r"\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*((?:> ?)*)\s*\{", re.MULTILINE
)


def flags(folder: str) -> str:
    """Flags in LIBTPU_INIT_ARGS, for libtpu to write bundles to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=^final_bundles"
    )


def innermost_loop_bundles(folder: Path, kernel: str) -> int:
    """The number of bundles in the innermost loop of a kernel.

    Args:
      folder: What libtpu has written for one program.
      kernel: Name of the kernel.
    """
    (path,) = folder.glob(f"*-{kernel}.*-final_bundles.txt")
    text = path.read_text(encoding="utf-8")
    depths = [found[1].count(">") for found in _BUNDLE.finditer(text)]
    return depths.count(max(depths))
