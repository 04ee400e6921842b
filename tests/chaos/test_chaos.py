"""Runs that are killed, interrupted, short of disk space, or given damaged and hostile files: `make chaos`.

Each test prints what it did and how often. `make test` runs smaller versions of most of them.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, override
from PIL import Image

import custom_resnet
import evaluate
import teacher_student_model
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.errors import UserError

pytestmark = pytest.mark.chaos
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
MODELS = ("teacher", "student", "student_kd")
RESNETS = [f"--{name}.arch=resnet18" for name in MODELS]  # files and times as in real runs
LONGER = [f"--{name}.{setting}" for name in MODELS for setting in ("epochs=12", "schedule=onecycle")]


def small_flags(folder: Path, *more: str) -> list[str]:
    return override(flags(folder), *RESNETS, *more)


def run(main: Callable[[list[str]], None], *words) -> tuple[int, str]:
    """A script in this process: its exit status and its stderr. A traceback fails the test."""
    status, output = 0, io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*map(str, words)])
        except SystemExit as exit:
            status = exit.code
    return status, output.getvalue()


def start(*words, **arguments) -> subprocess.Popen:
    return subprocess.Popen([*map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True, bufsize=1, **arguments)


def read_until(process: subprocess.Popen, *texts: str) -> list[str]:
    """The lines of stderr up to the first that holds one of the texts, or all if none does."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if any(text in line for text in texts):
            break
    return lines


class Script:
    """A script that is started again and again. Its imports take seconds: they are done once, and a start is a fork.

    `code` defines its `main`.
    """

    server = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they start in the background
child = 0
for words in sys.stdin:
    if child:
        os.waitpid(child, 0)
    child = os.fork()
    if not child:
        print("child", os.getpid(), file=sys.stderr, flush=True)
        main(json.loads(words))
        break
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # keeps its number
    print("ended", ended.si_status * (1 if ended.si_code == os.CLD_EXITED else -1), file=sys.stderr, flush=True)
"""

    def __init__(self, code: str):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        self.process = start(sys.executable, "-c", code + self.server, **pipes)
        self.child, self.status = 0, 0

    def start(self, *words) -> None:
        if self.status is None:  # a test has failed and left it running
            self.end(signal.SIGKILL)
        print(json.dumps([*map(str, words)]), file=self.process.stdin, flush=True)
        self.child, self.status = int(read_until(self.process, "child ")[-1].split()[1]), None

    def wait_for(self, text: str) -> str:
        """Its stderr up to the line that holds `text`, or to its end."""
        lines = read_until(self.process, text, "ended ")
        if lines[-1].startswith("ended "):
            self.status = int(lines[-1].split()[1])
        return "".join(lines)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal, unless it has ended; the exit status and what is left of stderr."""
        if self.status is not None:
            return self.status, ""
        os.kill(self.child, number)
        too_long = threading.Timer(120, os.kill, (self.child, signal.SIGKILL))
        too_long.start()
        output = self.wait_for("ended ")
        too_long.cancel()
        return self.status, output

    def close(self) -> None:
        self.end(signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def training() -> Iterator[Script]:
    with contextlib.closing(Script("from teacher_student_model import main")) as script:
        yield script


@pytest.fixture(scope="module")
def evaluation() -> Iterator[Script]:
    with contextlib.closing(Script("from evaluate import main")) as script:
        yield script


def result(folder: Path) -> tuple[dict, dict]:
    """All that a run computed: name -> tensor or array, and name -> history without the times."""
    tensors, histories = {}, {}
    for name in MODELS:
        state = load_checkpoint(folder / f"checkpoints/demo/seed0/{name}.pt")
        assert state["finished"]
        tensors |= {f"{name}.{key}": tensor.numpy() for key, tensor in state["model"].items()}
        histories[name] = [{**record, "seconds": 0} for record in state["history"]]
    status, output = run(evaluate.main, *small_flags(folder, *LONGER))
    assert status == 0, output
    return {**tensors, **np.load(folder / "imgs/demo/predictions.npz")}, histories


def assert_same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        assert np.array_equal(found[0][name], array), name


def leftovers(folder: Path) -> list[Path]:
    """Temporary files: everything hidden except the locks, which stay."""
    return [path for path in folder.rglob(".*") if path.is_file() and path.suffix != ".lock"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, output = run(teacher_student_model.main, *small_flags(folder, *LONGER))
    assert status == 0, output
    assert not leftovers(folder)
    return folder


@pytest.fixture(scope="module")
def expected(undisturbed):
    return result(undisturbed)


# Killed and stopped


def test_results_after_25_sigkills_during_training_are_bit_equal(tmp_path, training, expected):
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 25:
        folder, status = tmp_path / str(runs), -signal.SIGKILL
        while status == -signal.SIGKILL:
            training.start(*small_flags(folder, *LONGER, "--checkpoint_minutes", "0.005"))
            training.wait_for("demo: digits")
            time.sleep(moments.uniform(0, 3))
            status, _ = training.end(signal.SIGKILL)
            kills += status == -signal.SIGKILL
        assert status == 0
        assert not leftovers(folder)
        assert_same(result(folder), expected)
        runs += 1
        shutil.rmtree(folder)
    print(f"\n{kills} SIGKILLs over {runs} runs of three models: weights, histories, predictions bit-equal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_results_after_signals_during_training_and_saving_are_bit_equal(tmp_path, training, expected, number):
    """With a checkpoint in every step most of the time goes into saving."""
    moments, stops, statuses = random.Random(number), 0, []
    for often in ("10", "1e-9"):
        folder, status = tmp_path / often, None
        while status != 0:
            training.start(*small_flags(folder, *LONGER, "--checkpoint_minutes", often))
            training.wait_for(" million parameters")
            time.sleep(moments.uniform(0, 3))
            status, output = training.end(number)
            statuses.append(status)
            assert "Traceback" not in output
            assert not leftovers(folder)
            assert status in (0, 128 + number, -number)  # the last in Python's own shutdown, when all is done
            stops += status == 128 + number
        assert_same(result(folder), expected)
    print(f"\n{signal.Signals(number).name} {stops} times in training and saving: statuses {sorted(set(statuses))}")
    assert stops >= 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_during_evaluation_leave_no_partial_files(undisturbed, evaluation, expected, tmp_path, number):
    shutil.copytree(undisturbed, tmp_path / "run")
    words = small_flags(tmp_path / "run", *LONGER)
    began = time.monotonic()
    evaluation.start(*words)
    evaluation.wait_for("ended ")
    assert evaluation.status == 0
    seconds = time.monotonic() - began
    moments, stops = random.Random(number), 0
    for _ in range(8):
        evaluation.start(*words)
        time.sleep(moments.uniform(0.2, seconds))
        status, output = evaluation.end(number)
        assert status in (0, 128 + number, -number)  # the last in Python's own shutdown, when all is done
        assert "Traceback" not in output
        stops += status != 0
        assert not leftovers(tmp_path / "run")
        json.loads((tmp_path / "run/imgs/demo/results.json").read_text())
        for path in (tmp_path / "run").rglob("*.png"):
            Image.open(path).load()
        for array in np.load(tmp_path / "run/imgs/demo/predictions.npz").values():
            assert len(array) == 500
    print(f"\n{signal.Signals(number).name} {stops} times in {seconds:.0f} s of evaluation: every file whole")
    assert stops >= 2


def test_a_save_killed_at_30_random_moments_leaves_the_old_state_or_the_new(tmp_path):
    code = """
import itertools, torch
from engine.checkpoints import save_checkpoint

def main(argv):
    for count in itertools.count():
        save_checkpoint(argv[0], {"count": count, "weights": torch.full((5_000_000,), float(count))})
        print("saved", count, file=sys.stderr, flush=True)
"""
    moments, last = random.Random(0), []
    with contextlib.closing(Script(code)) as saving:
        for _ in range(30):
            saving.start(tmp_path / "model.pt")
            output = saving.wait_for(f"saved {moments.randrange(3)}")
            time.sleep(moments.uniform(0, 0.1))
            status, rest = saving.end(signal.SIGKILL)
            assert status == -signal.SIGKILL
            state = load_checkpoint(tmp_path / "model.pt")
            saved = [int(line.split()[1]) for line in (output + rest).splitlines() if line.startswith("saved")]
            assert state["count"] in (saved[-1], saved[-1] + 1)
            assert (state["weights"] == state["count"]).all()
            last.append(state["count"])
    print(f"\n30 SIGKILLs during a save: loaded 30 of 30, counts {min(last)} to {max(last)}")


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    """Each makes a file that must not exist yet while it holds the lock."""
    code = """
import contextlib, os, sys, time
from pathlib import Path
from engine.errors import UserError
from engine.files import lock
folder, token = Path(sys.argv[1]), Path(sys.argv[2])
children = []
while len(children) < 4 and (not children or children[-1]):
    children.append(os.fork())
if not children[-1]:
    held, end = 0, time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(UserError), lock(folder):
            os.close(os.open(token, os.O_CREAT | os.O_EXCL))
            token.unlink()
            held += 1
    print("held", held, file=sys.stderr, flush=True)
else:
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
    process = start(sys.executable, "-c", code, tmp_path / "run", tmp_path / "token")
    _, output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    held = [int(line.split()[1]) for line in output.splitlines()]
    print(f"\n4 processes held a lock {held} times in 5 s, never together")
    assert len(held) == 4
    assert sum(held) > 100
    assert not (tmp_path / "run").exists()


# No room


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["a file-size limit", "a full disk"])
def little_room(request, tmp_path):
    """little_room(megabytes) -> a folder, and a context in which no file, or no disk, grows beyond that."""
    mounted = []

    def make(megabytes: float) -> tuple[Path, contextlib.AbstractContextManager]:
        size, folder = int(megabytes * 1e6), tmp_path / "small"
        folder.mkdir()
        if request.param == "a file-size limit":
            return folder, file_size_limit(size)
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        mounted.append(folder)
        return folder, contextlib.nullcontext()

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_at_the_first_save_is_a_one_line_error(little_room, request):
    folder, limit = little_room(60)
    with limit:
        status, output = run(custom_resnet.main, *small_flags(folder, *LONGER, "--only", "student"))
    print("\n" + output.splitlines()[-1])
    assert status == 2
    on_full_disk = "a full disk" in request.node.name
    assert ("this run needs 224 MB, and 60 MB are free" if on_full_disk else "student.pt: cannot be written") in output
    assert not leftovers(folder)


def test_a_full_disk_during_a_save_keeps_the_previous_state(little_room, undisturbed):
    """The disk has filled up since training started: a finished state is there, and the next one does not fit."""
    folder, limit = little_room(60)
    path = folder / "model.pt"
    shutil.copy(undisturbed / "checkpoints/demo/seed0/student.pt", path)
    with limit, pytest.raises(UserError) as error:
        save_checkpoint(path, {"weights": torch.zeros(25_000_000)})
    print(f"\n{error.value}")
    assert f"{path}: cannot be written" in str(error.value)
    assert "it takes 101 MB" in str(error.value)
    assert load_checkpoint(path)["finished"]
    assert os.listdir(folder) == ["model.pt"]


def test_a_full_disk_keeps_the_previous_report(little_room, undisturbed):
    folder, limit = little_room(0.02)
    (folder / "demo").mkdir()
    (folder / "demo/results.json").write_text("the report before")
    words = small_flags(undisturbed, *LONGER, f"--imgs_path={folder}")
    with limit:
        status, output = run(evaluate.main, *words)
    print("\n" + output.strip().splitlines()[-1])
    assert status == 2
    assert "cannot be written" in output
    assert not leftovers(folder)
    assert (folder / "demo/results.json").read_text() == "the report before"
    for path in folder.rglob("*.png"):
        Image.open(path).load()


# Several processes


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory) -> dict[int, float]:
    """Test accuracy of the same recipe on 1, 2 and 3 processes: the demo's student, 20 epochs."""
    found = {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"on{processes}")
        words = ["--preset=demo", "--only=student", "--student.epochs=20", "--device=cpu"]
        words = override(words, f"--checkpoints_path={folder}", f"--imgs_path={folder}")
        for script in ("custom_resnet.py", "evaluate.py"):
            subprocess.run([*TORCHRUN, f"--nproc_per_node={processes}", "--", script, *words], cwd=ROOT, check=True)
        results = json.loads((folder / "demo/results.json").read_text())
        arrays = np.load(folder / "demo/predictions.npz")
        assert results["n_test"] == len(arrays["student/seed0"]) == 500
        # Whatever number of processes evaluates, it is the same model on the same images.
        assert run(evaluate.main, *words)[0] == 0
        alone = np.load(folder / "demo/predictions.npz")
        assert np.array_equal(alone["labels"], arrays["labels"])
        np.testing.assert_allclose(alone["student/seed0"], arrays["student/seed0"], atol=1e-4)
        found[processes] = results["models"]["student"]["accuracy"]["mean"]
    return found


def test_accuracies_agree_on_1_2_and_3_processes(accuracies):
    print(f"\ntest accuracy by number of processes: {accuracies}")
    assert max(accuracies.values()) - min(accuracies.values()) < 0.03


def ranks(process: subprocess.Popen) -> list[int]:
    """The numbers of the processes that torchrun has started, by rank."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def test_after_any_rank_is_killed_all_exit_within_a_minute_and_the_run_resumes(tmp_path):
    words = [
        "--nproc_per_node=3",
        "--",
        "custom_resnet.py",
        *small_flags(tmp_path, "--only=student", "--student.epochs=30"),
    ]
    for victim in (0, 1, 2):
        process = start(*TORCHRUN, *words)
        before = "".join(read_until(process, f"epoch  {3 * victim + 3}/30"))
        assert ("resumes after epoch" in before) == (victim > 0)
        os.kill(ranks(process)[victim], signal.SIGKILL)
        started = time.monotonic()
        output = process.communicate(timeout=60)[1]
        seconds = time.monotonic() - started
        assert process.returncode != 0
        message = next(line for line in output.splitlines() if "lost contact with another process" in line)
        print(f"\nprocess {victim} of 3 killed: all ended after {seconds:.0f} s. {message[:150]}")
    done = subprocess.run([*TORCHRUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "resumes after epoch" in done.stderr
    assert load_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt")["finished"]


def test_with_max_restarts_torchrun_resumes_the_run(tmp_path):
    words = ["--nproc_per_node=2", "--max-restarts=2", "--", "custom_resnet.py", *small_flags(tmp_path)]
    process = start(*TORCHRUN, *words, "--only=student", "--student.epochs=30")
    read_until(process, "epoch  3/30")
    os.kill(ranks(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == 0
    assert "resumes after epoch" in output
    assert load_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt")["finished"]


def test_a_run_resumes_with_another_number_of_processes(tmp_path):
    words = small_flags(tmp_path, "--only=student", "--student.epochs=30")
    process = start(*TORCHRUN, "--nproc_per_node=3", "--", "custom_resnet.py", *words)
    read_until(process, "epoch  3/30")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    status, output = run(custom_resnet.main, *words)
    assert status == 0
    assert "processes was 3, is now 1" in output
    assert not leftovers(tmp_path)


# From elsewhere


HOSTILE_NAMES = (
    *("..", "../../outside", "/tmp/outside", "a/b", "-rf", "--overwrite", "two\nlines", "a|b", "$(touch x)", "ünïcødé"),
)
HOSTILE_CLASSES = (
    *("a..b", "a|b", "two\nlines", "-rf", "--overwrite", "$\\frac{x}", "$(touch x)", "<b>bold", "`code`", "名前"),
)


def test_hostile_names_cannot_write_outside_the_run_folder(tmp_path):
    for name in HOSTILE_NAMES:
        status, output = run(evaluate.main, *small_flags(tmp_path, f"--run={name}"))
        assert status == 2, name
        assert output.count("error: ") == 1, output
        assert "run = " in output
    assert not list(tmp_path.iterdir())

    random_state = np.random.default_rng(0)
    images = tmp_path / "images"
    for label, name in enumerate(HOSTILE_CLASSES):
        for split, count in (("train", 6), ("test", 3)):
            (images / split / name).mkdir(parents=True)
            for number in range(count):
                noise = random_state.integers(0, 100 + 10 * label, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(images / split / name / f"{number}.png")
    words = small_flags(tmp_path / "run", f"--dataset={images}", "--only=student")
    words = override(words, *[f"--{name}.train_size=none" for name in MODELS])
    for main in (custom_resnet.main, evaluate.main):
        status, output = run(main, *words)
        assert status == 0, output
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}
    assert all(file.startswith(("checkpoints/demo/seed0/", "imgs/demo/")) for file in files), files
    results = json.loads((tmp_path / "run/imgs/demo/results.json").read_text())
    assert results["n_test"] == 3 * 10
    rows = [line for line in (tmp_path / "run/imgs/demo/results.md").read_text().splitlines() if "two" in line]
    assert rows
    assert all("two lines" in row for row in rows)
    print(f"\n{len(HOSTILE_NAMES)} hostile run names refused, {len(results['classes'])} hostile classes reported")


def test_a_folder_is_read_within_little_more_memory_than_its_images(tmp_path):
    """800 images of 224 px are 115 MB, a fifth of which is held out as test images and for that copied."""
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (224, 224)).save(tmp_path / name / "0.bmp")
        for number in range(1, 400):
            (tmp_path / name / f"{number}.bmp").hardlink_to(tmp_path / name / "0.bmp")
    program = f"""
import resource
from dataclasses import replace
from config import PRESETS
from engine.datasets import load_dataset
peaks = []
for dataset in ("digits", {str(tmp_path)!r}):
    load_dataset(replace(PRESETS["cifar10"], dataset=dataset, device="cpu"))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert 1 < int(result.stdout) / (800 * 3 * 224**2) < 1.75, result.stderr
