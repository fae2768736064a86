"""`edgekd sparsify`: sparse finetuning."""

from edgekd.cli.stage import stage_command

command = stage_command(
    "sparsify",
    "Stage: zeros that the device can use.",
    """Set weights of IN to zero in a pattern and train the others to make up for it.

    In: a model folder, quantized or not. Out: the same with zeros, and what it promises of them in config.json.

    \b
    Examples:
      edgekd sparsify distilled --data data/movies --set pattern=2:4 --out sparse
      edgekd sparsify distilled --data data/movies --set sparsity=0.9 --set epochs=8 --out sparse
      edgekd sparsify quantized --data data/movies --target npu-ethos-u55-256 --out sparse
    """,
)
