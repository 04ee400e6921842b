"""Soft losses: measures of how far a student's logits are from its teacher's.

Each takes the student's logits z (B, C), the teacher's v (B, C), the labels (B,) and the temperature T, and returns the
mean over the batch; p_z and p_v are softmax(z / T) and softmax(v / T). Those whose gradients scale as 1 / T^2 include
the factor T^2 themselves; scale_soft_loss=False divides by it. Further parameters are numbers with defaults, which
`loss_options` of a recipe sets. One of your own goes into a file of yours, as MODULE:NAME.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine import named
from engine.errors import UserError
from engine.reach import digest, reach


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities (B, C), mean over the batch."""
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def kd(z: Tensor, v: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_v || p_z). Hinton, Vinyals and Dean 2015, arXiv 1503.02531."""
    return temperature**2 * kl_divergence((v / temperature).log_softmax(1), (z / temperature).log_softmax(1))


def dkd(
    z: Tensor,
    v: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
) -> Tensor:
    """T^2 (target_weight KL(b_v || b_z) + nontarget_weight KL(q_v || q_z)): decoupled KD.

    b are the probabilities of the label and of all other classes together, q those of the other classes alone. Zhao et
    al. 2022, arXiv 2203.08679, with its weights for CIFAR-100, but not its warm-up.
    """
    others = torch.arange(z.shape[1] - 1, device=z.device)
    others = others + (others >= labels.unsqueeze(1))  # (B, C - 1): the classes other than the label

    def split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = (logits / temperature).log_softmax(1)
        rest = log_p.gather(1, others)
        return log_p.gather(1, labels.unsqueeze(1)), rest.logsumexp(1, keepdim=True), rest.log_softmax(1)

    (label_z, rest_z, q_z), (label_v, rest_v, q_v) = split(z), split(v)
    target = kl_divergence(label_v, label_z) + kl_divergence(rest_v, rest_z)
    return temperature**2 * (target_weight * target + nontarget_weight * kl_divergence(q_v, q_z))


def dist(
    z: Tensor,
    v: Tensor,
    labels: Tensor,
    temperature: float,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """T^2 (inter_weight (1 - rho between rows) + intra_weight (1 - rho between columns) of p_z and p_v).

    rho is Pearson's correlation, averaged over the B rows (images) or the C columns (classes). Huang et al. 2022, arXiv
    2205.10536.
    """

    def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
        return ((a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim)).clamp(min=1e-8)).mean()

    p_z, p_v = (z / temperature).softmax(1), (v / temperature).softmax(1)
    inter, intra = 1 - correlation(p_z, p_v, 1), 1 - correlation(p_z, p_v, 0)
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def ttm(z: Tensor, v: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL(p_v || softmax(z)): only the teacher is softened. Zheng and Yang 2024 (ICLR), whose gamma is 1 / T."""
    return kl_divergence((v / temperature).log_softmax(1), z.log_softmax(1))


def standardised_kd(z: Tensor, v: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`kd` of logits with mean 0 and standard deviation 1 over the classes. Sun et al. 2024, arXiv 2403.01427."""

    def standardise(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)

    return kd(standardise(z), standardise(v), labels, temperature)


SOFTEN_THE_TEACHER = ("kd", "dkd", "dist", "ttm")  # learn from softmax(v / T)
SOFTEN_BOTH = ("kd", "dkd", "dist")  # and compare it with softmax(z / T)

SoftLoss = Callable[..., Tensor]
SOFT_LOSSES: dict[str, SoftLoss] = {
    "kd": kd,
    "dkd": dkd,
    "dist": dist,
    "ttm": ttm,
    "standardised_kd": standardised_kd,
}


def find(soft_loss: str) -> SoftLoss:
    """A soft loss by its name, ours or MODULE:NAME. Raises UserError if there is none."""
    return SOFT_LOSSES[soft_loss] if soft_loss in SOFT_LOSSES else named.load(soft_loss)


def code_of_soft_loss(soft_loss: str) -> str:
    """The digest of its code: of ours, the function and what it uses in this file."""
    return named.code_of(soft_loss) if named.is_named(soft_loss) else digest(reach(Path(__file__), soft_loss)[0])


def options(soft_loss: str) -> dict[str, float]:
    """The parameters of a soft loss, besides the four that all have, with their defaults.

    Raises UserError if there is no such loss, or if it does not take the four, or needs more.
    """
    try:
        found = list(inspect.signature(find(soft_loss)).parameters.values())
    except (TypeError, ValueError):  # of some classes and built-in functions
        found = []
    if len(found) < 4 or any(type(parameter.default) not in (int, float) for parameter in found[4:]):
        raise UserError(
            f"{soft_loss} must take the student's logits, the teacher's, the labels and the temperature, and further "
            "parameters only with numbers as their defaults"
        )
    return {parameter.name: parameter.default for parameter in found[4:]}


def check(soft_loss: str, chosen: dict[str, float], classes: int) -> None:
    """Raise UserError unless a soft loss of the user's returns a number that has a gradient."""
    z, v = torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(0))
    with named.running("soft_loss", soft_loss):
        loss = find(soft_loss)(z.requires_grad_(), v, torch.arange(4) % classes, 2.0, **chosen)
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
        raise UserError(f"soft_loss = {soft_loss!r}: must return the mean over the batch, a tensor () with a gradient")


# With two classes the first parameter has no effect, only the second one has: dkd has one class besides the label, and
# in dist the correlation of two rows of two probabilities is always +-1.
ON_TWO_CLASSES = {"dkd": ("nontarget_weight", "target_weight"), "dist": ("inter_weight", "intra_weight")}


def problems_of_two_classes(soft_loss: str, chosen: dict[str, float]) -> list[str]:
    """Why a soft loss with the options `chosen` does not work on a data set of two classes."""
    if soft_loss == "standardised_kd":
        return [
            "soft_loss = 'standardised_kd': teaches nothing with two classes, whose standardised logits are always "
            "+-0.707; use kd, or leave this recipe out"
        ]
    if soft_loss not in ON_TWO_CLASSES:
        return []
    without, effective = ON_TWO_CLASSES[soft_loss]
    problems = []
    if chosen[without] != options(soft_loss)[without]:
        problems.append(f"loss_options: {without} = {chosen[without]:g} has no effect with two classes; leave it out")
    if chosen[effective] == 0:
        problems.append(
            f"loss_options: {effective} = 0, and with two classes nothing else of soft_loss = {soft_loss} has an effect"
        )
    return problems
