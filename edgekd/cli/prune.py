"""`edgekd prune`: cut to a shape."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "prune",
    "Stage: cut the model to the chosen shape.",
    """Cut IN to its plan, or to the layers, heads and neurons given with --set.

    In: a model folder. Out: a physically smaller model folder, for `edgekd distill`.

    \b
    Examples:
      edgekd prune planned --data data/movies --out pruned
      edgekd prune teachers/movies --data data/movies --set layers=[0,2,4,5] --set heads=6 --out pruned
    """,
)
