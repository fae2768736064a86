"""How good a shape would be once distilled, guessed without training: the table of all proxies.

`proxy(context)` does the work that all shapes share and returns a function from a shape to a score, lower is better.
Zen-like scores of batch-normalized nets are left out: they judge an untrained net by itself, without its teacher.
"""

from __future__ import annotations

from collections.abc import Callable

from edgekd.arch import Arch
from edgekd.search.proxies import activation, diswot, fisher, joint, kl
from edgekd.search.proxies.context import ProxyContext, gather

Score = Callable[[Arch], float]

PROXIES: dict[str, Callable[[ProxyContext], Score]] = {
    "kl": kl.kl,
    "diswot": diswot.diswot,
    "activation": activation.activation,
    "fisher": fisher.fisher,
    "fisher_kl": joint.fisher_kl,
}

__all__ = ["PROXIES", "ProxyContext", "Score", "gather"]
