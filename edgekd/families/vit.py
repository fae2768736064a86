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
        norms=("layernorm_before", "layernorm_after"),
        stream=(
            "embeddings.patch_embeddings.projection",
            "embeddings.cls_token",
            "embeddings.distillation_token",
            "embeddings.mask_token",
            "embeddings.position_embeddings",
            "layernorm",
        ),
        reads_first=("ViTForImageClassification", "DeiTForImageClassification"),
        patches="embeddings.patch_embeddings",
    ),
)
