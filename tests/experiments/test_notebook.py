"""`experiments/derivation.ipynb`: it runs, and prints what is committed.

After a change of the notebook, write its outputs anew with
`python -m tests.experiments.test_notebook`.
"""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "derivation.ipynb"
LARGEST_FILE = 200_000  # bytes, of which the pictures are most
TIMEOUT = 600  # seconds for a cell: ends a kernel that hangs, and measures nothing
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class _KernelSpecs(KernelSpecManager):
    """The running interpreter under every name, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


class _KernelManager(AsyncKernelManager):
    @default("kernel_spec_manager")
    def _running_interpreter(self) -> KernelSpecManager:
        return _KernelSpecs(parent=self)


def read() -> Any:
    """The notebook as committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: Any) -> Any:
    """The notebook with the outputs of a run, in the root of the repository.

    The kernel ends with the run, also if a cell fails.
    """
    result = copy.deepcopy(notebook)
    client = NotebookClient(
        result,
        kernel_manager_class=_KernelManager,
        resources={"metadata": {"path": str(ROOT)}},
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        coalesce_streams=True,
        record_timing=False,
    )
    with tempfile.TemporaryDirectory() as folder:  # not the user's own start-up files
        env = {**os.environ, "IPYTHONDIR": folder, "JAX_PLATFORMS": "cpu"}
        env.pop("MPLBACKEND", None)  # the kernel's own shows figures
        client.execute(env=env)
    result.metadata = nbformat.from_dict(METADATA)
    return result


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(output: Any) -> list[str]:
    """The stream of an output, or the types of its data."""
    if output.output_type == "stream":
        return [output.name]
    return sorted(output.get("data", ["error"]))


def text(cell: Any) -> str:
    """Everything a cell shows, a picture by its size."""
    lines = []
    for output in cell.outputs:
        lines.append(f"[{', '.join(kinds(output))}]")
        lines.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(lines)


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_is_committed():
    committed = read()
    executed = execute(committed)
    for before, after in zip(code_cells(committed), code_cells(executed), strict=True):
        assert text(after) == text(before), f"in:\n{before.source}"


def test_outputs_are_committed_in_order_without_errors_or_warnings():
    cells = code_cells(read())
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    found = [kind for cell in cells for out in cell.outputs for kind in kinds(out)]
    assert set(found) == {"stdout", "image/png", "text/plain"}  # no error, no stderr
    assert found.count("image/png") == 2


def test_the_file_is_small_and_carries_nothing_of_who_ran_it():
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size <= LARGEST_FILE
    assert notebook.metadata == METADATA
    assert [cell.id for cell in notebook.cells if cell.metadata] == []


if __name__ == "__main__":
    nbformat.write(execute(read()), NOTEBOOK)
