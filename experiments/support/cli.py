"""What the command lines share: flags, and errors of one line."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging

# JAX's C++ logs warnings of no use to a reader of results; an explicit level stands.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of everything random.", lower_bound=0, upper_bound=2**32 - 1
)
SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Networks that differ by their seed. If not set, 4 for each point of sweep, 5 in "
    "private and 10 in find_mislabeled.",
    lower_bound=1,
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    None,
    "A folder for the results as files, made if needed; if not set, none are written.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float64", "float32", "bfloat16"],
    "What to compute in. If not set, compare_gradients takes float64, the others "
    "float32.",
)
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "CPU devices of this process; one a core if not set.",
    lower_bound=1,
    upper_bound=4096,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first of several processes, for sweeps."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes in all, with --coordinator.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", lower_bound=0
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Find the other processes by what JAX detects: SLURM, Kubernetes, TPU pods.",
)


COMMON = ("seed", "output_dir")  # what every script takes of the above
PROCESSES = ("cpu_devices", "coordinator", "num_processes", "process_id", "distributed")


class InputError(Exception):
    """Something the user gave cannot be used; its text is one line for them."""


def output_dir() -> Path | None:
    """--output_dir, made and known to be writable before any work is done.

    Raises:
      InputError: If it cannot be made or written to.
    """
    if OUTPUT_DIR.value is None:
        return None
    if not OUTPUT_DIR.value:
        raise InputError("--output_dir is empty; a folder's name is accepted")
    path = Path(OUTPUT_DIR.value)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--output_dir={path}: a file, not a folder") from None
    except OSError as error:
        raise InputError(f"--output_dir={path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir={path}: not writable")
    return path


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_devices() -> None:
    """Gives this process its CPU devices and its part among processes, as flags say.

    To be called before JAX does anything else.

    Raises:
      InputError: If only some of a process's flags are given, or no others are found.
    """
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value or cores())
    given = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if given == (None, None, None) and not DISTRIBUTED.value:
        return
    if DISTRIBUTED.value == (given != (None, None, None)) or (
        not DISTRIBUTED.value and None in given
    ):
        raise InputError(
            "--coordinator, --num_processes and --process_id go together; "
            "--distributed stands alone"
        )
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=20)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no other processes can be joined: {reason}") from error


def _check_given() -> None:
    """No flag of another script is given, which would do nothing here."""
    known = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined:
            ours = module.startswith("experiments.")
            if ours and flag.present and flag.name not in known:
                raise InputError(f"--{flag.name} is not a flag of this script")


def launch(main: Callable[[], int]) -> NoReturn:
    """Parses flags and runs `main`, whose result is the exit status.

    A bad flag, an `InputError` and a file that cannot be read or written are one line
    on stderr and status 2; an interrupt is status 130, asking for help 0.
    """
    program = Path(sys.argv[0]).stem
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # the tables are full of ∂ and ŷ

    def fail(error: Exception) -> NoReturn:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

    def parse(argv: Sequence[str]) -> list[str]:
        argv = ["--help" if argument == "-h" else argument for argument in argv]
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            fail(error)
        except SystemExit:  # absl's help flags, which exit with 1
            sys.exit(0)

    def guarded(argv: Sequence[str]) -> int:
        try:
            if argv[1:]:
                raise InputError(f"{argv[1]!r}: not a flag; flags begin with --")
            _check_given()
            return main()
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (InputError, OSError) as error:
            fail(error)
        except KeyboardInterrupt:
            print(f"{program}: interrupted", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)  # an orderly exit can crash in a compilation under way

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)
    raise AssertionError("app.run does not return")
