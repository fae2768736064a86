"""Compress Hugging Face models for edge devices: search, prune, distill, quantize, export, profile.

import edgekd

run = edgekd.compress("teacher/", data="data/", target="local", speedup=4, out="runs/mine")
edgekd.profile("runs/mine/bundle", target="local")
edgekd.evaluate("runs/mine/bundle", data="data/")
student = edgekd.load("runs/mine/04-distill")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["compress", "evaluate", "load", "profile"]

if TYPE_CHECKING:
    from edgekd.api import compress, evaluate, load, profile


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that `import edgekd` stays light."""
    if name in __all__:
        from edgekd import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgekd' has no attribute {name!r}")
