"""Folders of runs: who may use them, and what is read from them."""

import gc
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments.support import resumable
from experiments.support.cli import InputError

CONFIGURATION = {"a": (1,), "b": "text"}


def opened(folder, configuration=CONFIGURATION):
    return resumable.lock_output_dir(folder, configuration)


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(InputError, match="another run is using it"),
        opened(tmp_path),
    ):
        pass
    with opened(tmp_path):
        pass


def test_a_folder_is_of_one_configuration(tmp_path):
    with opened(tmp_path):
        pass
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"format": resumable.FORMAT, "a": [1], "b": "text"}
    for other, message in [
        ({**CONFIGURATION, "a": (2,)}, r"another run, with a=\[1\] there, \[2\] here;"),
        ({"a": (1,)}, "another run, with b=text there, None here; use another folder"),
        ({**CONFIGURATION, "c": 0}, "another run, with c=None there, 0 here"),
    ]:
        with pytest.raises(InputError, match=message), opened(tmp_path, other):
            pass
    assert json.loads((tmp_path / "config.json").read_text()) == written


def test_the_same_data_may_have_another_path(tmp_path):
    digested = {"data": "a.csv", "data_digest": "1234", **CONFIGURATION}
    with opened(tmp_path, digested):
        pass
    with opened(tmp_path, digested | {"data": "/elsewhere/b.csv"}):
        pass
    with (
        pytest.raises(InputError, match="another run, with data_digest=1234 there, 5"),
        opened(tmp_path, digested | {"data_digest": "5678"}),
    ):
        pass


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "{"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with (
        pytest.raises(InputError, match=r"config\.json: expected the configuration"),
        opened(tmp_path),
    ):
        pass
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("number", [None, 1, 4, "3"])
def test_a_folder_of_another_format_is_refused(tmp_path, number):
    found = {"a": [1], "b": "text"} | ({} if number is None else {"format": number})
    (tmp_path / "config.json").write_text(json.dumps(found))
    shown = 1 if number is None else number
    message = rf"another version of these experiments \(format {shown}, expected 3\)"
    with pytest.raises(InputError, match=message), opened(tmp_path):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == found


@pytest.mark.parametrize("name", ["checkpoints", "parts"])
def test_work_of_an_unknown_run_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with (
        pytest.raises(InputError, match=rf"has {name} but no config\.json"),
        opened(tmp_path),
    ):
        pass
    assert not (tmp_path / "config.json").exists()


# ------------------------------------------------------------------------- checkpoints


def tree(value: float) -> Any:
    return {
        "numbers": jnp.full((2, 3), value, jnp.bfloat16),
        "key": jax.random.key(int(value)),
        "steps": np.int32(value),
    }


# Orbax leaves coroutines of other arrays behind when one cannot be read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_last_checkpoint_is_restored_to_the_bit(tmp_path):
    with resumable.open_checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        assert checkpoints.restore(tree(0.0)) is None
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step + 0.5))
    with resumable.open_checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        found: Any = checkpoints.restore(tree(0.0))
    assert found["numbers"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["numbers"], tree(3.5)["numbers"])
    assert found["key"] == jax.random.key(3)
    assert found["steps"] == 3
    with resumable.open_checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        other = tree(0.0) | {"numbers": jnp.zeros(7)}
        with pytest.raises(InputError, match=r"checkpoint 3 cannot be read .*; delete"):
            checkpoints.restore(other)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with (
        resumable.open_checkpoints(tmp_path, CONFIGURATION) as checkpoints,
        pytest.raises(InputError, match="checkpoints: checkpoint 3 cannot be read"),
    ):
        checkpoints.restore(tree(0.0))
    gc.collect()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError(
            "RESOURCE_EXHAUSTED: No space left on device\nand a long story"
        )

    monkeypatch.setattr(resumable.ocp.CheckpointManager, "save", full)
    with (
        resumable.open_checkpoints(tmp_path, CONFIGURATION) as checkpoints,
        pytest.raises(InputError, match=r"checkpoints: .*No space left on device$"),
    ):
        checkpoints.save(1, tree(0.0))


# ------------------------------------------------------------------------------ chunks

OPTIONS: Any = {"configuration": CONFIGURATION, "unit": "networks"}


def chunk(i: int) -> pd.DataFrame:
    return pd.DataFrame({"chunk": [i, i], "value": [0.1 * i, 0.3]})


def test_chunks_are_computed_once_and_resumed_after_an_error(tmp_path, capfd):
    computed, interrupt_at = [], {2}

    def compute(i: int) -> pd.DataFrame:
        if i in interrupt_at:
            interrupt_at.remove(i)
            raise KeyboardInterrupt
        computed.append(i)
        return chunk(i)

    sizes = [2, 2, 2, 2]
    with pytest.raises(KeyboardInterrupt):
        resumable.compute_chunks(compute, sizes, folder=tmp_path, **OPTIONS)
    assert computed == [0, 1]
    found = resumable.compute_chunks(compute, sizes, folder=tmp_path, **OPTIONS)
    assert computed == [0, 1, 2, 3]
    assert "Resuming: 4 of 8 networks are done." in capfd.readouterr().out
    resumable.compute_chunks(compute, sizes, folder=tmp_path, **OPTIONS)
    assert computed == [0, 1, 2, 3]
    alone = resumable.compute_chunks(chunk, sizes, folder=None, **OPTIONS)
    pd.testing.assert_frame_equal(found, alone)
    pd.testing.assert_frame_equal(
        found, pd.concat(map(chunk, range(4))).reset_index(drop=True)
    )


def test_processes_agree_on_what_is_known(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        resumable.multihost_utils,
        "broadcast_one_to_all",
        lambda value: sent.append(value.tolist()) or value,
    )
    resumable.compute_chunks(chunk, [2, 2], folder=tmp_path, **OPTIONS)
    (tmp_path / "parts" / "0.parquet").unlink()
    resumable.compute_chunks(chunk, [2, 2], folder=tmp_path, **OPTIONS)
    assert sent == [True, [False, False], True, [False, True]]


def test_other_processes_hear_of_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        resumable.multihost_utils,
        "broadcast_one_to_all",
        lambda value: sent.append(value.tolist()) or value,
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    resumable.compute_chunks(chunk, [2], folder=folder, **OPTIONS)
    (folder / "parts" / "0.parquet").unlink()
    (folder / "parts").rmdir()
    (folder / "parts").write_text("a file")
    with pytest.raises(FileExistsError):
        resumable.compute_chunks(chunk, [2], folder=folder, **OPTIONS)
    assert sent == [True, [False], False]


def test_a_damaged_part_is_named(tmp_path):
    resumable.compute_chunks(chunk, [2, 2], folder=tmp_path, **OPTIONS)
    (tmp_path / "parts" / "0.parquet").unlink()
    (tmp_path / "parts" / "1.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"1\.parquet: cannot be read .*delete it"):
        resumable.compute_chunks(chunk, [2, 2], folder=tmp_path, **OPTIONS)
    assert not (tmp_path / "parts" / "0.parquet").exists()


def test_parts_of_another_run_are_refused_and_left_as_they_are(tmp_path):
    resumable.compute_chunks(chunk, [2], folder=tmp_path, **OPTIONS)
    before = (tmp_path / "parts" / "0.parquet").read_bytes()
    other: Any = OPTIONS | {"configuration": {"a": 2}}
    with pytest.raises(InputError, match="another run, with a="):
        resumable.compute_chunks(chunk, [2, 2], folder=tmp_path, **other)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["0.parquet"]
    assert (tmp_path / "parts" / "0.parquet").read_bytes() == before
