"""The state of a training run: optimizer, schedule, running loss and history, saved and restored exactly."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from engine.checkpoints import nonfinite_tensors
from engine.console import duration
from engine.distributed import all_reduce_max, all_reduce_sum, rank, world_size
from engine.errors import Diverged
from engine.recipes import Recipe
from engine.settings import Config


def make_optimizer(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    shared = {"weight_decay": recipe.weight_decay, "fused": torch.device(device).type in ("cpu", "cuda") or None}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.lr, **shared)
    return torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, nesterov=recipe.nesterov, **shared)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The recipe's schedule over `steps` steps of the optimizer."""
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return LambdaLR(optimizer, lambda step: 1.0)


class Meter:
    """Loss, accuracy, gradients and finiteness over an epoch, accumulated on the device; only reading synchronises."""

    def __init__(self, device: str, sums: torch.Tensor | None = None):
        # of batch losses, of correct predictions, and of the norms of the gradients of the hard and of the soft loss
        self.sums = torch.zeros(4, device=device) if sums is None else sums.to(device)
        self.names: list[str] = []
        self.nonfinite = torch.zeros(1, device=device)  # steps in which the logits, and each term, were not finite

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor, terms: dict[str, torch.Tensor], share: float) -> None:
        """Add a step: logits (B, C), labels (B,), the terms of their loss, and their share of the whole batch."""
        self.sums[:2] += torch.stack([sum(terms.values()) * share, (logits.argmax(1) == labels).sum()])
        self.names = ["logits", *terms]
        self.nonfinite = self.nonfinite + ~torch.stack([logits.float().sum(), *terms.values()]).isfinite()

    def measure_gradients(self, logits: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Add the norms of the gradients of a hard and a soft loss at the logits (B, C), before `backward`."""
        gradients = (torch.autograd.grad(term, logits, retain_graph=True)[0] for term in terms.values())
        self.sums[2:] += torch.stack([gradient.norm() for gradient in gradients])

    def check(self, where: str) -> None:
        """Raise Diverged, naming what became NaN or infinite first: what has been so for the most steps."""
        counts = all_reduce_max(*self.nonfinite.int().tolist())
        if any(counts):
            diverged(self.names[counts.index(max(counts))], where)


def explain_share(recipe: Recipe, share: float) -> str | None:
    """A sentence if the soft loss has a share of the gradient far from the one that its weight suggests; else None.

    With weights a and s of the hard and the soft loss, that is s / (a + s). The gradient of KL(p_v || p_z) at the
    student's logits is (p_z - p_v) / T, where p_z - p_v itself shrinks like 1 / T; so without the factor T^2 the odds
    of the share, soft to hard, are 1 / T^2 of those with it. If the latter are s / a, the share without the factor is
    (s / T^2) / (a + s / T^2): 11% for the original's a = 0.25, s = 0.75, T = 5. A confident teacher makes both larger.
    """
    hard, soft, scale = recipe.alpha, recipe.weight_of_soft_loss, recipe.temperature**2
    if not (hard and soft and share < 1):
        return None
    suggested = recipe.suggested_soft_share
    if 1 / 5 < share / (1 - share) / (soft / hard) < 10:
        return None
    if not recipe.scale_soft_loss:
        expected = soft / scale / (hard + soft / scale)
        why = f"without the factor T^2 = {scale:g} about {expected:.0%} are expected (scale_soft_loss)"
    elif share < suggested:
        why = "the teacher's probabilities differ little from the student's"
    else:
        why = "its gradients are larger than those of the hard loss"
    return f"the soft loss has {share:.0%} of the gradient at the logits, its weight suggests {suggested:.0%}: {why}"


def diverged(what: str, where: str) -> None:
    raise Diverged(
        f"{where}: the {what} became NaN or infinite. The last good checkpoint is kept; train again with a lower lr "
        "(and --overwrite, or another --run)"
    )


class Training:
    """The state of a training run: everything needed to resume it exactly, and its progress."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        config: Config,
        images: int,
        title: str,
        state: dict[str, Any] | None,
    ):
        self.model, self.recipe, self.config, self.title = model, recipe, config, title
        self.steps = images // config.batch_size  # per epoch
        self.optimizer = make_optimizer(model, recipe, config.device)
        self.scheduler = make_scheduler(self.optimizer, recipe, recipe.epochs * self.steps)
        self.meter = Meter(config.device)
        self.history: list[dict[str, float]] = []  # a record for each epoch
        self.step = 0  # done of the current epoch
        self.started = self.saved = time.perf_counter()
        if state:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "history": list(self.history),
            "step": self.step,
            "totals": all_reduce_sum(self.meter.sums).cpu(),
            "seconds": time.perf_counter() - self.started if self.step else 0.0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        fused = self.optimizer.param_groups[0]["fused"]
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        for group in self.optimizer.param_groups:
            group["fused"] = fused  # as this device has it, not the one that the state was saved on
        for parameter, moments in self.optimizer.state.items():
            for key, moment in moments.items():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    # In the parameter's memory format: the fused optimizers pair elements by their place in memory.
                    moments[key] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
        self.history, self.step = state["history"], state["step"]
        self.meter = Meter(self.config.device, state["totals"] * (rank() == 0))
        self.started -= state["seconds"]

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.meter, self.started = Meter(self.config.device), time.perf_counter()
        self.model.train()

    @property
    def save_due(self) -> bool:
        return time.perf_counter() - self.saved > 60 * self.config.checkpoint_minutes

    @property
    def epoch_save_due(self) -> bool:
        """Whether to save after an epoch: after the first and the last, and if the last save was over 5 s ago."""
        return len(self.history) in (1, self.recipe.epochs) or time.perf_counter() - self.saved > 5

    @property
    def averages(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far."""
        loss, hits, *_ = all_reduce_sum(self.meter.sums).tolist()
        return loss / self.step, hits / (self.step * self.config.batch_size)

    @property
    def soft_share(self) -> float | None:
        """Share of the soft loss in the gradient at the logits, in the epoch so far; None without a soft loss."""
        *_, hard, soft = all_reduce_sum(self.meter.sums).tolist()
        return soft / (hard + soft) if soft else None

    def check(self) -> None:
        """Raise Diverged if the logits or a term of the loss has not been finite."""
        self.meter.check(self.position)

    @property
    def position(self) -> str:
        return f"{self.title}: epoch {len(self.history) + 1}, step {self.step}, lr = {self.recipe.lr:g}"

    def save(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Pass the state to `write`, unless it has diverged; the weights can diverge a step before the logits do.

        So can a buffer, such as a running variance, which only evaluation uses.
        """
        self.check()
        if wrong := nonfinite_tensors(self.model.state_dict()):
            parameters = {name for name, _ in self.model.named_parameters()}
            what = "weights" if parameters.intersection(wrong) else f"buffer {wrong[0]}"
            diverged(what, self.position)
        write(self.state_dict())
        self.saved = time.perf_counter()

    def describe(self, rate: float, later: float) -> str:
        """The loss, and the time left at this many images per second, with `later` seconds of other models after it."""
        left = (self.recipe.epochs - len(self.history)) * self.steps - self.step
        seconds = left * self.config.batch_size / world_size() / max(rate, 1e-9)
        run = f" of this model, {duration(seconds + later)} of the run" if later else ""
        return "loss {:.4f}, accuracy {:.2%}, ".format(*self.averages) + f"{duration(seconds)} left{run}"
