"""Two proxies that see different things, as one."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgekd.arch import Arch
from edgekd.search.proxies.context import ProxyContext
from edgekd.search.proxies.fisher import fisher
from edgekd.search.proxies.kl import kl


def fisher_kl(context: ProxyContext) -> Callable[[Arch], float]:
    """Geometric mean of `fisher` and `kl`: what is lost for good, and how far the student has to go.

    ADAPT: our own combination. The mean of logarithms needs no scale between the two, and does not depend on which
    other shapes are scored, as a sum of ranks would.
    """
    lost, away = fisher(context), kl(context)
    return lambda arch: math.sqrt(max(lost(arch), 0.0) * max(away(arch), 0.0))
