"""DistilBERT."""

from edgekd.families.encoder import Places, encoder

DISTILBERT = encoder(
    "distilbert",
    ("distilbert",),
    Places(
        layers="transformer.layer",
        attention="attention",
        qkv=("q_lin", "k_lin", "v_lin"),
        attention_output="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        norms=("sa_layer_norm", "output_layer_norm"),
        stream=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.LayerNorm"),
        reads_first=("DistilBertForSequenceClassification",),
        heads="n_heads",
        width="dim",
        depth="n_layers",
    ),
)
