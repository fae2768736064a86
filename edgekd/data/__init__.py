"""Labelled and unlabelled examples, read from wherever they are and checked row by row."""

from edgekd.data.examples import DataSpec, Examples, Splits
from edgekd.data.load import load_evaluation, load_splits, require_labels

__all__ = ["DataSpec", "Examples", "Splits", "load_evaluation", "load_splits", "require_labels"]
