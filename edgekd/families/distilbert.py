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
        heads="n_heads",
        width="dim",
        hidden="dim",
        depth="n_layers",
    ),
)
