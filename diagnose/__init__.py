"""What a distillation loss computes, and whether teacher and student are set up as they should be."""

from diagnose.loss import examine
from diagnose.models import examine_models

__all__ = ["examine", "examine_models"]
