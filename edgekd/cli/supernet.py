"""`edgekd supernet`: one training for all shapes."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "supernet",
    "Stage: train all sub-networks at once.",
    """Sort the channels of IN by importance and train its sub-networks, so that any shape can be sliced out.

    In: a model folder. Out: the same shape with trained weights, for `edgekd search` and `edgekd prune`; it serves
    every target and budget.

    \b
    Example:
      edgekd supernet teachers/movies --data data/movies --out supernet
    """,
)
