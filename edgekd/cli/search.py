"""`edgekd search`: choose a shape."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "search",
    "Stage: choose the shape that fits the budget.",
    """Choose layers, heads and neurons of IN that fit the budget; weights stay as they are.

    In: a model folder. Out: the same with the plan in config.json, for `edgekd prune`.

    \b
    Example:
      edgekd search teachers/movies --data data/movies --speedup 4 --threads 1 --out planned
    """,
)
