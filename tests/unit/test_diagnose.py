"""What a loss computes, recovered from its gradient; mistakes by their names; models that are set up wrongly."""

import ast
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from known_losses import IMPLEMENTATIONS, check_family_member, check_outside_member, decoupled, kl, log_p, p
from torch import nn

from diagnose import examine, examine_models
from diagnose.__main__ import main
from diagnose.loss import CannotExamine
from engine.soft_losses import SOFT_LOSSES
from teacher_student_model import distillation_loss

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


def textbook(alpha, weight, temperature, reduction="batchmean"):
    def loss(z, v, y):
        soft = nn.KLDivLoss(reduction=reduction)(log_p(z, temperature), p(v, temperature))
        return alpha * nn.CrossEntropyLoss()(z, y) + weight * soft

    return loss


def first_line(loss, **more) -> str:
    return str(examine(loss, **more)).splitlines()[0]


def test_the_original():
    found = examine(textbook(0.25, 0.75, 5))
    assert str(found).splitlines()[0] == "0.25 CE + 0.75 KL(teacher || student) at T = 5, without the factor T^2"
    assert (found.name, found.hard_weight) == ("KL(teacher || student)", pytest.approx(0.25))
    assert (found.soft_weight, found.temperature) == (pytest.approx(0.75), pytest.approx(5))
    assert found.residual < 1e-4


def test_ours():
    line = first_line(lambda z, v, y: distillation_loss(z, v, y, alpha=0.25, temperature=5))
    assert line == "0.25 CE + 0.75 T^2 KL(teacher || student) at T = 5"


@pytest.mark.parametrize(
    ("alpha", "temperature", "classes"), [(0.1, 2, 2), (0.5, 20, 10), (0.9, 4, 37), (0.05, 1.5, 200)]
)
def test_the_textbook_s(alpha, temperature, classes):
    line = first_line(textbook(alpha, (1 - alpha) * temperature**2, temperature), num_classes=classes)
    assert line == f"{alpha} CE + {1 - alpha:.4g} T^2 KL(teacher || student) at T = {temperature}"


@pytest.mark.parametrize("images", [1, 50])
def test_logits_of_the_user_s(images):
    random = np.random.default_rng(0)
    z, v, y = random.normal(size=(images, 6)), 5 * random.normal(size=(images, 6)), random.integers(0, 6, images)
    found = examine(textbook(0.25, 0.75, 5), z, v, y)
    soft = 0.75 * (F.softmax(torch.tensor(z) / 5, 1) - F.softmax(torch.tensor(v) / 5, 1)) / 5
    hard = 0.25 * (F.softmax(torch.tensor(z), 1) - F.one_hot(torch.tensor(y), 6))
    assert found.gradient_share == pytest.approx((soft.norm() / (soft.norm() + hard.norm())).item(), rel=1e-4)
    only_at_random = examine(lambda z, v, y: textbook(1, 1, 4)(z, v, y) + (len(z) == images) * z.std(), z, v, y)
    assert only_at_random.name == "not recognised"


# Each with 0.5 of the cross-entropy, at T = 4: the soft loss, and what the page says
MISTAKES = {
    "the factor T^2 is missing": (lambda z, v, y: 0.5 * kl(log_p(z, 4), p(v, 4)), "0.5 KL", "without the factor T^2"),
    "T in place of T^2": (lambda z, v, y: 2 * kl(log_p(z, 4), p(v, 4)), "0.5 T KL", "without the factor T^2"),
    "reduction='mean'": (
        lambda z, v, y: 8 * F.kl_div(log_p(z, 4), p(v, 4), reduction="mean"),
        "0.5 T^2 KL(teacher || student) at T = 4, divided by the number of classes",
    ),
    "reduction='sum'": (
        lambda z, v, y: 8 * F.kl_div(log_p(z, 4), p(v, 4), reduction="sum"),
        "0.5 T^2 KL(teacher || student) at T = 4, summed over the batch",
    ),
    "reversed": (lambda z, v, y: 8 * kl(log_p(v, 4), p(z, 4)), "reversed (student || teacher)"),
    "hard labels": (lambda z, v, y: 0.5 * F.cross_entropy(z, v.argmax(1)), "hard labels of the teacher"),
    "mse_loss": (lambda z, v, y: 0.5 * F.mse_loss(z, v), "squared error of logits", "divided by the number of classes"),
    "softmax, not log_softmax": (
        lambda z, v, y: 8 * kl(p(z, 4), p(v, 4)),
        "probabilities where log-probabilities belong",
    ),
    "networks with a softmax": (lambda z, v, y: 8 * kl(log_p(p(z), 4), p(p(v), 4)), "softmax twice"),
    "a student with a softmax": (lambda z, v, y: 8 * kl(log_p(p(z, 4)), p(v, 4)), "softmax twice (student)"),
    "a teacher with a softmax": (lambda z, v, y: 8 * kl(log_p(z, 4), p(p(v), 4)), "softmax twice (teacher, T outside)"),
    "softmax of a softmax": (lambda z, v, y: 8 * kl(log_p(p(z, 4)), p(p(v, 4))), "softmax twice (both, T inside)"),
    "only the teacher softened": (lambda z, v, y: 0.5 * kl(log_p(z), p(v, 4)), "only the teacher softened"),
    "only the student softened": (lambda z, v, y: 8 * kl(log_p(z, 4), p(v)), "only the student softened"),
    "log_target forgotten": (lambda z, v, y: 8 * kl(log_p(z, 4), log_p(v, 4)), "without log_target", "NaN"),
    "log_target by mistake": (
        lambda z, v, y: 8 * F.kl_div(log_p(z, 4), p(v, 4), log_target=True, reduction="batchmean"),
        "kl_div of probabilities with log_target",
    ),
    "dim=0": (lambda z, v, y: 8 * kl(F.log_softmax(z / 4, 0), F.softmax(v / 4, 0)), "softmax over the batch"),
    "multiplied by T": (lambda z, v, y: 0.5 * kl(log_p(4 * z), p(4 * v)), "at T = 0.25"),
    "the log of a softmax": (lambda z, v, y: 8 * kl(p(z, 4).log(), p(v, 4)), "At logits of 1e4 it is NaN or infinite"),
    "subtracted": (lambda z, v, y: -8 * kl(log_p(z, 4), p(v, 4)), "0.5 CE - "),
}
OF_THE_HARD_LOSS = {
    "softmax twice": (lambda z, y: F.cross_entropy(p(z), y), "0.5 CE after softmax twice + 0.5 T^2 KL"),
    "nll_loss of a softmax": (lambda z, y: F.nll_loss(p(z), y), "CE of probabilities where log-probabilities belong"),
    "divided by T": (lambda z, y: F.cross_entropy(z / 4, y), "0.5 softened CE + 0.5 T^2 KL"),
    "label smoothing": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), "0.5 CE with label smoothing 0.1 + "),
    "summed": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), "The hard loss is summed over the batch"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    soft, *said = MISTAKES[mistake]
    page = str(examine(lambda z, v, y: 0.5 * F.cross_entropy(z, y) + soft(z, v, y)))
    assert page.startswith("0.5 CE ")
    assert all(words in page for words in said)


@pytest.mark.parametrize("mistake", OF_THE_HARD_LOSS)
def test_mistakes_of_the_hard_loss_are_named(mistake):
    hard, said = OF_THE_HARD_LOSS[mistake]
    assert said in str(examine(lambda z, v, y: 0.5 * hard(z, y) + 8 * kl(log_p(z, 4), p(v, 4))))


@pytest.mark.parametrize("detach", [False, True])
def test_swapped_arguments(detach):
    def loss(z, v, y):
        return textbook(0.25, 0.75 * 25, 5)(v, z.detach() if detach else z, y)

    line = first_line(loss)
    assert line.startswith("0.25 CE + 0.75 T^2 KL(teacher || student) at T = 5")
    assert "swapped arguments" in line


def test_without_a_hard_or_a_soft_loss():
    assert first_line(lambda z, v: 16 * kl(log_p(z, 4), p(v, 4))) == "1 T^2 KL(teacher || student) at T = 4"
    for dtype in (torch.float64, torch.float32):
        found = examine(lambda z, v, y, dtype=dtype: F.cross_entropy(z.to(dtype), y))
        assert (found.name, found.soft_weight, found.gradient_share) == ("CE", 0, None)
    assert examine(lambda z, v, y: F.cross_entropy(z.detach(), y)).name == "not recognised"


def test_both_readings_of_a_weight():
    page = str(examine(textbook(1.1, 6.321, 3.3)))
    assert page.startswith("1.1 CE + 6.321 KL(teacher || student) at T = 3.3\n")
    assert "6.321 is 0.5804 x T^2, or a weight of its own, without the factor T^2" in page
    assert "without" not in str(examine(textbook(0.3, 6.3, 3)))


def test_a_gradient_that_reaches_the_teacher_is_said_last():
    loss = textbook(0.5, 8, 4)
    attached, detached = examine(loss), examine(lambda z, v, y: loss(z, v.detach(), y))
    assert attached.findings[:-1] == detached.findings
    assert "no_grad" in attached.findings[-1]


def test_a_loss_in_float32_and_a_module_with_buffers():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weights", torch.tensor([0.25, 0.75]))

        def forward(self, z, v, y):
            return self.weights @ torch.stack([F.cross_entropy(z, y), 25 * kl(log_p(z, 5), p(v, 5))])

    ours = "0.25 CE + 0.75 T^2 KL(teacher || student) at T = 5"
    assert first_line(lambda z, v, y: textbook(0.25, 18.75, 5)(z.float(), v.float(), y)) == ours
    module = Loss()
    assert first_line(module) == ours
    assert module.weights.dtype == torch.float32


def test_dkd():
    line = first_line(lambda z, v, y: F.cross_entropy(z, y) + 16 * decoupled(z, v, y, 4))
    assert line == "1 CE + 1 T^2 decoupled KL (DKD), 8 x as much among the other classes, at T = 4"


def test_our_soft_losses():
    names = {name: examine(lambda z, v, y, f=f: f(z, v, y, 4.0)).name for name, f in SOFT_LOSSES.items()}
    assert names == {
        "kd": "KL(teacher || student)",
        "dkd": "decoupled KL (DKD)",
        "dist": "not recognised",
        "ttm": "KL(teacher || student), only the teacher softened,",
        "standardised_kd": "KL(teacher || student) of standardised logits",
    }


@pytest.mark.parametrize("seed", range(20))
def test_random_members_of_the_family_are_recovered(seed):
    check_family_member(seed)


@pytest.mark.parametrize("seed", range(20))
def test_other_losses_are_not_misnamed(seed):
    check_outside_member(seed)


def test_the_random_numbers_of_the_caller_stay_as_they_are():
    before = torch.get_rng_state()
    examine(lambda z, v, y: F.cross_entropy(F.dropout(z), y))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, v, y: F.cross_entropy(z, y, reduction="none"),
        lambda z, v, y: 1.0,
        lambda z, v, y: z @ v,
        lambda z: z.mean(),
    ],
)
def test_a_loss_that_cannot_be_called(loss):
    with pytest.raises(CannotExamine):
        examine(loss)


FILE = """
import torch.nn.functional as F
class Loss:
    def __init__(self, T, alpha=0.5, options=None):
        self.T, self.alpha = T, alpha
    def __call__(self, z, v, y):
        soft = F.kl_div((z / self.T).log_softmax(1), (v / self.T).softmax(1), reduction="batchmean")
        return self.alpha * F.cross_entropy(z, y) + (1 - self.alpha) * soft
def powered(z, v, labels, temperature, power=2.0):
    log_q, p = (z / temperature).log_softmax(1), (v / temperature).softmax(1)
    return temperature**power * F.kl_div(log_q, p, reduction="batchmean")
def kd_loss(student, teacher, temperature):
    return powered(student, teacher, None, temperature)
def per_image(z, v, y):
    return F.cross_entropy(z, y, reduction="none")
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (".py:Loss(5, alpha=0.25, options={'a': (1, 2)})", "0.25 CE + 0.75 KL(teacher || student) at T = 5, without"),
        (":powered", "1 T^2 KL(teacher || student) at T = 4"),
        (":powered(temperature=3, power=1)", "1 T KL(teacher || student) at T = 3, without"),
        (".py:kd_loss(temperature=3)", "1 T^2 KL(teacher || student) at T = 3"),
    ],
)
def test_the_command(tmp_path, capsys, name, line):
    (tmp_path / "their-losses.py").write_text(FILE)
    assert main([f"{tmp_path}/their-losses{name}"]) == 0
    assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(
    "name", [":absent", ":per_image", ":Loss", ":Loss(T=print())", ":Loss(T=4", "_absent:f", ".py", ":F", ":FILE"]
)
def test_the_command_with_a_mistake(tmp_path, capsys, name):
    (tmp_path / "their-losses.py").write_text(FILE)
    assert main([f"{tmp_path}/their-losses{name}"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_the_command_with_logits(tmp_path, capsys):
    (tmp_path / "losses.py").write_text(FILE.replace("kd_loss", "other"))
    logits = {"student_logits": np.eye(3, 7), "teacher_logits": 2 * np.eye(3, 7), "labels": np.arange(3)}
    np.savez(tmp_path / "logits.npz", **logits)
    assert main([f"{tmp_path}/losses.py:Loss(T=5)", f"{tmp_path}/logits.npz"]) == 0
    assert "At your logits" in capsys.readouterr().out


def test_the_core_needs_torch_and_scipy_only():
    tree = ast.parse((ROOT / "diagnose" / "loss.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch", "scipy"}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_table_of_implementations(name):
    line = next(
        line for line in (ROOT / "docs" / "diagnosis.md").read_text().splitlines() if line.startswith(f"| {name} ")
    )
    assert first_line(IMPLEMENTATIONS[name]).split("; ")[0] in line.replace("\\|", "|")


# --- Teacher and student ---


def network(seed, *layers):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4), *layers).eval()


@pytest.fixture
def models():
    """A student and a teacher, and a batch whose labels are mostly the teacher's classes."""
    student, teacher = network(0), network(1).requires_grad_(False)
    images = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = teacher(images).argmax(1)
    labels[:8] = (labels[:8] + 1) % 4
    return student, teacher, (images, labels)


def only(found: list[str]) -> str:
    (sentence,) = found
    return sentence


def test_nothing_is_found_in_sound_models(models):
    student, teacher, batch = models
    assert examine_models(student.train(), teacher, batch) == []
    with torch.no_grad():
        assert examine_models(student, teacher, (*batch, teacher(batch[0]))) == []


def test_a_teacher_in_training_mode(models):
    student, teacher, batch = models
    before = {name: tensor.clone() for name, tensor in teacher.train().state_dict().items()}
    assert "training mode" in only(examine_models(student, teacher, batch))
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_dropout_alive(models):
    student, teacher, batch = models
    assert "dropout" in only(examine_models(student, nn.Sequential(teacher, nn.Dropout(0.5)), batch))


def test_gradients_on(models):
    student, teacher, batch = models
    assert "Gradients" in only(examine_models(student, teacher.requires_grad_(), batch))


def test_another_normalisation(models):
    student, teacher, (images, labels) = models
    assert "normalisation" in examine_models(student, teacher, (images * 0.01 - 50, labels))[0]


def test_another_class_order(models):
    student, teacher, (images, labels) = models
    assert "class order" in examine_models(student, teacher, (images, (labels + 1) % 4))[0]


def test_stored_logits_in_another_order(models):
    student, teacher, (images, labels) = models
    with torch.no_grad():
        logits = teacher(images)
    assert "another order" in only(examine_models(student, teacher, (images, labels, logits.roll(1, 0))))
    assert "not the teacher's" in only(examine_models(student, teacher, (images, labels, torch.randn(128, 4))))


def test_probabilities_as_logits(models):
    student, teacher, batch = models
    assert "The teacher returns prob" in only(examine_models(student, nn.Sequential(teacher, nn.Softmax(1)), batch))
    assert "The student returns prob" in only(examine_models(nn.Sequential(student, nn.Softmax(1)), teacher, batch))


def test_one_object_as_both(models):
    _, teacher, batch = models
    assert "same object" in only(examine_models(teacher, teacher, batch))


def test_a_teacher_that_knows_less(models):
    student, teacher, (images, _) = models
    with torch.no_grad():
        labels = student(images).argmax(1)
        labels[:40] = teacher(images[:40]).argmax(1)
    assert "knows less" in only(examine_models(student, teacher, (images, labels)))
