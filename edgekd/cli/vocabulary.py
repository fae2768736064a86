"""`edgekd vocabulary`: a smaller word table."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "vocabulary",
    "Stage: leave out words that the task never uses.",
    """Keep the words of IN that the training texts use, the special ones and all fall-backs; the tokenizer shrinks too.

    In: a model folder of a text task. Out: the same with a smaller word table and its own tokenizer, for
    `edgekd quantize`.

    \b
    Example:
      edgekd vocabulary distilled --data data/movies --out smaller
    """,
)
