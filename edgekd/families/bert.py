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
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        stream=(
            "embeddings.word_embeddings",
            "embeddings.position_embeddings",
            "embeddings.token_type_embeddings",
            "embeddings.LayerNorm",
        ),
        entrance="embeddings_project",
        reads_first=tuple(f"{name}ForSequenceClassification" for name in ("Bert", "Roberta", "XLMRoberta", "Electra")),
    ),
)
