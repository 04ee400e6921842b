"""Soft losses against plain loops in float64, their closed forms, and finite differences."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fit
from scipy import stats
from scipy.special import log_softmax, softmax

import custom_resnet
from engine.datasets import load_dataset
from engine.errors import UserError
from engine.recipes import Recipe
from engine.soft_losses import SOFT_LOSSES, dist, dkd, kd, options, problems_of_two_classes, standardised_kd, ttm
from engine.training import explain_share
from teacher_student_model import Distillation, stored_logits

B, C, T = 7, 5, 3.0


@pytest.fixture
def logits():
    random = np.random.default_rng(0)
    return 3 * random.normal(size=(B, C)), 3 * random.normal(size=(B, C)), random.integers(0, C, B)


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


def kl(p, q) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def plain_kd(z, v, y, t):
    return t**2 * np.mean([kl(softmax(v[i] / t), softmax(z[i] / t)) for i in range(len(z))])


def plain_dkd(z, v, y, t, target_weight=1.0, nontarget_weight=8.0):
    total = 0.0
    for zi, vi, yi in zip(z, v, y, strict=True):
        p, q = softmax(vi / t), softmax(zi / t)
        target = kl([p[yi], 1 - p[yi]], [q[yi], 1 - q[yi]])
        others = kl(softmax(np.delete(vi, yi) / t), softmax(np.delete(zi, yi) / t))
        total += target_weight * target + nontarget_weight * others
    return t**2 * total / len(z)


def plain_dist(z, v, y, t, inter_weight=1.0, intra_weight=1.0):
    p, q = softmax(v / t, axis=1), softmax(z / t, axis=1)
    inter = 1 - np.mean([stats.pearsonr(q[i], p[i])[0] for i in range(len(z))])
    intra = 1 - np.mean([stats.pearsonr(q[:, c], p[:, c])[0] for c in range(z.shape[1])])
    return t**2 * (inter_weight * inter + intra_weight * intra)


def plain_ttm(z, v, y, t):
    powered = softmax(v, axis=1) ** (1 / t)
    powered /= powered.sum(1, keepdims=True)
    return np.mean([kl(powered[i], softmax(z[i])) for i in range(len(z))])


def plain_standardised_kd(z, v, y, t):
    z, v = ((a - a.mean(1, keepdims=True)) / (a.std(1, ddof=1, keepdims=True) + 1e-7) for a in (z, v))
    return plain_kd(z, v, y, t)


PLAIN = {
    "kd": plain_kd,
    "dkd": plain_dkd,
    "dist": plain_dist,
    "ttm": plain_ttm,
    "standardised_kd": plain_standardised_kd,
}
each = pytest.mark.parametrize("name", SOFT_LOSSES)


@each
def test_agrees_with_a_plain_loop(logits, name):
    z, v, y = logits
    for temperature in (1.0, T, 20.0):
        loss = SOFT_LOSSES[name](*tensors(z, v, y), temperature).item()
        assert loss == pytest.approx(PLAIN[name](z, v, y, temperature), rel=1e-6)


@each
def test_the_gradient_agrees_with_finite_differences(logits, name):
    z, v, y = tensors(*logits)
    assert torch.autograd.gradcheck(lambda z: SOFT_LOSSES[name](z, v, y, T), z.requires_grad_())


@each
def test_the_minimum_is_where_student_and_teacher_agree(logits, name):
    z, v, y = tensors(*logits)
    agreeing = v / T if name == "ttm" else v.clone()  # there, the student alone is not softened
    loss = SOFT_LOSSES[name](agreeing.requires_grad_(), v, y, T)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, agreeing)
    assert gradient.abs().max() < 1e-6
    assert SOFT_LOSSES[name](z, v, y, T) > 0.01


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_have_finite_losses_and_gradients(name, dtype):
    certain = torch.eye(C, dtype=dtype)[torch.arange(B) % C] * 1e4
    constant = torch.zeros(B, C, dtype=dtype)
    labels = torch.arange(B) % C
    for student, teacher in ((certain.roll(1, 1), certain), (constant, certain), (certain, constant), (constant,) * 2):
        z = student.clone().requires_grad_()
        loss = SOFT_LOSSES[name](z, teacher, labels, 5.0)
        loss.backward()
        assert loss.isfinite()
        assert z.grad.isfinite().all()


# Closed forms


def test_kd_is_target_plus_weighted_nontarget(logits):
    """KD = TCKD + (1 - p_v(y)) NCKD (Zhao et al. 2022, section 3), here for each image alone."""
    for z, v, y in zip(*logits, strict=True):
        row = tensors(z[None], v[None], np.array([y]))
        rest = 1 - softmax(v / T)[y]
        assert dkd(*row, T, 1.0, float(rest)).item() == pytest.approx(kd(*row, T).item(), rel=1e-9)


def test_at_a_high_temperature_kd_is_the_squared_distance_of_centred_logits(logits):
    z, v, y = logits
    difference = (z - v) - (z - v).mean(1, keepdims=True)
    limit = np.mean((difference**2).sum(1)) / (2 * C)
    assert kd(*tensors(z, v, y), 1e4).item() == pytest.approx(limit, rel=1e-3)


def test_standardised_kd_and_dist_ignore_scale_and_shift(logits):
    z, v, y = tensors(*logits)
    assert standardised_kd(2 * z + 5, v, y, T).item() == pytest.approx(standardised_kd(z, v, y, T).item(), rel=1e-6)
    assert dist(z + 5, v, y, T).item() == pytest.approx(dist(z, v, y, T).item(), rel=1e-9)


def test_ttm_at_temperature_1_is_kd(logits):
    assert ttm(*tensors(*logits), 1.0).item() == pytest.approx(kd(*tensors(*logits), 1.0).item(), rel=1e-12)


# In the recipe


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_a_recipe_passes_its_weights_and_options_on(logits, name):
    z, v, y = tensors(*logits)
    changed = {parameter: default + 1 for parameter, default in options(name).items()}
    recipe = Recipe(teacher="t", soft_loss=name, temperature=T, soft_weight=9.0, alpha=0.1, loss_options=changed)
    batch = type("Batch", (), {"labels": y, "indices": torch.arange(B), "flipped": torch.zeros(B)})
    terms = Distillation(recipe, stored_logits(torch.stack([v, v + 1])))(z, batch)
    assert terms["soft"].item() == pytest.approx(9 * PLAIN[name](*logits, T, **changed), rel=1e-6)
    hard = -log_softmax(logits[0], axis=1)[np.arange(B), logits[2]].mean()
    assert terms["hard"].item() == pytest.approx(0.1 * hard, rel=1e-9)


def test_the_options_of_a_soft_loss_are_its_further_parameters():
    """By hand; an option that is not given has its default."""
    assert options("kd") == options("ttm") == {}
    assert options("dkd") == {"target_weight": 1.0, "nontarget_weight": 8.0}
    recipe = Recipe(teacher="t", soft_loss="dkd", loss_options={"nontarget_weight": 2})
    assert recipe.soft_loss_options == {"target_weight": 1.0, "nontarget_weight": 2}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": "t", "loss_options": {"nontarget_weight": 2.0}}, "loss_options"),  # kd has none
        ({"teacher": "t", "soft_loss": "dkd", "loss_options": {"nontarget": 2.0}}, "loss_options"),
        ({"teacher": "t", "soft_loss": "dkd", "loss_options": {"temperature": 2.0}}, "loss_options"),
        ({"teacher": "t", "soft_loss": "dkd", "loss_options": {"nontarget_weight": "2"}}, "loss_options"),
        ({"teacher": "t", "soft_loss": "dkd", "loss_options": {"nontarget_weight": math.inf}}, "loss_options"),
        ({"teacher": "t", "soft_loss": "dkd", "loss_options": [("nontarget_weight", 2.0)]}, "loss_options"),
        ({"loss_options": {"nontarget_weight": 2.0}}, "loss_options"),
        ({"soft_loss": "dkd"}, "soft_loss"),
        ({"teacher": "t", "soft_loss": "ttm", "scale_soft_loss": False}, "scale_soft_loss"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(changes, field):
    with pytest.raises(UserError) as error:
        Recipe(**changes)
    (message,) = error.value.messages
    assert message.startswith(f"{field} = ")


# Two classes


def test_with_two_classes_what_has_no_gradient_is_refused():
    torch.manual_seed(0)
    v, labels = 3 * torch.randn(20, 2, dtype=torch.float64), torch.randint(2, (20,))
    z = 3 * torch.randn(20, 2, dtype=torch.float64, requires_grad=True)

    def gradient(name: str, **changed: float) -> torch.Tensor:
        return torch.autograd.grad(SOFT_LOSSES[name](z, v, labels, T, **changed), z)[0]

    for name in SOFT_LOSSES:
        usual, defaults = gradient(name), options(name)
        teaches = usual.norm() > 1e-3
        assert bool(problems_of_two_classes(name, defaults)) == (not teaches)
        for parameter, default in defaults.items():
            changed = gradient(name, **{parameter: default + 1})
            has_effect = (changed - usual).norm() > 1e-6
            problems = problems_of_two_classes(name, {**defaults, parameter: default + 1})
            assert any(parameter in problem for problem in problems) == (not has_effect)
            teaches = gradient(name, **{parameter: 0.0}).norm() > 1e-6
            problems = problems_of_two_classes(name, {**defaults, parameter: 0.0})
            assert any("nothing else" in problem for problem in problems) == (not teaches)
    assert gradient("standardised_kd").norm() < 1e-5
    assert problems_of_two_classes("standardised_kd", {})


@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_a_row_that_cannot_learn_from_two_classes_is_refused_before_training(config, image_folder, classes):
    root = image_folder({f"{split}/{name}": 20 for split in ("train", "test") for name in classes})
    student = replace(config.recipes["student_kd"], train_size=None, soft_loss="standardised_kd")
    weighted = replace(student, soft_loss="dist", loss_options={"inter_weight": 3.0})
    rows = {"teacher": replace(config.recipes["teacher"], train_size=None), "sta": student, "wei": weighted}
    config = replace(config, recipes=rows, dataset=str(root))
    if len(classes) == 2:
        with pytest.raises(UserError) as error:
            load_dataset(config)
        first, second = error.value.messages
        assert first.startswith("sta.soft_loss = 'standardised_kd'")
        assert second.startswith("wei.loss_options: inter_weight = 3")
        load_dataset(replace(config, only=("teacher",)))
    else:
        load_dataset(config)


# The scale of the two losses


@pytest.mark.parametrize(
    ("changes", "share", "said"),
    [
        ({}, 0.7, None),
        ({}, 0.4, None),
        (
            {"scale_soft_loss": False},
            0.1,
            "suggests 75%: without the factor T^2 = 25 about 11% are expected",
        ),
        ({}, 0.05, "the teacher's probabilities differ little"),
        ({"soft_weight": 0.25}, 0.85, None),
        ({"soft_weight": 0.25}, 0.95, "its gradients are larger than those of the hard loss"),
        ({"alpha": 1.0}, 0.0, None),
        ({"soft_weight": 0.0}, 0.0, None),
    ],
)
def test_a_share_of_the_gradient_far_from_its_weight_is_explained(changes, share, said):
    explanation = explain_share(Recipe(teacher="t", **changes), share)
    assert (explanation is None) == (said is None)
    assert said is None or said in explanation


@pytest.mark.parametrize("scale", [True, False])
def test_the_share_of_the_gradient_is_that_of_a_plain_loop(config, digits, scale):
    torch.manual_seed(0)
    recipe = replace(config.recipes["student_kd"], epochs=1, scale_soft_loss=scale, train_size=75)
    logits = 3 * torch.randn(2, len(digits.train.labels), 10, device=config.device)
    norms, loss_fn = [], Distillation(recipe, stored_logits(logits))

    def spy(z, batch):
        leaf = z.detach().requires_grad_()
        terms = loss_fn(leaf, batch)
        norms.append([torch.autograd.grad(term, leaf, retain_graph=True)[0].norm().item() for term in terms.values()])
        return loss_fn(z, batch)

    model = custom_resnet.build_resnet("resnet18", 10).to(config.device)
    history = fit(model, recipe, config, 0, digits, spy)
    hard, soft = map(sum, zip(*norms, strict=True))
    assert len(norms) == 3
    assert history[0]["soft_share"] == pytest.approx(soft / (hard + soft), rel=1e-4)


def test_a_soft_loss_without_a_gradient_has_a_share_of_0(config, digits):
    """In every epoch, because the report reads the first and the last one."""

    def loss(logits, batch):
        return {**custom_resnet.cross_entropy(logits, batch), "soft": 0 * logits.sum()}

    recipe = replace(config.recipes["student_kd"], train_size=50)
    history = fit(custom_resnet.build_resnet(recipe.arch, 10).to(config.device), recipe, config, 0, digits, loss)
    assert [record["soft_share"] for record in history] == [0, 0]


def test_without_a_soft_loss_there_is_no_share(config, digits):
    model = custom_resnet.build_resnet("resnet18", 10).to(config.device)
    recipe = replace(config.recipes["student"], epochs=1)
    history = fit(model, recipe, config, 0, digits, custom_resnet.cross_entropy)
    assert "soft_share" not in history[0]
