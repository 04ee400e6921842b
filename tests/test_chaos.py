"""Runs that are killed, stopped, starved and fed with rubbish: `make chaos`, half an hour.

Each test prints what it did and how often. Smaller versions of most are in the other files, which `make test` runs.
"""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_FLAGS
from conftest import flags as small_flags
from PIL import Image

import utils
from config import UserError

pytestmark = pytest.mark.chaos
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
MODELS = ("teacher", "student", "student_kd")
LONGER = [f"--{name}.epochs=12" for name in MODELS]


def start(*words, **arguments) -> subprocess.Popen:
    return subprocess.Popen([*map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True, bufsize=1, **arguments)


def wait_for(process: subprocess.Popen, text: str) -> list[str]:
    """The lines of stderr up to the one that holds `text`, or all if none does."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            break
    return lines


def end(process: subprocess.Popen, number: int) -> tuple[int, str]:
    """Send a signal; the exit status and what is left of stderr."""
    process.send_signal(number)
    told = process.communicate(timeout=120)[1]
    return process.returncode, told


def script(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True, timeout=600)


def result(folder: Path) -> tuple[dict, dict]:
    """All that a run computed: name -> tensor or array, and name -> history without the times."""
    tensors, histories = {}, {}
    for name in MODELS:
        state = utils.load_checkpoint(folder / f"checkpoints/demo/seed0/{name}.pt")
        assert state["finished"]
        tensors |= {f"{name}.{key}": tensor.numpy() for key, tensor in state["model"].items()}
        histories[name] = [{**record, "seconds": 0} for record in state["history"]]
    script("evaluate.py", *small_flags(folder), *LONGER)
    return {**tensors, **np.load(folder / "imgs/demo/predictions.npz")}, histories


def assert_same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        assert np.array_equal(found[0][name], array), name


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    script("teacher_student_model.py", *small_flags(folder), *LONGER)
    return folder


@pytest.fixture(scope="module")
def expected(undisturbed):
    return result(undisturbed)


# Killed and stopped


def test_25_sigkills_over_three_recipes_change_nothing(tmp_path, expected):
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 25:
        folder = tmp_path / str(runs)
        while True:
            words = [*small_flags(folder), *LONGER, "--checkpoint_minutes", "0.005"]
            process = start(sys.executable, "teacher_student_model.py", *words)
            wait_for(process, "demo: digits")
            time.sleep(moments.uniform(0, 3))
            if process.poll() is not None:
                break
            assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
            kills += 1
        assert process.returncode == 0
        assert not leftovers(folder)
        assert_same(result(folder), expected)
        runs += 1
        shutil.rmtree(folder)
    print(f"\n{kills} SIGKILLs over {runs} runs of three recipes: weights, histories, predictions bit-equal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_training_and_saving_change_nothing(tmp_path, expected, number):
    """With a checkpoint in every step most of the time goes into saving."""
    moments, stops, statuses = random.Random(number), 0, []
    for often in ("10", "1e-9"):
        folder = tmp_path / often
        while True:
            words = [*small_flags(folder), *LONGER, "--checkpoint_minutes", often]
            process = start(sys.executable, "teacher_student_model.py", *words)
            wait_for(process, " million parameters")
            time.sleep(moments.uniform(0, 3))
            if process.poll() is not None:
                assert process.returncode == 0
                break
            status, told = end(process, number)
            statuses.append(status)
            assert "Traceback" not in told
            assert not leftovers(folder)
            assert status in (0, 128 + number, -number)  # the last in Python's own shutdown, when all is done
            stops += status == 128 + number
        assert_same(result(folder), expected)
    print(f"\n{signal.Signals(number).name} {stops} times in training and saving: statuses {sorted(set(statuses))}")
    assert stops >= 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_evaluation_leave_whole_files(undisturbed, expected, tmp_path, number):
    moments, stops = random.Random(number), 0
    shutil.copytree(undisturbed, tmp_path / "run")
    for _ in range(8):
        process = start(sys.executable, "evaluate.py", *small_flags(tmp_path / "run"), *LONGER)
        time.sleep(moments.uniform(5, 12))
        stopped = process.poll() is None
        status, told = end(process, number) if stopped else (process.returncode, "")
        assert status in (0, 128 + number, -number)  # the last before Python has begun
        assert "Traceback" not in told
        stops += status != 0
        assert not leftovers(tmp_path / "run")
        json.loads((tmp_path / "run/imgs/demo/results.json").read_text())
        for path in (tmp_path / "run").rglob("*.png"):
            Image.open(path).load()
    print(f"\n{signal.Signals(number).name} {stops} times in evaluation: every file whole")


def test_30_sigkills_in_a_save_leave_the_old_state_or_the_new(tmp_path):
    path = tmp_path / "model.pt"
    code = f"""
import itertools, sys, torch, utils
for count in itertools.count():
    utils.save_checkpoint({str(path)!r}, {{"count": count, "weights": torch.full((5_000_000,), float(count))}})
    print("saved", count, file=sys.stderr, flush=True)
"""
    moments, last = random.Random(0), []
    for _ in range(30):
        process = start(sys.executable, "-c", code)
        wait_for(process, f"saved {moments.randrange(3)}")
        time.sleep(moments.uniform(0, 0.1))
        _, told = end(process, signal.SIGKILL)
        state = utils.load_checkpoint(path)
        saved = [int(line.split()[1]) for line in told.splitlines() if line.startswith("saved")]
        assert not saved or state["count"] in (saved[-1], saved[-1] + 1)
        assert (state["weights"] == state["count"]).all()
        last.append(state["count"])
    print(f"\n30 SIGKILLs in a save: loaded 30 of 30, counts {min(last)} to {max(last)}")


# Damaged files


@pytest.mark.parametrize("name", ["student.pt", "teacher.logits"])
def test_no_truncated_or_flipped_file_is_loaded(undisturbed, tmp_path, name, monkeypatch):
    path = tmp_path / name
    shutil.copy(undisturbed / "checkpoints/demo/seed0" / name, path)
    size, moments, refused = path.stat().st_size, random.Random(0), 0
    monkeypatch.setattr(utils, "say", lambda line: None)
    made_with, shape = utils.load_checkpoint(path).get("made_with", {}), (2, 1297, 10)

    def assert_refused() -> None:
        nonlocal refused
        with pytest.raises(UserError, match=r"is damaged|is not a checkpoint"):
            utils.load_checkpoint(path)
        if name.endswith(".logits"):
            assert utils.read_logits(path, made_with, shape).isnan().all()
        refused += 1

    for bit in [moments.randrange(8 * size) for _ in range(200)]:
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
            file.flush()
            assert_refused()
            file.seek(bit // 8)
            file.write(bytes([byte]))
    utils.load_checkpoint(path)
    for length in sorted(moments.sample(range(size), 50), reverse=True):
        os.truncate(path, length)
        assert_refused()
    print(f"\n{name}: 200 flipped bits and 50 truncations, {refused} of 250 refused")


# No room


@pytest.fixture(params=["a file-size limit", "a full disk"])
def little_room(request, tmp_path):
    """little_room(megabytes) -> a folder and a Popen argument under which no file, or no disk, grows beyond that."""
    mounted = []

    def make(megabytes: float) -> tuple[Path, dict]:
        if request.param == "a file-size limit":
            import resource

            limit = int(megabytes * 1e6)
            return tmp_path, {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
        folder = tmp_path / "small"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={int(megabytes * 1e6)}", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        mounted.append(folder)
        return folder, {}

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_no_room_for_the_first_save(little_room, undisturbed):
    folder, limited = little_room(60)
    words = [*small_flags(folder), *LONGER, "--only", "student"]
    process = start(sys.executable, "custom_resnet.py", *words, **limited)
    _, told = process.communicate(timeout=120)
    print("\n" + told.splitlines()[-1])
    assert process.returncode == 2
    assert ("student.pt: cannot be written" if limited else "this run takes 224 MB, and 60 MB are free there") in told
    assert "Traceback" not in told
    assert not leftovers(folder)


def test_no_room_in_the_midst_of_a_save_keeps_the_state_before(little_room, undisturbed):
    """The disk has filled up since training started: a finished state is there, another one does not fit."""
    folder, limited = little_room(60)
    path = folder / "model.pt"
    shutil.copy(undisturbed / "checkpoints/demo/seed0/student.pt", path)
    code = f"""
import torch, utils
from config import one_line_errors
with one_line_errors():
    utils.save_checkpoint({str(path)!r}, {{"weights": torch.zeros(25_000_000)}})
"""
    process = start(sys.executable, "-c", code, **limited)
    _, told = process.communicate(timeout=60)
    print("\n" + told.strip())
    assert process.returncode == 2
    assert f"{path}: cannot be written" in told
    assert "it takes 101 MB" in told
    assert utils.load_checkpoint(path)["finished"]
    assert os.listdir(folder) == ["model.pt"]


def test_no_room_for_the_report_keeps_the_one_before(little_room, undisturbed, expected):
    folder, limited = little_room(0.02)
    flags = [*SMALL_FLAGS, f"--checkpoints_path={undisturbed / 'checkpoints'}", f"--imgs_path={folder}", *LONGER]
    process = start(sys.executable, "evaluate.py", *flags, stdout=subprocess.DEVNULL, **limited)
    _, told = process.communicate(timeout=120)
    print("\n" + told.strip().splitlines()[-1])
    assert process.returncode == 2
    assert "cannot be written" in told
    assert "Traceback" not in told
    assert not leftovers(folder)


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, undisturbed, expected):
    (tmp_path / "file").write_text("in the way")
    for words, message in (
        (["custom_resnet.py", *SMALL_FLAGS, f"--checkpoints_path={tmp_path / 'file'}"], "cannot be written"),
        (["custom_resnet.py", *SMALL_FLAGS, "--checkpoints_path=/proc/none"], "cannot be written"),
        (
            [
                "evaluate.py",
                *SMALL_FLAGS,
                *LONGER,
                f"--checkpoints_path={undisturbed / 'checkpoints'}",
                "--imgs_path=/proc",
            ],
            "cannot be written",
        ),
    ):
        process = start(sys.executable, *words)
        _, told = process.communicate(timeout=120)
        print("\n" + told.strip().splitlines()[-1])
        assert process.returncode == 2
        assert message in told
        assert "Traceback" not in told


# Several processes


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory) -> dict[int, float]:
    """Test accuracy of the same recipe on 1, 2 and 3 processes: the demo's student, 20 epochs."""
    found = {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"on{processes}")
        words = [
            "--preset=demo",
            "--only=student",
            "--student.epochs=20",
            f"--checkpoints_path={folder}",
            "--device=cpu",
        ]
        words += [f"--imgs_path={folder}"]
        subprocess.run([*TORCHRUN, f"--nproc_per_node={processes}", "custom_resnet.py", *words], cwd=ROOT, check=True)
        subprocess.run([*TORCHRUN, f"--nproc_per_node={processes}", "evaluate.py", *words], cwd=ROOT, check=True)
        results = json.loads((folder / "demo/results.json").read_text())
        arrays = np.load(folder / "demo/predictions.npz")
        assert results["n_test"] == len(arrays["student/seed0"]) == 500
        # Whatever number of processes evaluates, it is the same model on the same images.
        subprocess.run([sys.executable, "evaluate.py", *words], cwd=ROOT, check=True)
        alone = np.load(folder / "demo/predictions.npz")
        assert np.array_equal(alone["labels"], arrays["labels"])
        np.testing.assert_allclose(alone["student/seed0"], arrays["student/seed0"], atol=1e-4)
        found[processes] = results["models"]["student"]["accuracy"]["mean"]
    return found


def test_a_recipe_means_the_same_on_1_2_and_3_processes(accuracies):
    print(f"\ntest accuracy by number of processes: {accuracies}")
    assert max(accuracies.values()) - min(accuracies.values()) < 0.03


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_ends_all_within_a_minute_and_the_same_command_goes_on(tmp_path, victim):
    words = ["--nproc_per_node=3", "custom_resnet.py", *small_flags(tmp_path), "--only=student", "--student.epochs=30"]
    process = start(*TORCHRUN, *words)
    wait_for(process, "epoch  3/30")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[victim]), signal.SIGKILL)
    started = time.monotonic()
    told = process.communicate(timeout=60)[1]
    seconds = time.monotonic() - started
    assert process.returncode != 0
    assert "lost another one" in told
    (message,) = [line for line in told.splitlines() if "lost another one" in line][:1]
    done = subprocess.run([*TORCHRUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "continues after epoch" in done.stderr
    print(f"\nprocess {victim} of 3 killed: all ended after {seconds:.0f} s, then finished. {message[:150]}")


def test_max_restarts_goes_on_by_itself(tmp_path):
    words = ["--nproc_per_node=2", "--max-restarts=2", "custom_resnet.py", *small_flags(tmp_path)]
    process = start(*TORCHRUN, *words, "--only=student", "--student.epochs=30")
    wait_for(process, "epoch  3/30")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0
    assert "continues after epoch" in told
    assert utils.load_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt")["finished"]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    words = ["custom_resnet.py", *small_flags(tmp_path), "--only=student", "--student.epochs=30"]
    process = start(*TORCHRUN, "--nproc_per_node=3", *words)
    wait_for(process, "epoch  3/30")
    end(process, signal.SIGTERM)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "processes was 3, is now 1" in done.stderr


# From elsewhere


class Bait:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_malicious_pickles_do_nothing(tmp_path, undisturbed):
    """As a checkpoint, as the teacher's logits, and as ImageNet weights in torch's cache."""
    run, bait = tmp_path / "run", tmp_path / "bait"
    for name in ("student.pt", "teacher.logits"):
        for number, write in enumerate(
            (
                lambda path: path.write_bytes(pickle.dumps(Bait(bait))),
                lambda path: torch.save({"format": 1, "model": Bait(bait)}, path),
                lambda path: utils.save_checkpoint(path, {"model": Bait(bait), "made_with": {}, "logits": Bait(bait)}),
            )
        ):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(undisturbed, run)
            folder = run / "checkpoints/demo/seed0"
            write(folder / name)
            if name == "teacher.logits":
                (folder / "student_kd.pt").unlink()  # so that the logits are read
            process = start(sys.executable, "teacher_student_model.py", *small_flags(run), *LONGER)
            _, told = process.communicate(timeout=120)
            assert process.returncode == (2 if name == "student.pt" else 0), told
            assert "Traceback" not in told
            assert not bait.exists(), (name, number)
    hub = tmp_path / "hub/hub/checkpoints"
    hub.mkdir(parents=True)
    torch.save({"fc.weight": Bait(bait)}, hub / "resnet18-f37072fd.pth")
    words = [*small_flags(tmp_path / "hubrun"), "--only=student", "--student.pretrained=true"]
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "hub")}
    process = start(sys.executable, "custom_resnet.py", *words, env=environment)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "cannot be used" in told
    assert not bait.exists()
    print("\nthree kinds of pickle as checkpoint and as logits, one as ImageNet weights: 7 of 7 inert")


HOSTILE_NAMES = (
    *("..", "../../outside", "/tmp/outside", "a/b", "-rf", "--overwrite", "two\nlines", "a|b", "$(touch x)", "ünïcødé"),
)
HOSTILE_CLASSES = (
    *("a..b", "a|b", "two\nlines", "-rf", "--overwrite", "$\\frac{x}", "$(touch x)", "<b>bold", "`code`", "名前"),
)


def test_hostile_names_stay_in_their_folders(tmp_path):
    for name in HOSTILE_NAMES:
        process = start(sys.executable, "evaluate.py", *small_flags(tmp_path), f"--run={name}")
        _, told = process.communicate(timeout=60)
        assert process.returncode == 2, name
        assert told.count("error: ") == 1, told
        assert "run = " in told
    assert not list(tmp_path.iterdir())

    random_state = np.random.default_rng(0)
    images = tmp_path / "images"
    for label, name in enumerate(HOSTILE_CLASSES):
        for split, count in (("train", 6), ("test", 3)):
            (images / split / name).mkdir(parents=True)
            for number in range(count):
                noise = random_state.integers(0, 100 + 10 * label, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(images / split / name / f"{number}.png")
    words = [*small_flags(tmp_path / "run"), f"--dataset={images}", "--student.train_size=none", "--only=student"]
    words += ["--teacher.train_size=none", "--student_kd.train_size=none"]
    script("custom_resnet.py", *words)
    script("evaluate.py", *words)
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert all(file.startswith(("checkpoints/demo/seed0/", "imgs/demo/")) for file in files), files
    results = json.loads((tmp_path / "run/imgs/demo/results.json").read_text())
    assert results["n_test"] == 3 * 10
    rows = [line for line in (tmp_path / "run/imgs/demo/results.md").read_text().splitlines() if "two" in line]
    assert rows
    assert all("two lines" in row for row in rows)
    print(f"\n{len(HOSTILE_NAMES)} hostile run names refused, {len(results['classes'])} hostile classes reported")
