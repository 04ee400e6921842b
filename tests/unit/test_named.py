"""MODULE:NAME: what may be named, and what is refused."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import fit, start_training
from torch import nn

from config import PRESETS
from engine import checkpoints, named, reach, soft_losses
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.datasets import load_dataset
from engine.errors import UserError
from engine.images import augment_one_by_one
from engine.models import build_model, check_image_size, load_model
from engine.recipes import Recipe
from engine.recorded import recorded_config
from engine.soft_losses import options

MINE = """
import torch
from torch import nn

NUMBER = 3


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(3 * 64, num_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


def no_network(num_classes):
    return num_classes


def loss(z, v, labels, temperature, power=2.0):
    return (z - v).abs().pow(power).mean()


def loss_without_default(z, v, labels, temperature, power):
    return z.mean()


def doubled(image):
    return image.float()


class Adagrad(torch.optim.Adagrad):
    pass


def halved(optimizer, steps):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def only_train():
    return [1, 2]


def unreduced(z, v, labels, temperature):
    return (z - v).abs().mean(1)


def wide(num_classes):
    return Net(num_classes + 1)


def groups(parameters, lr):
    matrices = [p for p in parameters if p.ndim > 1]
    return torch.optim.SGD([{"params": matrices}, {"params": [p for p in parameters if p.ndim == 1]}], lr)


def nothing(*_):
    return None


def cosine(optimizer, steps):
    import numpy as np

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + np.cos(np.pi * s / steps)))


def without_classes():
    return nn.Linear(3, 3)


def with_a_mistake(num_classes):
    return nn.Linear(3, num_classes).wieght


def closure(parameters, lr):
    return torch.optim.LBFGS(parameters, lr)


def plateau(optimizer, steps):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def on_logits_alone(z, v, labels, temperature):
    return z.no_such_method()


class Labels:
    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 60

    def __getitem__(self, i):
        return torch.zeros(3, 8, 8, dtype=torch.uint8), self.label


def fractions():
    return Labels(0.7), Labels(0.7)


def one_hot():
    return Labels(torch.eye(10)[0]), Labels(torch.eye(10)[0])


def unlabelled():
    return [torch.zeros(8, 8)] * 60, [torch.zeros(8, 8)] * 60


def same_names():
    sets = Labels(1), Labels(1)
    sets[0].classes = ["cat", "cat"]
    return sets


def missing_file():
    return open("/nowhere/images.npy")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    reach.code_digest()  # of our own files, before ROOT is another folder
    monkeypatch.setattr(reach, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "evaluate.py").write_text("def main(number):\n    raise SystemExit(99)\n")
    yield
    sys.modules.pop("mine", None)
    named.load.cache_clear()
    reach.read_source.cache_clear()


HOSTILE = ["os:system", "engine.files:write_durably", "evaluate:main", "data.x.evil:f", "nowhere:f", "subprocess:run"]


@pytest.mark.parametrize("name", HOSTILE)
def test_only_files_of_the_users_can_be_named(mine, name):
    for field in ("arch", "optimizer", "schedule"):
        with pytest.raises(UserError, match=f"{field} = '{name}'"):
            Recipe(**{field: name})
    with pytest.raises(UserError, match=f"soft_loss = '{name}'"):
        Recipe(teacher="t", soft_loss=name)
    with pytest.raises(UserError, match=f"augment = '{name}'"):
        replace(PRESETS["demo"], augment=name)
    with pytest.raises(UserError):
        load_dataset(replace(PRESETS["demo"], dataset=name, device="cpu"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused(mine, trained, tmp_path, name, capsys):
    """It names code in its recipe and in its architecture, and its digest is valid."""
    state = load_checkpoint(trained / "checkpoints/demo/seed0/student.pt")
    path = tmp_path / "demo/seed0/student.pt"
    save_checkpoint(path, {**state, "arch": name})
    with pytest.raises(UserError, match="arch"):
        load_model(checkpoints.load_training(path), "cpu")
    recipes = {**state["config"]["recipes"], "student": {**state["config"]["recipes"]["student"], "arch": name}}
    save_checkpoint(path, {**state, "config": {**state["config"], "recipes": recipes}})
    with pytest.raises(UserError, match="arch"):
        recorded_config(tmp_path / "demo")


def test_what_is_named_must_be_there_and_fit(mine):
    for name, words in [
        ("mine:Nett", "mine.py has no Nett; did you mean Net?"),
        ("mine:NUMBER", "cannot be called"),
        ("my-file:Net", "must be"),
    ]:
        with pytest.raises(UserError, match="arch") as error:
            Recipe(arch=name)
        assert words in str(error.value)
    with pytest.raises(UserError, match="must take"):
        Recipe(teacher="t", soft_loss="mine:loss_without_default")
    assert options("mine:loss") == {"power": 2.0}
    with pytest.raises(UserError, match=r"no gamma; it takes power \(2\)"):
        Recipe(teacher="t", soft_loss="mine:loss", loss_options={"gamma": 1})
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"augment = 'mine:doubled'.*float32"):
        augment_one_by_one(images, "mine:doubled", (0, 0, 0))
    with pytest.raises(UserError, match="dataset = 'mine:only_train'"):
        load_dataset(replace(PRESETS["demo"], dataset="mine:only_train", device="cpu"))


def test_what_is_named_is_checked_before_training(mine):
    with pytest.raises(UserError, match="mine:unreduced"):
        soft_losses.check("mine:unreduced", {}, 10)
    soft_losses.check("mine:loss", {"power": 2.0}, 10)
    with pytest.raises(UserError, match=r"arch = 'mine:wide'.*\(1, 10\)"):
        check_image_size(named.load("mine:wide")(10), "mine:wide", 8, 10)
    for name, words in [
        ("fractions", "label 0"),
        ("one_hot", "label 0"),
        ("unlabelled", "item 0"),
        ("same_names", "different names"),
        ("missing_file", r"mine\.py, line \d+: .*No such file"),
    ]:
        with pytest.raises(UserError, match=rf"^dataset = 'mine:{name}': .*{words}"):
            load_dataset(replace(PRESETS["demo"], dataset=f"mine:{name}", device="cpu"))
    for name, words in [("without_classes", "takes 0 positional"), ("with_a_mistake", r"mine\.py, line \d+: .*wieght")]:
        with pytest.raises(UserError, match=rf"^arch = 'mine:{name}': .*{words}"):
            build_model(f"mine:{name}", 10)
    with pytest.raises(UserError, match=r"^soft_loss = 'mine:on_logits_alone': mine\.py, line \d+: "):
        soft_losses.check("mine:on_logits_alone", {}, 10)
    network, config = named.load("mine:Net")(10), replace(PRESETS["demo"], device="cpu")
    for field, name in [
        ("optimizer", "nothing"),
        ("schedule", "nothing"),
        ("optimizer", "closure"),
        ("schedule", "plateau"),
    ]:
        with pytest.raises(UserError, match=f"^{field} = 'mine:{name}'"):
            start_training(network, Recipe(**{field: f"mine:{name}"}), config, 0, 100)


def test_an_optimizer_gets_all_parameters_as_often_as_it_looks(mine):
    config = replace(PRESETS["demo"], device="cpu")
    training = start_training(named.load("mine:Net")(10), Recipe(optimizer="mine:groups", lr=0.1), config, 0, 100)
    assert [len(group["params"]) for group in training.optimizer.param_groups] == [1, 1]


def test_a_schedule_with_numpys_numbers_can_be_loaded_again(mine, tmp_path):
    config = replace(PRESETS["demo"], device="cpu")
    training = start_training(named.load("mine:Net")(10), Recipe(schedule="mine:cosine"), config, 0, 100)
    training.optimizer.step()
    training.scheduler.step()
    save_checkpoint(tmp_path / "a.pt", training.state_dict())
    found = load_checkpoint(tmp_path / "a.pt")["scheduler"]["_last_lr"]
    assert found == pytest.approx(training.scheduler.get_last_lr())


def test_an_error_in_the_users_file_is_located(mine, tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ny = x.nothing\n")
    with pytest.raises(UserError, match=r"broken\.py, line 2"):
        Recipe(arch="broken:Net")


def test_an_object_becomes_its_name(mine):
    import mine as module

    assert Recipe(arch=module.Net).arch == "mine:Net"
    for value in (lambda n: n, nn.Linear, Recipe):
        with pytest.raises(UserError, match="arch"):
            Recipe(arch=value)
    assert named.name_of(module.loss) == "mine:loss"


def test_an_optimizer_and_a_schedule_of_the_users_resume_exactly(mine, digits, device):
    """Adagrad by hand: its first step is lr times the sign of the gradient; StepLR halves lr after every step."""
    recipe = Recipe(arch="mine:Net", epochs=1, optimizer="mine:Adagrad", schedule="mine:halved", lr=0.1, train_size=100)
    config = replace(PRESETS["demo"], image_size=8, batch_size=25, device=device, precision="fp32", validation_size=0)

    def network():
        torch.manual_seed(0)
        return named.load("mine:Net")(10).to(device)

    def cross_entropy(logits, batch):
        return {"hard": nn.functional.cross_entropy(logits, batch.labels)}

    whole, saved = network(), []
    training = start_training(whole, recipe, config, 0, 100)
    assert isinstance(training.optimizer, torch.optim.Adagrad)
    fit(whole, recipe, config, 0, digits, cross_entropy)
    parts = network()
    fit(parts, recipe, config, 0, digits, cross_entropy, write=saved.append, stop=iter([0, 15, 15, 15]).__next__)
    assert saved[-1]["step"] == 2
    assert saved[-1]["scheduler"]["_last_lr"] == pytest.approx([0.025])
    resumed = network()
    fit(resumed, recipe, config, 0, digits, cross_entropy, state=saved[-1])
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
