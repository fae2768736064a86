"""The errors a user meets.

    EdgekdError                 one line on stderr, no traceback
    ├── RecipeError             the recipe or a setting is wrong                     exit 2
    ├── DataError               the data cannot be read as asked                     exit 2
    ├── ModelError              a model folder cannot be used                        exit 2
    ├── TargetError             the target is wrong or cannot do what is asked       exit 2
    ├── StoreError              a folder cannot be read, written or locked           exit 2
    ├── BudgetError             no student of this teacher can meet the budget       exit 3
    └── StageError              a stage broke its promise: ours to fix               exit 1

A missed budget or accuracy floor is a result, not an error: see `edgekd.latency.verdict`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekdError(Exception):
    """Base of everything that is shown as a one-line message."""

    exit_code = 2


class RecipeError(EdgekdError):
    """The recipe, or a setting given on the command line, is wrong."""


class DataError(EdgekdError):
    """The data cannot be read as asked."""


class ModelError(EdgekdError):
    """A model folder is missing, incomplete or of a kind edgekd cannot use."""


class TargetError(EdgekdError):
    """A target file is wrong, or the target cannot do what is asked of it."""


class StoreError(EdgekdError):
    """A folder cannot be read, written or locked."""


class BudgetError(EdgekdError):
    """Even the smallest student misses the budget; the message has the nearest point reached."""

    exit_code = 3


class StageError(EdgekdError):
    """A stage produced something that breaks its promise (a defect of edgekd)."""

    exit_code = 1


def nearest(got: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(got, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, got: str, choices: Iterable[str]) -> str:
    """Say what was got and what may be chosen: `unknown loss 'fwd_kl' (did you mean …?); choose one of: …`."""
    names = sorted(choices)
    return f"unknown {kind} {got!r}{nearest(got, names)}; choose one of: {', '.join(names)}"
