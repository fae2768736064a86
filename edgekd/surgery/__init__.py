"""Reading how much each part of a model matters, and cutting the rest away."""

from edgekd.surgery.cut import cut
from edgekd.surgery.importance import Importance, measure_importance

__all__ = ["Importance", "cut", "measure_importance"]
