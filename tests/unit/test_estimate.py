import copy
import itertools
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import flags as small_flags
from conftest import override
from torch import nn

import custom_resnet
import utils
from config import parse
from engine import estimate
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.errors import UserError
from engine.estimate import (
    Estimate,
    Job,
    check_models,
    check_space,
    plan,
    space_needed,
    time_training,
    warn_of_slow_batchnorm,
)
from engine.fingerprints import training_settings
from engine.models import Architecture
from engine.recipes import Recipe
from engine.settings import Config, Model
from utils import open_run, unfinished, with_config

RESNET18, RESNET50 = (Architecture(arch, "imagenet") for arch in ("resnet18", "resnet50"))
RESNET18_BYTES = 11_181_642 * 4


def students(config: Config) -> list[Model]:
    return [Model("student", seed, config) for seed in (0, 1)]


BUFFERS = 9_600 * 4 + 20 * 8  # BatchNorm's running statistics, and its counters
SIZES = {"student": RESNET18_BYTES, "student_kd": RESNET18_BYTES}


@pytest.fixture
def config(config):
    """The small experiment with ResNets, at a size at which bfloat16 can train on a CPU too."""
    recipes = {name: replace(recipe, arch="resnet18") for name, recipe in config.recipes.items()}
    return replace(config, image_size=32, recipes=recipes)


@pytest.fixture
def timed(monkeypatch):
    """Replace the timing by a table of seconds per image: timed({(RESNET18, "fp32"): 0.1}); returns what it timed."""

    def by(table: dict[tuple[Architecture, str], float]) -> list[tuple[Architecture, str]]:
        timed_pairs = []

        def fake(archs, config, dataset, precisions):
            pairs = list(itertools.product(archs, precisions))
            timed_pairs.extend(pairs)
            return {pair: table[pair] for pair in pairs}

        monkeypatch.setattr(estimate, "time_training", fake)
        return timed_pairs

    return by


@pytest.fixture
def bf16(monkeypatch):
    """Whether the device supports bf16: bf16(True)."""
    return lambda supported: monkeypatch.setattr(estimate, "supports_bf16", lambda *_: supported)


def trained_images(job: Job, config, dataset) -> float:
    """Training images over the epochs of a job."""
    return job.epochs * (job.model.recipe.train_size or len(dataset.train.labels))


def images_of(job: Job, config, dataset) -> float:
    """Training images, and a third of a step for each test image, over the epochs of a job."""
    return trained_images(job, config, dataset) + job.epochs * len(dataset.test.labels) / 3


# The time of a run


def test_the_estimate_follows_from_the_time_of_a_step(config, digits, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))  # a step is 1 s
    _, estimates = plan([Job(Model("student", 0, config), 2), Job(Model("student", 1, config), 2)], config, digits)
    steps = 2 * 100 / config.batch_size
    after = 2 * (100 + 500 / 3) / config.batch_size  # and a third of a step for each test image
    assert estimates[Model("student", 0, config)] == pytest.approx((steps, after))
    assert estimates[Model("student", 1, config)] == pytest.approx((steps, 0.0))


def test_estimates_cover_each_model_and_the_ones_after_it(config, digits, timed):
    recipes = {**config.recipes, "teacher": Recipe(arch="resnet50", train_size=None)}
    config = replace(config, recipes=recipes)
    table = {(RESNET50, "fp32"): 0.5, (RESNET18, "fp32"): 0.125}
    timed(table)
    jobs = [
        Job(Model("teacher", 3, config), 5),
        Job(Model("student", 3, config), 1),
        Job(Model("student_kd", 3, config), 4),
    ]
    of_student = 0.125 * images_of(jobs[2], config, digits)
    # The teacher classifies: 100 images and their mirror images once, or 100 images in each of 4 epochs.
    for augment, asked in (("none", 2 * 100), ("crop", 4 * 100)):
        _, estimates = plan(jobs, replace(config, augment=augment), digits)
        total = [0.5 * images_of(jobs[0], config, digits), 0.125 * images_of(jobs[1], config, digits)]
        total.append(of_student + 0.5 * asked / 3)
        assert list(estimates) == [job.model for job in jobs]
        for number, (job, found) in enumerate(zip(jobs, estimates.values(), strict=True)):
            steps = trained_images(job, config, digits) * (0.5 if job.model.name == "teacher" else 0.125)
            assert found == pytest.approx((steps, sum(total[number + 1 :])))


def test_a_teacher_that_is_finished_is_timed_as_it_will_run(config, digits, timed):
    recipes = {**config.recipes, "teacher": Recipe(arch="resnet50")}
    config = replace(config, recipes={**recipes, "more": replace(recipes["student_kd"], train_size=None)})
    timed_pairs = timed({(RESNET50, "fp32"): 0.5, (RESNET18, "fp32"): 0.125})
    jobs = [
        Job(Model("student", 0, config), 1),
        Job(Model("student_kd", 0, config), 2),
        Job(Model("more", 0, config), 1),
    ]

    def after(config) -> list[float]:
        return [estimate.later for estimate in plan(jobs, config, digits)[1].values()]

    kd, more = (0.125 * images_of(job, config, digits) for job in jobs[1:])
    # All 1,297 images are needed: their logits are computed for the first of the two students.
    assert after(config) == pytest.approx([kd + more + 2 * 1297 * 0.5 / 3, more, 0])
    assert set(timed_pairs) == {(RESNET50, "fp32"), (RESNET18, "fp32")}
    assert after(replace(config, horizontal_flip=0.0)) == pytest.approx([kd + more + 1297 * 0.5 / 3, more, 0])
    online = [2 * 100 * 0.5 / 3, 1297 * 0.5 / 3]
    assert after(replace(config, augment="crop")) == pytest.approx([kd + more + sum(online), more + online[1], 0])
    path = Model("teacher", 0, config).logits_path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"stored")
    timed_pairs.clear()
    assert after(config) == pytest.approx([kd + more, more, 0])
    assert timed_pairs == [(RESNET18, "fp32")]


def test_the_estimate_divides_by_the_world_size(config, digits, timed, monkeypatch):
    timed({(RESNET18, "fp32"): 1.0})
    job = Job(Model("student", 0, config), 2)
    monkeypatch.setattr(estimate, "world_size", lambda: 4)
    _, estimates = plan([job], config, digits)
    assert estimates[Model("student", 0, config)].model == pytest.approx(trained_images(job, config, digits) / 4)


def test_the_estimate_counts_validation_images_if_there_are_any(config, timed):
    config = replace(config, validation_size=100)
    timed({(RESNET18, "fp32"): 1.0})
    _, estimates = plan(
        [Job(Model("student", 0, config), 1), Job(Model("student", 1, config), 1)], config, utils.load_dataset(config)
    )
    assert estimates[Model("student", 0, config)] == pytest.approx((100, 100 + 100 / 3))


@pytest.mark.parametrize(
    ("hours", "announced"),
    [(31.4, "about 31 h 24 min on"), (1.99, "about 1 h 59 min on"), (0.99, "about 59 min on"), (0.016, None)],
)
def test_a_run_above_a_minute_is_announced(config, digits, timed, capsys, hours, announced):
    jobs = [Job(Model("student", 0, config), 2), Job(Model("student", 1, config), 2)]
    timed({(RESNET18, "fp32"): hours * 3600 / sum(images_of(job, config, digits) for job in jobs)})
    plan(jobs, config, digits)
    output = capsys.readouterr().err
    if announced:
        assert output.startswith("This will take " + announced)
        assert ("python teacher_student_model.py --preset demo" in output) == (hours > 1)
    else:
        assert output == ""


# The precision


@pytest.mark.parametrize(("student_epochs", "faster"), [(1, "fp32"), (1000, "bf16")])
def test_auto_chooses_the_precision_with_the_shorter_total(config, digits, timed, bf16, capsys, student_epochs, faster):
    recipes = {**config.recipes, "teacher": replace(config.recipes["teacher"], arch="resnet50")}
    config = replace(config, precision="auto", recipes=recipes)
    bf16(True)
    table = {
        (RESNET50, "fp32"): 0.1,
        (RESNET50, "bf16"): 0.2,
        (RESNET18, "fp32"): 0.05,
        (RESNET18, "bf16"): 0.04,
    }
    timed_pairs = timed(table)
    jobs = [Job(Model("teacher", 0, config), 2), Job(Model("student", 0, config), student_epochs)]
    resolved, estimates = plan(jobs, config, digits)
    assert set(timed_pairs) == set(table)
    assert resolved == replace(config, precision=faster)
    for job in jobs:
        expected = trained_images(job, config, digits) * table[Architecture.of(job.model.recipe), faster]
        assert estimates[job.model].model == pytest.approx(expected)
    rates = {"fp32": ("10.0", "20.0", "5.0", "25.0", "bf16"), "bf16": ("5.0", "25.0", "10.0", "20.0", "fp32")}
    first, second, other_first, other_second, other = rates[faster]
    assert (
        f"precision = auto: {faster} is faster for this run; resnet50 trains at {first} images/s, in {other} at "
        f"{other_first}; resnet18 trains at {second} images/s, in {other} at {other_second}\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fixed_precision_is_kept(config, digits, timed, bf16, precision):
    bf16(True)
    timed_pairs = timed({(RESNET18, "fp32"): 1.0 + (precision == "fp32"), (RESNET18, "bf16"): 1.5})
    config = replace(config, precision=precision)
    assert plan([Job(Model("student", 0, config), 1)], config, digits)[0] == config
    assert timed_pairs == [(RESNET18, precision)]


def test_without_support_for_bf16_only_fp32_is_timed(config, digits, timed, bf16):
    bf16(False)
    timed_pairs = timed({(RESNET18, "fp32"): 1.0})
    resolved, _ = plan([Job(Model("student", 0, config), 1)], replace(config, precision="auto"), digits)
    assert resolved.precision == "fp32"
    assert timed_pairs == [(RESNET18, "fp32")]


def test_nothing_is_timed_without_jobs(config, digits, timed, bf16, capsys):
    bf16(True)
    timed_pairs = timed({})
    assert plan([], replace(config, precision="auto"), digits)[1] == {}
    assert timed_pairs == []
    assert capsys.readouterr().err == ""


# The timing


class Scripted(nn.Module):
    """A model whose steps take as long as a script says, on the clock `now`."""

    def __init__(self, classes: int, now: SimpleNamespace, steps):
        super().__init__()
        self.layer, self.now, self.steps, self.seen = nn.Linear(3, classes), now, steps, []

    def forward(self, images):
        logits = self.layer(images.mean((2, 3)))
        self.seen.append((len(images), logits.dtype))
        self.now.seconds += next(self.steps)
        return logits


@pytest.fixture
def scripted(monkeypatch):
    """Architectures whose models share a clock and have a script of seconds per step, and the models they build."""
    now, models, scripts = SimpleNamespace(seconds=0.0), {}, {}
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    def build(arch: Architecture, classes: int) -> nn.Module:
        models[arch.arch] = Scripted(classes, now, iter(scripts[arch.arch]))
        return models[arch.arch]

    monkeypatch.setattr(Architecture, "build", build)

    def make(steps: dict[str, list[float]]) -> list[Architecture]:
        scripts.update(steps)
        return [Architecture(name, "imagenet") for name in steps]

    return make, models


def test_timing_alternates_precisions_and_takes_the_fastest_step_after_warm_up(config, digits, scripted):
    make, models = scripted
    # fp32, bf16, fp32, ...: each warms up in 0.1 s, quicker than any step, and has an outlier
    (a,) = make({"a": [0.1, 0.1, 0.4, 9.0, 7.0, 0.3]})
    found = time_training([a], config, digits, ["fp32", "bf16"])
    assert found == {(a, "fp32"): pytest.approx(0.4 / 25), (a, "bf16"): pytest.approx(0.3 / 25)}
    assert models["a"].seen == [(25, torch.float32), (25, torch.bfloat16)] * 3  # two seconds have passed by then


def test_timing_takes_three_to_ten_rounds(config, digits, scripted):
    make, models = scripted
    quick, slow = make({"quick": [0.01] * 9 + [0.005], "slow": [60.0] * 3})
    found = time_training([quick, slow], config, digits, ["fp32"])
    assert found == {(quick, "fp32"): pytest.approx(0.005 / 25), (slow, "fp32"): pytest.approx(60 / 25)}
    assert [len(model.seen) for model in models.values()] == [10, 3]


def test_a_timed_step_on_a_cpu_has_at_most_32_images(config, digits, scripted):
    make, models = scripted
    time_training(make({"a": [1.0] * 3}), replace(config, batch_size=100), digits, ["fp32"])
    assert {count for count, _ in models["a"].seen} == {32 if config.device == "cpu" else 100}


def test_a_timed_step_has_as_many_images_as_one_process(config, digits, scripted, monkeypatch):
    make, models = scripted
    monkeypatch.setattr(estimate, "world_size", lambda: 5)
    time_training(make({"a": [1.0] * 3}), replace(config, batch_size=100), digits, ["fp32"])
    assert {count for count, _ in models["a"].seen} == {20}


# The space on the disk


def test_disk_space_is_checked_before_training(tmp_path, config, digits, capsys, monkeypatch):
    jobs = [Job(Model("student", 0, config), 2), Job(Model("student_kd", 0, config), 2)]
    assert check_models(jobs, config, digits) == {name: size + BUFFERS for name, size in SIZES.items()}
    needed = space_needed(jobs, SIZES, config, digits)
    # two finished models; one in training and its copy, both with momentum; the logits of a teacher, and their copy
    assert 6 * RESNET18_BYTES < needed < 6.1 * RESNET18_BYTES
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**7))
    with pytest.raises(SystemExit) as exit:
        custom_resnet.main(small_flags(tmp_path, "--only", "student", "--student.arch=resnet18", device=config.device))
    assert exit.value.code == 2
    assert "checkpoints: this run needs 224 MB, and 10 MB are free there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".demo.lock"]


def test_models_that_train_at_the_same_time_need_space_at_the_same_time(config, digits):
    jobs = [Job(Model("student", seed, config), 2) for seed in range(3)]
    one, two, many = (space_needed(jobs, SIZES, replace(config, jobs=n), digits) for n in (1, 2, 8))
    assert (two - one, many - two) == (4 * RESNET18_BYTES, 4 * RESNET18_BYTES)  # weights and momentum, and their copy


def test_resuming_needs_no_initial_weights(config, digits, hub):
    recipes = {name: replace(recipe, pretrained=True) for name, recipe in config.recipes.items()}
    config = replace(config, recipes=recipes)
    assert check_models([Job(Model("student", 0, config), 1, resumed=True)], config, digits)["student"] > RESNET18_BYTES
    with pytest.raises(UserError, match="is missing and could not be downloaded"):
        check_models(
            [Job(Model("student", 0, config), 1, resumed=True), Job(Model("student", 1, config), 2)], config, digits
        )


def test_space_needed_includes_stored_logits_for_distilled_models(config, digits):
    views = 2 * len(digits.train.labels) * 10 * 4
    plain, distilled = (
        space_needed([Job(Model(name, 0, config), 1)], {name: SIZES[name]}, config, digits)
        for name in ("student", "student_kd")
    )
    assert distilled - plain == 2 * views


def test_files_to_be_replaced_count_as_free_space(config, digits, monkeypatch):
    jobs = [Job(Model("student", 0, config), 1)]
    needed = space_needed(jobs, SIZES, config, digits)
    path = Model("student", 0, config).path
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(1000)
    for free, fits in ((needed - 1000, True), (needed - 1001, False)):
        monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            check_space(jobs, SIZES, config, digits)
        else:
            with pytest.raises(UserError, match="Free some space or choose another folder"):
                check_space(jobs, SIZES, config, digits)
    check_space([], {}, config, digits)  # nothing to train needs nothing


# The start of a training


@pytest.fixture
def partial(config, trained, digits):
    """A run of two seeds: seed 0's student is finished, seed 1's has an epoch left, both in bf16."""
    config = replace(config, seeds=(0, 1), precision="auto")
    for seed in (0, 1):
        path = Model("student", seed, config).path
        state = copy.deepcopy(load_checkpoint(trained / "checkpoints" / "demo" / f"seed{seed}" / "student.pt"))
        state["settings"] = training_settings(Model("student", seed, config), digits)
        state["environment"]["precision"] = "bf16"
        if seed == 1:
            state["history"], state["finished"] = state["history"][:1], False
        save_checkpoint(path, state)
    return config


def test_only_unfinished_epochs_are_estimated(partial, digits):
    both = [Model(name, seed, partial) for seed in (0, 1) for name in ("student", "teacher")]
    config = partial
    left = [
        Job(Model("teacher", 0, config), 2),
        Job(Model("student", 1, config), 1, resumed=True),
        Job(Model("teacher", 1, config), 2),
    ]
    assert unfinished(both, digits) == (left, "bf16")
    overwriting = with_config(both, replace(partial, overwrite=True))
    assert unfinished(overwriting, digits) == (left, "bf16")  # what matches is kept
    smaller = replace(partial, overwrite=True, batch_size=20)
    assert unfinished(with_config(both, smaller), digits)[0] == [Job(model, 2) for model in both]
    with pytest.raises(UserError, match="batch_size was 25, is now 20"):
        unfinished(with_config(both, replace(smaller, overwrite=False)), digits)
    assert not [path for path in os.listdir(Model("student", 0, partial).path.parent) if "probe" in path]


def test_a_damaged_checkpoint_is_refused_before_anything_is_trained(partial, digits):
    path = Model("student", 1, partial).path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"seed1/student\.pt: is damaged"), open_run(students(partial)):
        pass
    again = students(replace(partial, overwrite=True))
    assert Job(again[1], 2) in unfinished(again, digits)[0]


def test_a_student_follows_its_retrained_teacher(tmp_path, trained, digits):
    """Its settings still match the teacher that is about to be replaced."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    words = small_flags(tmp_path, "--teacher.epochs=1", "--overwrite")
    config = parse(words)
    jobs, _ = unfinished(config.models(), digits)
    assert jobs == [Job(Model("teacher", 0, config), 1), Job(Model("student_kd", 0, config), 2)]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_teacher_that_only_leaves_out_is_checked_beforehand(tmp_path, trained, digits, damaged):
    """--overwrite would otherwise replace the student before it is found that the teacher does not match."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/demo/seed0/teacher.pt"
    if damaged:
        path.write_bytes(path.read_bytes()[:1000])
    words = small_flags(tmp_path, "--overwrite", "--batch_size=20")
    config = parse(override(words, "--only", "student", "student_kd"))
    message = r"teacher\.pt: is damaged" if damaged else r"teacher\.pt: .*add it to --only"
    with pytest.raises(UserError, match=message):
        unfinished(config.models(), digits)
    config = parse(words)  # with the teacher, everything is trained again
    assert [job.model.name for job in unfinished(config.models(), digits)[0]] == ["teacher", "student", "student_kd"]


def test_sync_batchnorm_is_refused_without_cuda(config):
    with (
        pytest.raises(UserError, match=r"sync_batchnorm = True: .* the device is cpu"),
        open_run(students(replace(config, sync_batchnorm=True, device="cpu"))),
    ):
        pass


def test_a_run_without_anything_to_train_leaves_the_precision_open(config, bf16, timed, capsys):
    """A teacher that is used as it is, alone at first: its students' precision is timed later."""
    bf16(True)
    recipes = {"teacher": replace(config.recipes["teacher"], epochs=0, weights="random")}
    with open_run(replace(config, recipes=recipes, precision="auto").models()):
        pass
    assert "precision = auto" not in capsys.readouterr().err


def test_start_training_keeps_the_runs_precision_and_logs_a_summary(partial, timed, bf16, capsys):
    bf16(True)
    timed_pairs = timed({(RESNET18, "bf16"): 0.5, (RESNET18, "fp32"): 0.1})
    with open_run(students(partial)) as (models, dataset, estimates):
        assert [model.config for model in models] == [replace(partial, precision="bf16")] * 2
        assert timed_pairs == [(RESNET18, "bf16")]
        assert estimates == {models[1]: Estimate(pytest.approx(0.5 * 100), 0.0)}
        output = capsys.readouterr().err
        assert "demo: digits, 1,297 training and 500 test images of 10 classes at 32 px" in output
        assert ", bf16\n" in output
        assert len(dataset.train.labels) == 1297


def test_a_new_run_uses_the_faster_precision(partial, timed, bf16):
    bf16(True)
    timed({(RESNET18, "bf16"): 0.5, (RESNET18, "fp32"): 0.1})
    recipes = {**partial.recipes, "student": replace(partial.recipes["student"], lr=0.05)}  # not that of the other run
    with open_run(students(replace(partial, run="new", recipes=recipes))) as (models, _, estimates):
        assert [model.config.precision for model in models] == ["fp32", "fp32"]
        assert list(estimates) == models


@pytest.mark.parametrize(
    ("momentum", "steps", "warned"), [(0.1, 37, True), (0.1, 38, False), (0.01, 389, True), (0.01, 390, False)]
)
def test_few_steps_for_batchnorm_are_said(momentum, steps, warned, capsys):
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=0.5), nn.BatchNorm2d(3, momentum=momentum))
    network[1].running_mean.fill_(1.0)
    for _ in range(steps):  # of zeros, towards which the mean goes
        network[1](torch.zeros(2, 3, 1, 1))
    assert (network[1].running_mean.max() > 0.02) == warned
    warn_of_slow_batchnorm("student", network, steps)
    assert ("student has" in capsys.readouterr().err) == warned
