"""What the command lines share: flags, and errors of one line."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

# JAX's C++ logs warnings of no use to a reader of results; an explicit level stands.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

DATASET = flags.DEFINE_enum(
    "dataset",
    "digits",
    ["digits", "breast_cancer"],
    "Data that ships with scikit-learn. digits: odd against even, 1797 images of 8x8.",
)
DATA = flags.DEFINE_string(
    "data", None, "A .csv or .parquet file to use in place of --dataset."
)
TARGET = flags.DEFINE_string(
    "target",
    None,
    "The column of --data with the labels, of any two values; the larger is label 1. "
    "Every other column is a feature and must be numeric.",
)
HIDDEN = flags.DEFINE_list(
    "hidden", ["32"], "Widths of the hidden layers, comma-separated; '' for none."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "A folder for the results as JSON, CSV and PNG; made if needed."
)


class InputError(Exception):
    """Something the user gave cannot be used; its text is one line for them."""


def hidden_sizes() -> tuple[int, ...]:
    """--hidden as integers.

    Raises:
      InputError: If one of them is not an integer >= 1.
    """
    try:
        sizes = tuple(int(n) for n in HIDDEN.value)
    except ValueError:
        sizes = (0,)
    if any(n < 1 for n in sizes):
        raise InputError(
            f"--hidden={','.join(HIDDEN.value)}: widths are integers >= 1, "
            "comma-separated"
        )
    return sizes


def output_dir() -> Path | None:
    """--output_dir, made and known to be writable before any work is done.

    Raises:
      InputError: If it cannot be made or written to.
    """
    if OUTPUT_DIR.value is None:
        return None
    path = Path(OUTPUT_DIR.value)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir={path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir={path}: not writable")
    return path


def launch(main: Callable[[], int]) -> NoReturn:
    """Parses flags and runs `main`, whose result is the exit status.

    A bad flag, and an `InputError`, is one line on stderr and status 2.
    """
    program = Path(sys.argv[0]).stem

    def fail(error: Exception) -> NoReturn:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            fail(error)

    def guarded(argv: Sequence[str]) -> int:
        try:
            if argv[1:]:
                raise InputError(f"{argv[1]!r}: not a flag; flags begin with --")
            return main()
        except InputError as error:
            fail(error)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)
    raise AssertionError("app.run does not return")
