"""Shared flags, CPU devices and processes, and one-line error messages."""

import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

# Hides warnings of JAX's C++ code that do not help users; a level already set is kept.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all random numbers.", lower_bound=0, upper_bound=2**32 - 1
)
SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Networks that differ only by their seed.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
FOLDS = flags.DEFINE_integer(
    "folds",
    None,
    "Number of folds; each is held out by networks trained on the other folds.",
    lower_bound=2,
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    None,
    "Folder for the result files, created if needed. If not set, none are written.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float64", "float32", "bfloat16"],
    "Floating-point type to compute in.",
)
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "CPU devices of this process. If not set, one per core.",
    lower_bound=1,
    upper_bound=4096,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first process, if several share the work."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, with --coordinator.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "Index of this process, from 0, with --coordinator.",
    lower_bound=0,
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Let JAX find the other processes, as on SLURM, Kubernetes and TPU pods.",
)


COMMON = ("seed", "output_dir")  # flags that every command takes
PROCESSES = ("cpu_devices", "coordinator", "num_processes", "process_id", "distributed")


class InputError(Exception):
    """Invalid input from the user, who sees only its one-line message."""


class InputTableError(InputError):
    """Invalid input with several mistakes, whose message is a table of them."""


def output_dir() -> Path | None:
    """Creates the folder --output_dir and returns its path; None if it is not set.

    Raises:
      InputError: If it cannot be created or written to.
    """
    if OUTPUT_DIR.value is None:
        return None
    if not OUTPUT_DIR.value:
        raise InputError("--output_dir: expected the name of a folder, got none")
    path = Path(OUTPUT_DIR.value)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--output_dir={path}: is a file, not a folder") from None
    except OSError as error:
        raise InputError(f"--output_dir={path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir={path}: is not writable")
    return path


def distinct_numbers(
    flag: flags.FlagHolder[str | None],
    kind: type[int] | type[float],
    low: float,
    high: float = math.inf,
) -> tuple[Any, ...]:
    """The comma-separated numbers of a flag, in the order given.

    Args:
      flag: The flag.
      kind: The type of the numbers.
      low: The smallest number accepted.
      high: The largest number accepted; infinity itself never is.

    Raises:
      InputError: If one is not such a number, or is repeated.
    """
    text = flag.value or ""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    in_range = all(low <= value <= high and value != math.inf for value in values)
    if not in_range or len(set(values)) < len(values):
        what = "integers" if kind is int else "finite numbers"
        bounds = f">= {low:g}" if high == math.inf else f"from {low} to {high}"
        raise InputError(
            f"--{flag.name}={text}: expected distinct comma-separated {what} {bounds}"
        )
    return values


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_devices() -> None:
    """Sets up CPU devices, and joins the other processes if the flags say so.

    Call it before JAX does anything else.

    Raises:
      InputError: If some of the flags for processes are missing, or the other processes
        cannot be reached.
    """
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value or cores())
    given = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if given == (None, None, None) and not DISTRIBUTED.value:
        return
    if DISTRIBUTED.value == (given != (None, None, None)) or (
        not DISTRIBUTED.value and None in given
    ):
        raise InputError(
            "expected --coordinator, --num_processes and --process_id together, or "
            "--distributed alone"
        )
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot join the other processes: {reason}") from error


def _check_flags() -> None:
    """Rejects flags of other commands, which would have no effect here."""
    known = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined:
            ours = module.startswith("experiments.")
            if ours and flag.present and flag.name not in known:
                raise InputError(f"--{flag.name} is not a flag of this command")


def launch(
    main: Callable[[], int],
    defaults: Mapping[str, Any] | None = None,
    help_texts: Mapping[str, str] | None = None,
) -> NoReturn:
    """Parses the flags and runs `main`, whose result is the exit status.

    A bad flag, an `InputError`, or a file that cannot be read or written prints one
    line to stderr and exits with status 2. An interrupt exits with status 130, and
    --help with status 0.

    Args:
      main: The command.
      defaults: The command's own defaults for shared flags, as --help shows them.
      help_texts: The command's own help texts for shared flags.
    """
    program = Path(sys.argv[0]).stem
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # the tables contain ∂ and ŷ

    def fail(error: Exception) -> NoReturn:
        message = str(error)
        if not isinstance(error, InputTableError):
            message = " ".join(message.split())
        print(f"{program}: {message}", file=sys.stderr)
        sys.exit(2)

    def drop_output() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def parse(argv: Sequence[str]) -> list[str]:
        argv = ["--help" if argument == "-h" else argument for argument in argv]
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            fail(error)
        except SystemExit:  # absl exits with 1 after --help
            sys.exit(0)
        except BrokenPipeError:
            drop_output()
            sys.exit(1)

    def guarded(argv: Sequence[str]) -> int:
        try:
            if argv[1:]:
                raise InputError(f"{argv[1]!r}: expected a flag, which begins with --")
            _check_flags()
            # On a GPU float32 products would otherwise be rounded to TF32's 10 bits.
            jax.config.update("jax_default_matmul_precision", "highest")
            return main()
        except BrokenPipeError:  # a reader such as head has closed the pipe
            drop_output()
            return 1
        except (InputError, OSError) as error:
            fail(error)
        except MemoryError as error:
            fail(InputError(f"not enough memory: {error}"))
        except KeyboardInterrupt:
            print(f"{program}: interrupted", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)  # an orderly exit can crash while a compilation is under way

    for name, value in (defaults or {}).items():
        flags.FLAGS.set_default(name, value)
    for name, text in (help_texts or {}).items():
        flags.FLAGS[name].help = text
    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)
    raise AssertionError("app.run does not return")
