"""Latency: measured in a process of its own, summarized with intervals, judged against a budget, or predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.latency.profiling import ProfileResult, profile

__all__ = ["ProfileResult", "profile"]


def __getattr__(name: str) -> Any:
    """Import the profiler on first use, so that the judging parts stay light."""
    if name in __all__:
        from edgekd.latency import profiling

        return getattr(profiling, name)
    raise AttributeError(f"module 'edgekd.latency' has no attribute {name!r}")
