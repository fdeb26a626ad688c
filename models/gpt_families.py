"""Rows of the table: families of the time of GPT-2 and GPT-3, whose modules have names of their own."""

from models.family import (
    COLUMNS,
    HEAD_ENTRIES,
    HEADS,
    QKV,
    row,
)

GPT_ROWS = (
    row(
        "gpt_neox",
        "GPTNeoX",
        layers="gpt_neox.layers",
        attention_out="attention.dense",
        attention_rows=(("attention.query_key_value", (QKV,)),),
        mlp_out="mlp.dense_4h_to_h",
        mlp_rows=(("mlp.dense_h_to_4h", (COLUMNS,)),),
        heads_fill_hidden=True,
    ),
    row(
        "gpt2",
        "GPT2",
        causal_class="GPT2LMHeadModel",
        layers="transformer.h",
        transposed=True,
        attention_out="attn.c_proj",
        attention_rows=(("attn.c_attn", (HEADS, HEADS, HEADS)),),
        mlp_out="mlp.c_proj",
        mlp_rows=(("mlp.c_fc", (COLUMNS,)),),
        columns_key="n_inner",
        heads_fill_hidden=True,
        head_counts=(("attn.num_heads", HEADS), ("attn.split_size", HEAD_ENTRIES)),
        unsupported=(("add_cross_attention", "its cross-attention is not pruned"),),
    ),
    row(
        "gptj",
        "GPTJ",
        layers="transformer.h",
        tuple_outputs=True,
        attention_out="attn.out_proj",
        attention_rows=(
            ("attn.q_proj", (HEADS,)),
            ("attn.k_proj", (HEADS,)),
            ("attn.v_proj", (HEADS,)),
        ),
        mlp_out="mlp.fc_out",
        mlp_rows=(("mlp.fc_in", (COLUMNS,)),),
        columns_key="n_inner",
        heads_fill_hidden=True,
        head_counts=(("attn.num_attention_heads", HEADS),),
    ),
)
