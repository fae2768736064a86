"""`edgekd quantize`: post-training int8."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "quantize",
    "Stage: post-training int8.",
    """Find the int8 form of IN that is fastest on the target and keeps the metric.

    In: a model folder. Out: the same with its quantization in config.json, for `edgekd export`.

    \b
    Example:
      edgekd quantize distilled --data data/movies --threads 1 --out quantized
    """,
)
