import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, flags
from work_for_jobs import note

import teacher_student_model
from engine.checkpoints import load_checkpoint
from engine.jobs import run_in_processes


def times(folder) -> dict[str, tuple[float, float]]:
    found = {path.name: path.read_text().split() for path in folder.iterdir()}
    return {name: (float(began), float(ended)) for name, (began, ended, _) in found.items()}


def test_a_student_waits_for_its_teacher_and_others_do_not(tmp_path):
    teacher, alone, student = (("teacher", tmp_path), ("alone", tmp_path), ("student", tmp_path))
    run_in_processes(note, {teacher: None, student: teacher, alone: None}, jobs=2)  # the teacher waits for "alone"
    found = times(tmp_path)
    assert found["student"][0] >= found["teacher"][1] >= found["alone"][1]


def test_a_failure_ends_the_others_and_gives_its_status(tmp_path):
    with pytest.raises(SystemExit) as exit:
        run_in_processes(note, {("fails", tmp_path): None, ("other", tmp_path): None}, jobs=1)
    assert exit.value.code == 7
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_named(tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        run_in_processes(note, {("is killed", tmp_path): None}, jobs=1)
    assert exit.value.code == 128 + signal.SIGKILL
    assert "is killed seed" in (output := capfd.readouterr().err)
    assert "was killed by signal 9, as when memory runs out" in output


def test_jobs_train_the_whole_experiment(tmp_path, capfd):
    """Two students start at the same time, and the logits of their teacher are computed once."""
    words = flags(tmp_path, "--jobs=2", "--only", "teacher", "student_kd", "--sweep", "student_kd.temperature=1,4")
    teacher_student_model.main([*words, "--teacher.epochs=1", "--student_kd.epochs=1"])
    for name in ("teacher", "student_kd-temperature-1", "student_kd-temperature-4"):
        assert load_checkpoint(tmp_path / f"checkpoints/demo/seed0/{name}.pt")["finished"]
    output = capfd.readouterr().err
    assert output.count("epoch  1/1") == 3
    assert sorted(re.findall(r"logits of teacher  (\w+ \w+)", output)) == ["100 computed", "read from"]
    started = [output.index(f"student_kd-temperature-{t} seed 0  resnet18") for t in (1, 4)]
    assert max(started) < output.index("epoch  1/1", min(started))


@pytest.mark.chaos
@pytest.mark.parametrize("to_all", [False, True], ids=["parent", "all"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_jobs_and_the_same_command_resumes(tmp_path, number, to_all):
    """A terminal sends Ctrl-C to all processes of a command, and the parent passes it on."""
    words = flags(tmp_path, "--jobs=2", "--only", "teacher", "student")
    words += ["--teacher.epochs=300", "--student.epochs=300"]
    command = [sys.executable, "teacher_student_model.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    waiting = {"teacher seed 0  epoch", "student seed 0  epoch"}
    while process.poll() is None and waiting:
        line = process.stderr.readline()
        waiting = {start for start in waiting if start not in line}
    (os.killpg if to_all else os.kill)(process.pid, number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    for name in ("teacher", "student"):
        state = load_checkpoint(tmp_path / f"checkpoints/demo/seed0/{name}.pt")
        assert not state["finished"]
        assert state["history"]
