"""ViT and DeiT."""

from edgekd.families.encoder import Places, encoder

VIT = encoder(
    "vit",
    ("vit", "deit"),
    Places(
        layers="encoder.layer",
        attention="attention.attention",
        qkv=("query", "key", "value"),
        attention_output="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        patches="embeddings.patch_embeddings",
    ),
)
