"""A user's day in a copy of the repository: a network, a loss, a data set and more of one's own, then edits of each."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.special import rel_entr
from sklearn.metrics import log_loss

MY_PROJECT = '''
"""Everything of mine."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from my_helpers import distance

WIDTH = 8


class TinyNet(nn.Module):
    """A small network."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(WIDTH * 16, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def powered(z, v, labels, temperature, power=2.0):
    return distance((z / temperature).softmax(1), (v / temperature).softmax(1), power)  # mine


class Digits:
    classes = ["zero", "one", "two"]

    def __init__(self, rows):
        images, target = load_digits(return_X_y=True)
        self.images, self.target = images[target < 3][rows], target[target < 3][rows]

    def __len__(self):
        return len(self.target)

    def __getitem__(self, i):
        image = torch.from_numpy(np.rint(self.images[i] * 15).astype(np.uint8)).reshape(1, 8, 8)
        return image.repeat(3, 1, 1), int(self.target[i])


def load():
    return Digits(slice(0, 200)), Digits(slice(200, 300)), Digits(slice(300, 400))


def jitter(image):
    return (image.float() * (0.8 + 0.4 * torch.rand(()))).clamp(0, 255).byte()


def milestones(optimizer, steps):
    return MultiStepLR(optimizer, [steps // 2])


def momentum_free(parameters, lr):
    return torch.optim.SGD(parameters, lr)
'''
MY_HELPERS = "def distance(p, q, power):\n    return (p - q).abs().pow(power).sum(1).mean()\n"
FLAGS = [
    *("--preset", "scratch", "--run", "mine", "--seeds", "0", "--epochs", "2", "--image_size", "8"),
    *("--batch_size", "25", "--precision", "fp32", "--horizontal_flip", "0", "--lr", "0.01"),
    *("--device", "cpu", "--arch", "my_project:TinyNet", "--dataset", "my_project:load"),
    *("--augment", "my_project:jitter", "--soft_loss", "my_project:powered", "--temperature", "2"),
    *("--student.optimizer", "my_project:momentum_free", "--student.nesterov", "false", "--student.weight_decay", "0"),
    *("--student.schedule", "my_project:milestones", "--student_kd.baseline", "student"),
]

# Imports the scripts once and runs each command in a fork, which imports the user's files as they are then.
DRIVER = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import evaluate, teacher_student_model
from report import figures
figures.png = lambda figure: b""
print("ready", flush=True)
for line in sys.stdin:
    script, argv = json.loads(line)
    if os.fork() == 0:
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            sys.modules[script].main(argv)
            status = 0
        except SystemExit as error:
            status = error.code or 0
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class Repository:
    """A copy of the repository with the user's files, in which scripts can be run."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("diagnose", "engine", "report", "experiments"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.py"):
            if path.name in ("config.py", "utils.py", "custom_resnet.py", "teacher_student_model.py", "evaluate.py"):
                shutil.copy(path, folder)
        self.driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.driver.stdout.readline() == "ready\n"

    def reset(self) -> None:
        (self.folder / "my_project.py").write_text(MY_PROJECT)
        (self.folder / "my_helpers.py").write_text(MY_HELPERS)
        shutil.copy(ROOT / "config.py", self.folder)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        if (self.folder / "trained").exists():
            shutil.copytree(self.folder / "trained", self.folder / "checkpoints")

    def run(self, script: str, *argv: str) -> tuple[int, str]:
        self.driver.stdin.write(json.dumps([script, argv]) + "\n")
        self.driver.stdin.flush()
        status = int(self.driver.stdout.readline())
        return status, (self.folder / "output").read_text()

    def train(self, *more: str) -> tuple[int, str]:
        return self.run("teacher_student_model", *FLAGS, *more)

    def edit(self, old: str, new: str, file: str = "my_project.py") -> None:
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def trained_repository(tmp_path_factory):
    repository = Repository(tmp_path_factory.mktemp("copy"))
    repository.reset()
    status, output = repository.train()
    assert status == 0, output
    assert trained_in(output) == {"teacher", "student", "student_kd"}
    assert "my_project:powered computes 1 squared error of probabilities at T = 2" in output
    shutil.copytree(repository.folder / "checkpoints", repository.folder / "trained")
    yield repository
    repository.driver.stdin.close()
    repository.driver.wait()


@pytest.fixture
def mine(trained_repository) -> Repository:
    trained_repository.reset()
    return trained_repository


def trained_in(output: str) -> set[str]:
    return set(re.findall(r"^(\S+) seed 0  epoch", output, re.MULTILINE))


@pytest.mark.parametrize(
    ("old", "new", "file", "depend"),
    [
        ("# mine", "# a comment", "my_project.py", set()),
        ('"""A small network."""', '"""A tiny network."""', "my_project.py", set()),
        ("WIDTH = 8\n", "\nUNUSED = 3\n\nWIDTH = 8\n", "my_project.py", set()),
        ("power)  # mine", "power) * 1000", "my_project.py", {"student_kd"}),
        (".sum(1).mean()", ".mean()", "my_helpers.py", {"student_kd"}),
        ("[steps // 2]", "[steps // 3]", "my_project.py", {"student"}),
        ("SGD(parameters, lr)", "SGD(parameters, lr / 2)", "my_project.py", {"student"}),
        ("WIDTH = 8", "WIDTH = 4", "my_project.py", {"teacher", "student", "student_kd"}),
        ("0.8 + 0.4", "0.9 + 0.2", "my_project.py", {"teacher", "student", "student_kd"}),
        ("Digits(slice(0, 200))", "Digits(slice(0, 175))", "my_project.py", {"teacher", "student", "student_kd"}),
    ],
)
def test_an_edit_is_never_answered_by_an_old_model(mine, old, new, file, depend):
    mine.edit(old, new, file)
    status, output = mine.train()
    if depend:
        assert status == 2
        assert any(f"checkpoints/mine/seed0/{name}.pt" in output for name in depend)
        assert trained_in(output) == set()
    status, output = mine.train("--overwrite")
    assert status == 0, output
    assert trained_in(output) == depend


def test_an_edited_loss_is_not_copied_into_another_run(mine):
    mine.edit("power)  # mine", "power) * 1000")
    arguments = ["another" if word == "mine" else word for word in FLAGS]
    status, output = mine.run("teacher_student_model", *arguments)
    assert status == 0, output
    assert trained_in(output) == {"student_kd"}
    assert output.count("copied from") == 2


def test_swept_evaluated_and_exported(mine):
    status, output = mine.train("--sweep", "student_kd.loss_options.power=1,3")
    assert status == 0, output
    assert trained_in(output) == {"student_kd-power-1", "student_kd-power-3"}
    status, output = mine.run("evaluate", "--run", "mine")
    assert status == 0, output
    results = json.loads((mine.folder / "imgs/mine/results.json").read_text())
    assert set(results["models"]) == {"teacher", "student", "student_kd", "student_kd-power-1", "student_kd-power-3"}
    assert list(results["models"]["student"]["per_class"]) == ["zero", "one", "two"]
    status, output = mine.run("evaluate", "--run", "mine", "--only", "student_kd", "--export")
    assert status == 0, output
    assert (mine.folder / "checkpoints/mine/seed0/student_kd.pt2").exists()


IMPORTS = "\nfrom my_project import TinyNet, load, powered\nfrom engine import flags"
OBJECTS = """PRESETS = {
    "objects": Config(
        {
            "net": Recipe(TinyNet, epochs=1),
            "kd": Recipe(TinyNet, epochs=1, teacher="net", soft_loss=powered),
        },
        run="objects",
        dataset=load,
        image_size=8,
        batch_size=25,
    ),
"""


def test_config_py_takes_the_objects_themselves(mine):
    mine.edit("\nfrom engine import flags", IMPORTS, "config.py")
    mine.edit("PRESETS = {\n", OBJECTS, "config.py")
    status, output = mine.run("teacher_student_model", "--preset", "objects")
    assert status == 0, output
    assert trained_in(output) == {"net", "kd"}
    mine.edit("soft_loss=powered", "soft_loss=lambda z, v, y, t: z.mean()", "config.py")
    status, output = mine.run("teacher_student_model", "--preset", "objects")
    assert status == 2
    assert "config.py, line" in output
    assert "soft_loss" in output
    assert "my_project" in output


def test_a_checkpoint_says_which_file_it_needs(mine):
    os.remove(mine.folder / "my_project.py")
    status, output = mine.run("evaluate", "--run", "mine")
    assert status == 2
    assert "my_project.py" in output
    assert "seed0" in output


def test_the_example_of_the_documentation_trains(mine):
    text = (ROOT / "docs/usage.md").read_text()
    example = "\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    (command,) = re.findall(r"    python (teacher_student_model\.py [^\n]* my_project:load(?:[^\n]*\\\n)*[^\n]*)", text)
    (mine.folder / "my_project.py").write_text(example)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    words[words.index("--run") + 1] = "documented"
    status, output = mine.run("teacher_student_model", *words, "--device", "cpu")
    assert status == 0, output
    found = {path.stem for path in (mine.folder / "checkpoints/documented/seed0").glob("*.pt")}
    assert found == {"teacher", "student", "student_10", "student_kd"}


def test_the_ten_lines_of_the_documentation_do_what_they_say(mine):
    text = (ROOT / "docs/usage.md").read_text()
    example = "\n\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    example = example.replace('"DEFAULT"', "None")  # random weights, nothing to download
    (mine.folder / "my_project.py").write_text(example)
    found: dict = {}
    exec(example, found)
    z, v, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    p, q = ((x.double() / 3).softmax(1).numpy() for x in (z, v))
    assert found["reversed_kl"](z, v, labels, 3.0).item() == pytest.approx(9 * rel_entr(p, q).sum(1).mean(), rel=1e-4)
    assert found["hard_labels"](z, v, labels, 3.0).item() == pytest.approx(
        log_loss(v.argmax(1), z.double().softmax(1), labels=range(4)), rel=1e-5
    )
    variance = np.var((z - v).double().numpy(), axis=1).mean()
    assert found["squared_error"](z, v, labels, 3.0).item() == pytest.approx(variance, rel=1e-5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, rates = found["warm_milestones"](optimizer, 40), []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0] + [2.0] * 19 + [0.2] * 10 + [0.02] * 10)

    losses = ",".join(f"my_project:{name}" for name in ("hard_labels", "squared_error", "reversed_kl"))
    words = [
        "--run",
        "ten",
        "--dataset",
        "my_project:load",
        "--image_size",
        "32",
        "--epochs",
        "1",
        "--batch_size",
        "25",
    ]
    words += ["--preset", "scratch", "--seeds", "0", "--precision", "fp32", "--device", "cpu"]
    words += ["--arch", "my_project:TinyNet", "--student.arch", "my_project:Frozen"]
    words += ["--student.schedule", "my_project:warm_milestones"]
    status, output = mine.run("teacher_student_model", *words, "--sweep", f"student_kd.soft_loss={losses}")
    assert status == 0, output
    folder = mine.folder / "checkpoints/ten/seed0"
    assert len(list(folder.glob("student_kd-*.pt"))) == 3
    state = torch.load(folder / "student.pt", weights_only=True)
    torch.manual_seed(0)
    before = found["Frozen"](3).state_dict()
    changed = {name for name, tensor in state["model"].items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
