"""What does a distillation loss compute? Its weights, temperature, factor T^2, direction and averaging.

    from diagnose.loss import examine            # or copy this file, which needs torch and SciPy only
    print(examine(loss))                         # loss(student_logits, teacher_logits, labels) -> a scalar

The loss's gradient at the student's logits is fitted by a * gradient of CE + w * gradient of a candidate at temperature
T, in float64. A loss is recognised if that leaves less than 1e-4 of what the cross-entropy (CE) alone leaves.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

NOT_RECOGNISED = "not recognised"
TOLERANCE = 1e-4
TEMPERATURES = 2 ** torch.arange(-5, 8, dtype=torch.float64)  # a grid from 0.03 to 128

Loss = Callable[..., Tensor]
# z, v (K, B, C), labels y (B, C) one-hot, temperatures t (K, 1, 1) -> the terms, each summed over images and classes
Terms = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]


class CannotExamine(ValueError):
    """The loss cannot be called or returns no scalar."""


@dataclass(frozen=True)
class Examined:
    """The loss is hard_weight * CE + soft_weight * `name` at `temperature`, averaged over the batch. str() is the page.

    soft_weight includes T^2 and a division by the number of classes; in decoupled KL it is that of the label's part.
    temperature is None if nothing is softened, gradient_share without a soft loss. residual is what the fit leaves. The
    numbers of a loss that is not recognised are those of the nearest.
    """

    name: str
    hard_weight: float
    soft_weight: float
    temperature: float | None
    gradient_share: float | None
    residual: float
    findings: list[str]  # the first is the first line of the page

    def __str__(self) -> str:
        return "\n- ".join(self.findings)


def log_p(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    return (logits / temperature).log_softmax(-1)


def p(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    return (logits / temperature).softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, middle) + kl(log_q, middle)) / 2


def standardise(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)


def decoupled(z: Tensor, v: Tensor, y: Tensor, t: Tensor) -> list[Tensor]:
    """KL between the label and all other classes, and among the others (Zhao et al. 2022, arXiv 2203.08679)."""

    def split(log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        others = log_probabilities - 1e5 * y
        rest = others.logsumexp(-1)
        return torch.stack([(log_probabilities * y).sum(-1), rest], -1), others - rest.unsqueeze(-1)

    (label_z, others_z), (label_v, others_v) = split(log_p(z, t)), split(log_p(v, t))
    return [kl(label_v, label_z), kl(others_v, others_z)]


KL, DKD = "KL(teacher || student)", "decoupled KL (DKD)"
ONLY_TEACHER = f"{KL}, only the teacher softened,"
# The first that fits is named: some are equal at T = 1, and with two classes DKD is KL.
HARD: dict[str, Terms] = {
    "CE": lambda z, v, y, t: [-(y * log_p(z)).sum(), -log_p(z).mean(-1).sum()],  # the second is label smoothing
    "softened CE": lambda z, v, y, t: [-(y * log_p(z, t)).sum()],
    "CE after softmax twice": lambda z, v, y, t: [-(y * log_p(p(z))).sum()],
    "CE of probabilities where log-probabilities belong": lambda z, v, y, t: [-(y * p(z)).sum()],
}
SOFT: dict[str, Terms] = {
    "": lambda z, v, y, t: [],
    KL: lambda z, v, y, t: [kl(log_p(v, t), log_p(z, t))],
    "KL reversed (student || teacher)": lambda z, v, y, t: [kl(log_p(z, t), log_p(v, t))],
    "Jensen-Shannon divergence": lambda z, v, y, t: [jensen_shannon(log_p(z, t), log_p(v, t))],
    "squared error of logits": lambda z, v, y, t: [(z - v).square().sum()],
    "squared error of probabilities": lambda z, v, y, t: [(p(z, t) - p(v, t)).square().sum()],
    "CE with hard labels of the teacher": lambda z, v, y, t: [-((v == v.amax(-1, keepdim=True)) * log_p(z, t)).sum()],
    ONLY_TEACHER: lambda z, v, y, t: [kl(log_p(v, t), log_p(z))],
    f"{KL}, only the student softened,": lambda z, v, y, t: [kl(log_p(v), log_p(z, t))],
    f"{KL} of standardised logits": lambda z, v, y, t: [kl(log_p(standardise(v), t), log_p(standardise(z), t))],
    DKD: decoupled,
    "kl_div of probabilities where log-probabilities belong": lambda z, v, y, t: [-(p(v, t) * p(z, t)).sum()],
    "kl_div of log-probabilities without log_target": lambda z, v, y, t: [-(log_p(v, t) * log_p(z, t)).sum()],
    "kl_div of probabilities with log_target": lambda z, v, y, t: [-(p(v, t).exp() * log_p(z, t)).sum()],
    f"{KL} after softmax twice (both, T outside)": lambda z, v, y, t: [kl(log_p(p(v), t), log_p(p(z), t))],
    f"{KL} after softmax twice (both, T inside)": lambda z, v, y, t: [kl(log_p(p(v, t)), log_p(p(z, t)))],
    f"{KL} after softmax twice (student)": lambda z, v, y, t: [kl(log_p(v, t), log_p(p(z, t)))],
    f"{KL} after softmax twice (teacher, T outside)": lambda z, v, y, t: [kl(log_p(p(v), t), log_p(z, t))],
    f"{KL} after softmax twice (teacher, T inside)": lambda z, v, y, t: [kl(log_p(p(v, t)), log_p(z, t))],
    f"{KL}, softmax over the batch,": lambda z, v, y, t: [kl((v / t).log_softmax(-2), (z / t).log_softmax(-2))],
}


class Data(NamedTuple):
    z: Tensor  # (B, C) the student's logits
    v: Tensor  # (B, C) the teacher's
    y: Tensor  # (B,) labels

    @classmethod
    def draw(cls, images: int, classes: int) -> "Data":
        """Random logits, of images that the models are more or less sure of; the teacher is right on half of them."""
        random = torch.Generator().manual_seed(images + classes)
        z, v = torch.randn(2, images, classes, generator=random, dtype=torch.float64)
        sure = torch.linspace(1, 4, images, dtype=torch.float64).unsqueeze(1)
        y = torch.randint(classes, (images,), generator=random)
        y[::2] = v.argmax(1)[::2]
        return cls(sure * z, 1.2 * sure.flip(0) * v, y)

    def gradients(self, terms: Terms, temperatures: Tensor) -> list[Tensor]:
        """Those of the terms' means over the batch, at the student's logits and K temperatures: each (K, B C)."""
        z = self.z.expand(len(temperatures), *self.z.shape).clone().requires_grad_()
        losses = terms(z, self.v, F.one_hot(self.y, z.shape[2]).double(), temperatures.view(-1, 1, 1))
        return [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten(1) / len(self.y) for loss in losses]


def solve(gradient: Tensor, columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The weights (K, n) with which n columns (K, N) leave least of a gradient (N,), and the norm of the rest (K,)."""
    matrix = torch.stack(columns, -1)
    target = gradient.expand(len(matrix), -1).unsqueeze(-1)
    weights = torch.linalg.lstsq(matrix, target, driver="gelsd").solution
    return weights.squeeze(-1), (target - matrix @ weights).squeeze(-1).norm(dim=1)


class Fit(NamedTuple):
    hard: str = "CE"
    soft: str = ""
    temperature: float | None = None  # None if nothing is softened
    residual: float = math.inf

    def columns(self, data: Data) -> list[Tensor]:
        temperature = torch.tensor([self.temperature or 1.0], dtype=torch.float64)
        return data.gradients(lambda *given: HARD[self.hard](*given) + SOFT[self.soft](*given), temperature)

    def parts(self, gradient: Tensor, data: Data) -> tuple[Tensor, Tensor, Tensor, float]:
        """Weights of the terms, of hard and soft loss (2,), their norms in a gradient (B C,), and what they leave."""
        columns = torch.cat(self.columns(data))
        terms = solve(gradient, list(columns.unsqueeze(1)))[0][0]
        each, n = terms.unsqueeze(1) * columns, 2 if self.hard == "CE" else 1
        terms[:n][each[:n].norm(dim=1) < 1e-6 * gradient.norm()] = 0  # rounding
        both = torch.stack([each[:n].sum(0), each[n:].sum(0)])
        left = (gradient - both.sum(0)).norm() / both[int(bool(self.soft))].norm().clamp(min=1e-9 * gradient.norm())
        return terms, torch.stack([terms[:n].sum(), terms[n : n + 1].sum()]), both.norm(dim=1), left.item()


def best_fit(gradient: Tensor, data: Data, noise: float) -> Fit:
    """The hard and the soft loss that leave least of a gradient (B C,) whose relative rounding error is `noise`."""
    scale = solve(gradient, Fit().columns(data))[1].item()
    if scale < noise * gradient.norm():
        return Fit(residual=0.0)
    # Between two temperatures of the grid a gradient is nearly a weighted sum of those at the two.
    grid = {}
    for name, terms in (HARD | SOFT).items():
        grid[name] = [half for term in data.gradients(terms, TEMPERATURES) for half in (term[:-1], term[1:])]
    best = Fit()
    for hard in HARD:
        left = {soft: solve(gradient / scale, grid[hard] + grid[soft])[1] for soft in SOFT}
        for soft in sorted(SOFT, key=lambda soft: round(left[soft].min().item(), 9))[: 3 if hard == "CE" else 1]:
            best = min(best, refine(gradient / scale, data, Fit(hard, soft), left[soft]), key=lambda fit: fit.residual)
            if best.residual < TOLERANCE / 10:
                return best
    return best


def refine(gradient: Tensor, data: Data, fit: Fit, left: Tensor) -> Fit:
    """The fit at its best temperature, given what is `left` (K - 1,) in each interval of the grid."""

    def at(temperature: float | None) -> Fit:
        candidate = fit._replace(temperature=temperature)
        return candidate._replace(residual=solve(gradient, candidate.columns(data))[1].item())

    low, high = TEMPERATURES[left.argmin() :][:2].log().tolist()
    if left.max() - left.min() < 1e-9 * left.max():
        return at(None)
    if left.min() > 0.2:  # hopeless; of 70 random losses at most 0.09 was left with the right terms
        return at(math.exp((low + high) / 2))
    bounds = (low - 0.7, high + 0.7)  # and the neighbouring intervals
    options = {"xatol": 1e-8}
    found = minimize_scalar(lambda x: at(math.exp(x)).residual, bounds=bounds, method="bounded", options=options)
    return at(math.exp(found.x))


def differentiate(loss: Loss, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients at the student's and at the teacher's logits, each (B C,). Raises CannotExamine."""
    z, v = (logits.clone().requires_grad_() for logits in (data.z, data.v))
    try:
        value = loss(z, v, data.y.clone())
        if isinstance(value, Tensor) and value.numel() == 1:
            student, teacher = torch.autograd.grad(value.sum() + 0 * (z.sum() + v.sum()), (z, v))
            return value.detach(), student.flatten(), teacher.flatten()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        given = f"(student_logits, teacher_logits, labels), here {tuple(z.shape)} in float64 and {tuple(data.y.shape)}"
        raise CannotExamine(f"it cannot be called with {given}: {type(error).__name__}: {reason}") from error
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise CannotExamine(f"it must return a scalar, and returns {what}")


def examine(
    loss: Loss,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    num_classes: int = 10,
) -> Examined:
    """What loss(student_logits, teacher_logits, labels) computes; a loss that takes two arguments gets no labels.

    It is called with random logits, and with yours (B, C), labels (B,). Raises CannotExamine if it cannot be called.
    """
    own, given = None, copy.deepcopy(loss).double().forward if isinstance(loss, nn.Module) else loss
    kinds = [parameter.kind.name for parameter in inspect.signature(given).parameters.values()]
    takes_two = kinds.count("POSITIONAL_OR_KEYWORD") == 2 and "VAR_POSITIONAL" not in kinds
    loss = (lambda z, v, y: given(z, v)) if takes_two else given
    if student_logits is not None:
        z, v, y = (torch.as_tensor(logits).detach().cpu() for logits in (student_logits, teacher_logits, labels))
        own, num_classes = Data(z.double(), v.double(), y.long()), z.shape[1]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        data = Data.draw(max(8, 320 // num_classes), num_classes)
        _, student, teacher = differentiate(loss, data)
        _, student_2, teacher_2 = differentiate(loss, data._replace(y=(data.y + 1) % num_classes))
        if (torch.equal(student, student_2) and not torch.equal(teacher, teacher_2)) or not student.any():
            swapped = describe(lambda z, v, y: loss(v, z, y), data, own and Data(own.v, own.z, own.y))
            if swapped.name != NOT_RECOGNISED:
                swapped.findings[0] += ", with swapped arguments (the student's logits come second)"
                return swapped
        found = describe(loss, data, own)
    if teacher.any():
        found.findings.append("Gradients reach the teacher's logits: harmless if the teacher runs under no_grad.")
    return found


def averaging(powers: list[float]) -> list[str]:
    """In words, from the powers of the batch size B and of the number of classes C in the weight of a mean."""
    words = {(0, 1.0): "summed over the batch", (1, -1.0): "divided by the number of classes"}
    return [words.get((i, power), f"multiplied by {'BC'[i]}^{power:g}") for i, power in enumerate(powers) if power]


def power_of_temperature(hard: float, soft: float, t: float) -> int | None:
    """The likely power of T in the weight of the soft loss: weights that add up to 1, else the rounder weight, tell."""
    for power in (0, 2, 1):
        if math.isclose(hard + soft / t**power, 1, rel_tol=1e-5):
            return power
    digits, with_square = (len(f"{x:.5g}".strip("-0.").replace(".", "")) for x in (soft, soft / t**2))
    if digits == with_square or min(digits, with_square) > 3:
        return None
    return 0 if digits < with_square else 2


def describe(loss: Loss, data: Data, own: Data | None) -> Examined:
    """What a loss computes on random `data`, and on `own` logits if there are some."""
    value, gradient, _ = differentiate(loss, data)
    notes = numerics(loss, data, value)
    if not gradient.isfinite().all() or not gradient.any():
        why = "no gradient" if gradient.isfinite().all() else "NaN or infinity in the gradient"
        line = f"{NOT_RECOGNISED}: {why} at the student's logits"
        return Examined(NOT_RECOGNISED, 0.0, 0.0, None, None, math.inf, [line, *notes])
    fit = best_fit(gradient, data, 100 * torch.finfo(value.dtype).eps)
    terms, weights, norms, _ = fit.parts(gradient, data)
    if own:
        *_, norms, left = fit.parts(differentiate(loss, own)[1], own)
        fit = fit._replace(residual=max(fit.residual, left))
    recognised, (images, classes) = fit.residual < TOLERANCE, data.z.shape
    powers = torch.zeros(2, 2, dtype=torch.float64)
    if recognised:
        powers, failures = powers_of_sizes(loss, fit, weights, images, classes)
        notes = failures + notes
    weights = weights / images ** powers[0]
    (hard, soft), (a, w) = weights.tolist(), (weights / classes ** powers[1]).tolist()
    t = fit.temperature or 1.0
    softened = bool(fit.soft) and abs(t - 1) > 1e-5
    power = power_of_temperature(a, w, t) if softened else None
    own_weight = w / t ** (power or 0)  # without a factor T or T^2
    name, line = in_words(fit, terms, a, own_weight, power or 0)
    if not recognised:
        line = f"{NOT_RECOGNISED}; the nearest, {line}, leaves {fit.residual:.2g} of the gradient"
        return Examined(NOT_RECOGNISED, hard, soft, fit.temperature, None, fit.residual, [line, *notes])

    of_hard, of_soft = map(averaging, powers.T.tolist())
    suffix, findings = of_soft if fit.soft else of_hard, []
    if softened:
        reading = f"A weight of {w:.4g} is {w / t**2:.4g} x T^2, or a weight of its own"
        if power != 2 and fit.soft != ONLY_TEACHER:
            reading += ", without the factor T^2"
            suffix = ["without the factor T^2"] * (power is not None) + suffix
        findings.append(f"{reading}. The gradient is the same.")
    for kind, there, words in (("hard", a, of_hard), ("soft", fit.soft, of_soft)):
        if there:
            findings.append(f"The {kind} loss is {' and '.join(words) or 'averaged over the batch'}.")
    share = (norms[1] / norms.sum()).item() if fit.soft else None
    if a and fit.soft:
        where, suggested = "your" if own else "random", abs(own_weight) / (abs(a) + abs(own_weight))
        findings.append(f"At {where} logits it has {share:.0%} of the gradient; its weight suggests {suggested:.0%}.")
    return Examined(
        name, hard, soft, fit.temperature, share, fit.residual, [", ".join([line, *suffix]), *findings, *notes]
    )


def numerics(loss: Loss, data: Data, value: Tensor) -> list[str]:
    """Whether the loss is finite, here and at large logits, in sentences."""
    z, v = (1e4 * logits / logits.abs().amax(1, keepdim=True) for logits in (data.z, data.v))
    finite = all(tensor.isfinite().all() for tensor in differentiate(loss, Data(z, v, data.y))[:2])
    sentences = [] if value.isfinite() else ["Its value is NaN or infinite."]
    return [*sentences, f"At logits of 1e4 it is {'finite' if finite else 'NaN or infinite; log_softmax avoids that'}."]


def powers_of_sizes(loss: Loss, fit: Fit, weights: Tensor, images: int, classes: int) -> tuple[Tensor, list[str]]:
    """The powers (2, 2) of the batch size and of the number of classes in the weights (2,) of the hard and soft loss.

    Also a sentence for each size with which the loss fails or computes something else.
    """
    powers = torch.zeros(2, 2, dtype=torch.float64)
    failures: list[str] = []
    for i, size in enumerate(((2 * images, classes), (images, 2 * classes))):
        other, left = Data.draw(*size), math.inf
        with contextlib.suppress(CannotExamine):
            _, now, _, left = fit.parts(differentiate(loss, other)[1], other)
        if left < TOLERANCE:
            powers[i] = torch.where(weights == 0, 1, now / weights).log2().round(decimals=3)
        else:
            failures.insert(0, f"With {size[0]} images of {size[1]} classes it fails, or computes something else.")
    return powers, failures


def in_words(fit: Fit, terms: Tensor, a: float, w: float, power: int) -> tuple[str, str]:
    """The name of the loss, and its formula: a times the hard loss and w T^power times the soft loss."""
    name, parts = fit.hard, []
    if name == "CE" and terms[1]:
        name += f" with label smoothing {terms[1] / terms[:2].sum():.4g}"
    if a or not fit.soft:
        parts.append(f"{a:.4g} {name}")
    if fit.soft:
        name = fit.soft
        others = f", {terms[-1] / terms[-2]:.4g} x as much among the other classes," if name == DKD else ""
        parts.append(f"{w:.4g}{('', ' T', ' T^2')[power]} {name}{others}")
    at = f" at T = {fit.temperature:.4g}" if fit.temperature else ""
    return name, " + ".join(parts).replace("+ -", "- ") + at
