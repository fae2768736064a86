"""Distillation losses: functions on tensors and numbers in fp32, and the table a recipe chooses from.

Importing this package does not import torch, so that a recipe can be checked quickly.
"""

from edgekd.distill.losses.affinity import AFFINITY
from edgekd.distill.losses.attention import ATTENTION
from edgekd.distill.losses.feature import FEATURE
from edgekd.distill.losses.logit import LOGIT
from edgekd.distill.losses.loss import Loss
from edgekd.distill.losses.relation import RELATION

LOSSES: dict[str, Loss] = {**LOGIT, **FEATURE, **ATTENTION, **RELATION, **AFFINITY}

__all__ = ["LOSSES", "Loss"]
