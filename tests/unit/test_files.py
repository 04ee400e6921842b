import errno
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT

from engine import checkpoints, files, models
from engine.errors import UserError
from engine.fingerprints import find_identical_model
from engine.settings import Model
from engine.sources import open_image

STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "history": [{"loss": 0.5}], "classes": ["a", "b"]}


@pytest.mark.chaos
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on file sizes is POSIX")
def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    path = tmp_path / "model.pt"
    checkpoints.save_checkpoint(path, STATE)
    code = f"""
import resource, torch
from engine import checkpoints
from engine.errors import exit_on_error
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
with exit_on_error():
    checkpoints.save_checkpoint({str(path)!r}, {{"model": {{"weight": torch.zeros(10**6)}}}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {path}: cannot be written (File too large); it takes 5 MB" in done.stderr
    assert torch.equal(checkpoints.load_checkpoint(path)["model"]["weight"], STATE["model"]["weight"])
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file_and_removes_the_temporary_one(tmp_path, monkeypatch, fails):
    path = tmp_path / "model.pt"
    checkpoints.save_checkpoint(path, STATE)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(UserError, match=r"model.pt: cannot be written \(No space left on device\); it takes 1 MB"):
        checkpoints.save_checkpoint(path, {"model": {}})
    assert torch.equal(checkpoints.load_checkpoint(path)["model"]["weight"], STATE["model"]["weight"])
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_failed_save_leaves_no_view_of_its_buffer(tmp_path, monkeypatch):
    """One that outlives the buffer, in a traceback, ends Python 3.12.1 with signal 11."""
    views = []

    def fail(path, *parts):
        views.append(parts[0])
        raise UserError("full")

    monkeypatch.setattr(checkpoints, "write_durably", fail)
    with pytest.raises(UserError):
        checkpoints.save_checkpoint(tmp_path / "model.pt", STATE)
    with pytest.raises(ValueError, match="released"):
        len(views[0])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe with a name is POSIX")
def test_a_pipe_is_not_read(tmp_path, config, digits):
    """Reading one never ends. So it is with its own name, in another run, as stored logits and as weights."""
    path = Model("student", 0, config).path
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    for read in (checkpoints.load_training, checkpoints.load_checkpoint, models.read_weights):
        with pytest.raises(UserError, match="not a file"):
            read(path)
    assert checkpoints.read_metadata(path) is None
    missing = checkpoints.load_logits(path, {}, (2, 3))
    assert missing.isnan().all()
    with pytest.raises(UserError, match="not a file"):
        open_image(path)
    path.rename(path.with_name("other.pt"))
    assert find_identical_model(Model("student", 0, config), {}) is None


def test_only_a_full_disk_is_answered_with_free_some_space(tmp_path, monkeypatch):
    def fails_with(number: int):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        return fail

    for number, full in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, False), (errno.EACCES, False)):
        monkeypatch.setattr(os, "fsync", fails_with(number))
        with pytest.raises(UserError) as error:
            files.write_durably(tmp_path / "file", b"")
        assert ("space" in str(error.value).partition(")")[2]) == full


def test_the_lock_refuses_a_second_process_and_outlives_no_process(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import pathlib, time
from engine import files
with files.lock(pathlib.Path({str(folder)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=f"{folder}: another process is writing there"),
        files.lock(folder),
    ):
        pass
    other.kill()
    other.wait()
    for _ in range(2):  # an orderly end gives it back as well
        with files.lock(folder):
            assert (tmp_path / ".run.lock").exists()
    assert os.listdir(tmp_path) == [".run.lock"]  # it stays: another process may be about to lock it


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="a POSIX flag")
def test_a_lock_can_be_waited_for(tmp_path):
    entered = threading.Event()
    files.write_durably(tmp_path / "run/file", b"")

    def enter() -> None:
        with files.lock(tmp_path / "run", wait=True):
            entered.set()

    with files.lock(tmp_path / "run"):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(timeout=10)
    assert entered.is_set()


def test_the_lock_holds_while_the_folder_is_renamed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with files.lock(folder):
        folder.rename(tmp_path / "other")
        with pytest.raises(UserError, match="another process is writing there"), files.lock(folder):
            pass


def test_all_who_wait_for_the_lock_on_a_folder_get_it_in_turn(tmp_path):
    held, entered = [], []

    def enter() -> None:
        with files.lock(tmp_path / "runs" / "run", wait=True):
            held.append(1)
            entered.append(len(held))
            time.sleep(0.01)
            held.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert entered == [1] * 8


def test_a_symbolic_link_as_lock_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".run.lock").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"), files.lock(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"
