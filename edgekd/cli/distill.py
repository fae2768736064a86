"""`edgekd distill`: recover accuracy from the teacher."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "distill",
    "Stage: recover accuracy from the teacher.",
    """Train IN to give the answers of --teacher, and keep the weights that score best on validation.

    In: a model folder and its teacher. Out: the same shape with trained weights. Killed and started again, it goes
    on where it was. Settings and losses are described in docs/distill.md.

    \b
    Examples:
      edgekd distill pruned --teacher teachers/movies --data data/movies --out distilled
      edgekd distill pruned --teacher teachers/movies --data data/movies --out distilled \\
        --set epochs=3 --set 'losses={forward_kl: {weight: 1, temperature: 2}, minilm: 0.5}'
    """,
)
