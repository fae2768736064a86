"""`edgekd operators`: cheaper ways to compute the same layers."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "operators",
    "Stage: compute the layers in cheaper ways.",
    """Change how the layers of IN compute: fewer tokens, cheaper activations and norms, factorised matrices.

    In: a model folder. Out: the same with other operators, for `edgekd distill`. `edgekd search` foresees the stage
    when it is given the same settings with --operators.

    \b
    Examples:
      edgekd operators pruned --teacher teachers/movies --data data/movies --out lighter
    """,
)
