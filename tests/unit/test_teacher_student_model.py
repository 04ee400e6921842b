import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fit

import custom_resnet
import teacher_student_model
from engine import checkpoints, datasets
from engine.errors import UserError
from engine.images import IMAGENET, Normalisation, prepare
from engine.models import with_normalisation
from engine.settings import Model
from teacher_student_model import (
    Distillation,
    OnlineTeacher,
    Teacher,
    distillation_loss,
    load_teacher,
    shuffle_within_classes,
    stored_logits,
    teacher_logits,
)

B, C = 7, 10


def closed_form(z, v, y, alpha, temperature, scale=True):
    """The loss in NumPy float64, term by term."""

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    hard = -np.log(softmax(z)[np.arange(len(y)), y]).mean()
    p_teacher, p_student = softmax(v / temperature), softmax(z / temperature)
    soft = (p_teacher * (np.log(p_teacher) - np.log(p_student))).sum(axis=1).mean()
    return alpha * hard + (1 - alpha) * (temperature**2 if scale else 1) * soft


@pytest.fixture
def logits():
    random = np.random.default_rng(0)
    return 3 * random.normal(size=(B, C)), 3 * random.normal(size=(B, C)), random.integers(0, C, B)


grid = pytest.mark.parametrize(
    ("alpha", "temperature"), [(alpha, temperature) for alpha in (0, 0.25, 1) for temperature in (1, 2, 5, 20)]
)


@grid
@pytest.mark.parametrize("scale", [True, False])
def test_the_loss_agrees_with_its_closed_form(logits, alpha, temperature, scale):
    z, v, y = logits
    expected = closed_form(z, v, y, alpha, temperature, scale)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        student, teacher = torch.tensor(z, dtype=dtype), torch.tensor(v, dtype=dtype)
        loss = distillation_loss(student, teacher, torch.tensor(y), alpha, temperature, scale)
        assert loss.item() == pytest.approx(expected, rel=tolerance)


@grid
def test_the_gradient_agrees_with_finite_differences(logits, alpha, temperature):
    z, v, y = logits
    student = torch.tensor(z, requires_grad=True)
    distillation_loss(student, torch.tensor(v), torch.tensor(y), alpha, temperature).backward()
    step = 1e-5
    for row, column in np.ndindex(B, C):
        up, down = z.copy(), z.copy()
        up[row, column] += step
        down[row, column] -= step
        slope = (closed_form(up, v, y, alpha, temperature) - closed_form(down, v, y, alpha, temperature)) / (2 * step)
        assert student.grad[row, column].item() == pytest.approx(slope, abs=1e-8)


def test_the_soft_loss_is_zero_where_student_and_teacher_agree(logits):
    z, v, y = (torch.tensor(array) for array in logits)
    assert distillation_loss(v, v, y, 0.0, 5.0).item() == pytest.approx(0, abs=1e-12)
    assert distillation_loss(z, v, y, 0.0, 5.0) != distillation_loss(v, z, y, 0.0, 5.0)  # KL is not symmetric


def test_no_gradient_reaches_the_teacher(logits):
    z, v, y = (torch.tensor(array) for array in logits)
    teacher = v.clone().requires_grad_()
    distillation_loss(z.requires_grad_(), teacher, y, 0.25, 5.0).backward()
    assert teacher.grad is None


# The teacher's logits


@pytest.fixture(scope="module")
def teacher(device) -> Teacher:
    torch.manual_seed(1)
    model = custom_resnet.build_resnet("resnet18", C, pretrained=False)
    with torch.no_grad():  # BatchNorm's statistics as after some training
        for _ in range(5):
            model(torch.randn(8, 3, 16, 16))
    model = model.to(device).eval().requires_grad_(False)
    return Teacher("teacher", model, checkpoints.tensors_digest(model.state_dict()))


def test_teacher_logits_agree_with_the_teacher_on_every_view(config, digits, teacher):
    subset = digits.subset(100)
    logits = teacher_logits(teacher, config, digits, subset)
    assert logits.shape == (2, 1297, C)
    for index in subset:
        image = digits.train.images[index][None]
        for view, shown in enumerate((image, torch.flip(image, dims=[3]))):
            expected = teacher.model(prepare(shown, 16))[0]
            torch.testing.assert_close(logits[view, index], expected, atol=1e-4, rtol=0)
    others = torch.ones(1297, dtype=torch.bool)
    others[subset] = False
    assert logits[:, others].isnan().all()
    assert not logits[:, subset].isnan().any()


@pytest.mark.parametrize(("share", "views"), [(0.0, [True, False]), (0.5, [True, True]), (1.0, [False, True])])
def test_unused_views_are_not_computed(config, digits, teacher, share, views):
    logits = teacher_logits(teacher, replace(config, horizontal_flip=share), digits, digits.subset(50))
    assert [not logits[view].isnan().all() for view in (0, 1)] == views


@pytest.mark.parametrize("normalisation", [IMAGENET, Normalisation((0.5, 0.4, 0.3), (0.5, 0.5, 0.25))])
def test_lookups_return_the_logits_of_the_batchs_images_and_views(config, digits, teacher, normalisation):
    """The stored logits teach as the teacher itself would on the student's very batch; any others do not."""
    subset = digits.subset(100)
    teacher = teacher._replace(model=with_normalisation(copy.deepcopy(teacher.model), normalisation))
    lookup = stored_logits(teacher_logits(teacher, config, digits, subset))
    online = OnlineTeacher(teacher.model, config)
    loss_fn = Distillation(replace(config.recipes["student_kd"], alpha=0.0), lookup)
    for batch in datasets.batches(digits.train, subset, config, seed=0, epoch=0):
        expected = teacher.model(prepare(batch.pixels, 16, normalisation))
        for logits in (lookup(batch), online(batch)):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert loss_fn(expected, batch)["soft"].item() == pytest.approx(0, abs=1e-5)
        assert loss_fn(expected, batch._replace(flipped=~batch.flipped))["soft"] > 1e-3
        assert loss_fn(expected, batch._replace(indices=batch.indices.roll(1)))["soft"] > 1e-3


def computed(capsys) -> int:
    """How many logits the last call logged as computed."""
    output = capsys.readouterr().err
    found = re.search(r"logits of teacher  ([\d,]+) computed", output)
    return int(found[1].replace(",", "")) if found else 0


def test_stored_logits_are_reused_and_completed(config, digits, teacher, tmp_path, capsys):
    path = tmp_path / "teacher.logits"
    few, more = digits.subset(50), digits.subset(100)
    first = teacher_logits(teacher, config, digits, few, path)
    assert computed(capsys) == 2 * 50
    assert torch.equal(teacher_logits(teacher, config, digits, few, path)[:, few], first[:, few])
    assert computed(capsys) == 0
    both = teacher_logits(teacher, config, digits, more, path)
    assert computed(capsys) == 2 * len(set(more.tolist()) - set(few.tolist()))
    assert torch.equal(both[:, few], first[:, few])


def test_logits_of_other_inputs_are_recomputed(config, digits, teacher, tmp_path, capsys):
    path, subset = tmp_path / "teacher.logits", digits.subset(50)
    teacher_logits(teacher, config, digits, subset, path)
    for other_teacher, other_config, other_digits, reason in (
        (teacher._replace(digest="f" * 64), config, digits, "teacher"),
        (teacher, replace(config, image_size=24), digits, "image_size"),
        (teacher, config, digits._replace(digest="0" * 64), "images"),
    ):
        capsys.readouterr()
        teacher_logits(other_teacher, other_config, other_digits, subset, path)
        output = capsys.readouterr().err
        assert f"different {reason}); computing them again" in output
        assert "100 computed" in output
        teacher_logits(teacher, config, digits, subset, path)


def test_logits_are_in_float32_whatever_the_precision_of_training(config, digits, teacher, tmp_path):
    path, subset, bf16 = tmp_path / "teacher.logits", digits.subset(50), replace(config, precision="bf16")
    right = teacher_logits(teacher, config, digits, subset)[:, subset]
    assert torch.equal(teacher_logits(teacher, bf16, digits, subset, path)[:, subset], right)


def test_the_online_teachers_last_layer_is_in_float32(config, digits, teacher):
    config = replace(config, precision="bf16", crop_padding=2)
    (batch, *_) = datasets.batches(digits.train, digits.subset(100), config, seed=0, epoch=0)
    logits, exact = OnlineTeacher(teacher.model, config)(batch), teacher.model(batch.images)
    with torch.autocast(config.device, dtype=torch.bfloat16):
        rounded = teacher.model(batch.images).float()
    assert (rounded == rounded.bfloat16()).all()
    assert (logits == logits.bfloat16()).float().mean() < 0.1
    assert (logits - exact).norm() < 2 * (rounded - exact).norm()
    assert not torch.equal(logits, exact)  # the other layers are in bfloat16


def test_damaged_logits_are_recomputed(config, digits, teacher, tmp_path, capsys):
    path, subset = tmp_path / "teacher.logits", digits.subset(25)
    right = teacher_logits(teacher, config, digits, subset, path)[:, subset]
    content, random = path.read_bytes(), np.random.default_rng(0)
    damaged = [content[:length] for length in random.choice(len(content), 2, replace=False)]
    for bit in random.choice(8 * len(content), 4, replace=False):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for wrong in damaged:
        path.write_bytes(wrong)
        capsys.readouterr()
        assert torch.equal(teacher_logits(teacher, config, digits, subset, path)[:, subset], right)
        assert "computing them again" in capsys.readouterr().err


# Runs


def test_with_alpha_1_a_run_is_plain_training_bit_for_bit(config, digits):
    recipes = {**config.recipes, "student_kd": replace(config.recipes["student_kd"], alpha=1.0)}
    config = replace(config, recipes=recipes)
    anything = stored_logits(torch.full((2, 1297, C), 0.5, device=config.device))
    custom_resnet.train_model(Model("student", 0, config), digits)
    custom_resnet.train_model(
        Model("student_kd", 0, config), digits, lambda: Distillation(recipes["student_kd"], anything)
    )
    states = [checkpoints.load_checkpoint(Model(n, 0, config).path) for n in ("student", "student_kd")]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    for plain, distilled in zip(states[0]["history"], states[1]["history"], strict=True):
        assert {**plain, "seconds": 0, "soft_share": 0.0} == {**distilled, "seconds": 0}


def test_distillation_leaves_the_teacher_unchanged(config, digits):
    custom_resnet.train_model(Model("teacher", 0, config), digits)
    before = Model("teacher", 0, config).path.read_bytes()
    teacher = load_teacher(Model("teacher", 0, config), digits)
    state = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())

    def make_loss():
        logits = teacher_logits(teacher, config, digits, digits.subset(100))
        return Distillation(config.recipes["student_kd"], stored_logits(logits))

    custom_resnet.train_model(Model("student_kd", 0, config), digits, make_loss)
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert Model("teacher", 0, config).path.read_bytes() == before


def test_the_teacher_sees_the_very_pixels_of_the_student(config, digits, teacher):
    for changes in (
        {"crop_padding": 2},
        {"augment": "crop"},
        {"augment": "trivialaugment"},
        {"augment": "randomerasing"},
    ):
        other = replace(config, **changes)
        (batch, *_) = datasets.batches(digits.train, digits.subset(100), other, seed=0, epoch=0)
        shown = []
        teacher.model.register_forward_pre_hook(lambda _, images, shown=shown: shown.append(images[0]))
        logits = OnlineTeacher(teacher.model, other)(batch)
        teacher.model._forward_pre_hooks.clear()
        assert not logits.is_inference()  # a loss may need them for its gradient
        assert other.unlimited_views
        torch.testing.assert_close(logits, teacher.model(batch.images), atol=1e-4, rtol=0)


def test_shuffled_logits_stay_within_the_class_and_change_their_image(config, digits, teacher):
    subset, labels = digits.subset(100), digits.train.labels
    logits = teacher_logits(teacher, config, digits, subset)
    shuffled = shuffle_within_classes(logits, digits, subset, seed=0)
    moved = 0
    for index in subset:
        source = (logits[0, subset] == shuffled[0, index]).all(1).nonzero()[0, 0].item()
        assert labels[subset[source]] == labels[index]
        assert torch.equal(shuffled[1, index], logits[1, subset[source]])  # the mirror image comes along
        moved += int(subset[source] != index)
    assert moved > 60
    assert not torch.equal(shuffled[:, subset], shuffle_within_classes(logits, digits, subset, seed=1)[:, subset])


def test_a_teacher_is_not_shuffled_as_the_first_epoch_is(digits):
    """With a single class, both permute all images."""
    one_class = digits._replace(train=digits.train._replace(labels=torch.zeros_like(digits.train.labels)))
    logits = torch.arange(1297.0, device=digits.train.labels.device).view(1, -1, 1).expand(2, -1, 1)
    moved = shuffle_within_classes(logits, one_class, torch.arange(1297), seed=3)[0, :, 0].long().tolist()
    assert sorted(moved) == list(range(1297))
    assert moved != np.random.default_rng((3, 0)).permutation(1297).tolist()


@pytest.mark.parametrize("changes", [{}, {"shuffle_teacher": True}, {"label_smoothing": 0.1}], ids=str)
def test_a_recipe_is_trained_with_its_own_loss(config, digits, monkeypatch, changes):
    recipe = replace(config.recipes["student_kd"], epochs=1, **changes)
    config = replace(config, recipes={**config.recipes, "student_kd": recipe})
    custom_resnet.train_model(Model("teacher", 0, config), digits)
    model, compared = load_teacher(Model("teacher", 0, config), digits), []
    stored = teacher_logits(model, config, digits, digits.subset(100))
    if recipe.shuffle_teacher:
        stored = shuffle_within_classes(stored, digits, digits.subset(100), seed=0)

    def look(training, dataset, loss_fn):
        for batch in datasets.batches(digits.train, digits.subset(100), config, seed=0, epoch=0):
            z = torch.randn(len(batch.labels), C, device=config.device)
            v = stored[batch.flipped.long(), batch.indices]
            hard = F.cross_entropy(z, batch.labels, label_smoothing=recipe.label_smoothing)
            soft = distillation_loss(z, v, batch.labels, 0.0, recipe.temperature)
            compared.append((sum(loss_fn(z, batch).values()), 0.25 * hard + 0.75 * soft))
        return [{}]

    monkeypatch.setattr(custom_resnet, "fit", look)
    teacher_student_model.train_with_teacher(Model("student_kd", 0, config), digits)
    assert len(compared) == 4
    for found, expected in compared:
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_are_smoothed_without_a_teacher(config, digits, monkeypatch):
    student = replace(config.recipes["student"], label_smoothing=0.1)
    config, found = replace(config, recipes={**config.recipes, "student": student}), []

    def look(training, dataset, loss_fn):
        batch = next(datasets.batches(digits.train, digits.subset(100), config, seed=0, epoch=0))
        z = torch.randn(len(batch.labels), C, device=config.device)
        spread = torch.full_like(z, 0.01) + 0.9 * F.one_hot(batch.labels, C)
        found.append((loss_fn(z, batch)["hard"].item(), -(spread * z.log_softmax(1)).sum(1).mean().item()))
        return [{}, {}]

    monkeypatch.setattr(custom_resnet, "fit", look)
    teacher_student_model.train_with_teacher(Model("student", 0, config), digits)
    ((loss, expected),) = found
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_shuffled_teacher_needs_stored_logits(config):
    recipes = {**config.recipes, "student_kd": replace(config.recipes["student_kd"], shuffle_teacher=True)}
    for changes in ({"crop_padding": 2}, {"augment": "crop"}):
        with pytest.raises(UserError, match="shuffle_teacher = True: needs stored logits"):
            replace(config, recipes=recipes, **changes)


def test_load_teacher_reports_a_missing_file(config, digits):
    with pytest.raises(UserError, match=r"seed0/teacher.pt.*not trained yet"):
        load_teacher(Model("teacher", 0, config), digits)


def test_online_and_stored_logits_train_the_same_student(config, digits, teacher):
    recipe, weights = config.recipes["student_kd"], []
    for lookup in (
        stored_logits(teacher_logits(teacher, config, digits, digits.subset(100))),
        OnlineTeacher(teacher.model, config),
    ):
        torch.manual_seed(0)
        model = custom_resnet.build_resnet("resnet18", C, pretrained=False).to(config.device)
        recipe = replace(recipe, temperature=2.0, lr=0.001)
        history = fit(model, recipe, config, 0, digits, Distillation(recipe, lookup))
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]).detach())
        assert len(history) == 2
    moved = (weights[0] - weights[1]).norm() / weights[0].norm()
    assert moved < 1e-3
