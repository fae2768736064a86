"""BERT and its relatives that keep BERT's layer: RoBERTa, XLM-R, ELECTRA."""

from edgekd.families.encoder import Places, encoder

BERT = encoder(
    "bert",
    ("bert", "roberta", "xlm-roberta", "electra"),
    Places(
        layers="encoder.layer",
        attention="attention.self",
        qkv=("query", "key", "value"),
        attention_output="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
    ),
)
