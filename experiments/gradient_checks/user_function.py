"""Loads a user's function by name, and reports its errors in one line."""

import functools
import importlib
import os
import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments
import jaxbce
from experiments.support.cli import InputError

# Frames in these files do not show where the user's mistake is.
_SKIPPED_PATHS = re.compile(r"<|.*[/\\](site|dist)-packages[/\\]")
_SKIPPED_FOLDERS = tuple(
    f"{folder}{os.sep}"
    for folder in (
        sysconfig.get_path("stdlib"),
        *experiments.__path__,
        *jaxbce.__path__,
    )
)


def load(name: str) -> Callable[..., Any]:
    """Imports `module:function`.

    Returns:
      The function. An exception that it raises becomes an `InputError` that names the
      place.

    Raises:
      InputError: If there is no such module or function, or importing it fails.
    """
    module_name, _, function_name = name.partition(":")
    parts = [*module_name.split("."), function_name]
    if not all(map(str.isidentifier, parts)) or module_name.endswith(".py"):
        raise InputError(
            f"--check={name}: expected module:function, such as mine:value_and_grad "
            "for a function of mine.py"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(f"--check={name}: {_describe(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"--check={name}: {module_name} has no function {function_name}"
        )

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (Exception, SystemExit) as error:
            raise InputError(f"--check={name}: {_describe(error)}") from error

    return checked


def _describe(error: BaseException) -> str:
    """Type and first line of an error, and the last place in the user's files."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = frame.filename
        if _SKIPPED_PATHS.match(path) or path.startswith(_SKIPPED_FOLDERS):
            continue
        file = Path(path).name
        return f"{text} ({file}, line {frame.lineno}: {frame.line})"
    return text
