#!/usr/bin/env python3
"""Writes DIRECTORY/{config.json, model.safetensors}: the shape of qwen3.5-0.8b with random bfloat16 weights, 1.5 GB, as a
file to measure loading with. `random_checkpoint.py DIRECTORY`; needs only the standard library and takes seconds."""
import json
import os
import struct
import sys

HIDDEN, LAYERS, WIDTH, VOCABULARY = 1024, 24, 3584, 248320
HEADS, KV_HEADS, HEAD = 8, 2, 256
KEY_HEADS, VALUE_HEADS, LINEAR_HEAD = 16, 16, 128
INTERVAL = 4  # every fourth layer has full attention
BLOCK = 32 << 20

CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "tie_word_embeddings": True,
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "hidden_act": "silu",
    "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "full_attention_interval": INTERVAL,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": LINEAR_HEAD, "linear_value_head_dim": LINEAR_HEAD,
    "linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": VALUE_HEADS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
}


def mixer(layer):
    if layer % INTERVAL == INTERVAL - 1:
        return {"self_attn.q_proj.weight": [2 * HEADS * HEAD, HIDDEN], "self_attn.k_proj.weight": [KV_HEADS * HEAD, HIDDEN],
                "self_attn.v_proj.weight": [KV_HEADS * HEAD, HIDDEN], "self_attn.o_proj.weight": [HIDDEN, HEADS * HEAD],
                "self_attn.q_norm.weight": [HEAD], "self_attn.k_norm.weight": [HEAD]}
    keys, values = KEY_HEADS * LINEAR_HEAD, VALUE_HEADS * LINEAR_HEAD
    return {"linear_attn.A_log": [VALUE_HEADS], "linear_attn.dt_bias": [VALUE_HEADS],
            "linear_attn.conv1d.weight": [2 * keys + values, 1, 4], "linear_attn.norm.weight": [LINEAR_HEAD],
            "linear_attn.in_proj_qkv.weight": [2 * keys + values, HIDDEN],
            "linear_attn.in_proj_z.weight": [values, HIDDEN], "linear_attn.in_proj_a.weight": [VALUE_HEADS, HIDDEN],
            "linear_attn.in_proj_b.weight": [VALUE_HEADS, HIDDEN], "linear_attn.out_proj.weight": [HIDDEN, values]}


def tensors():
    yield "model.embed_tokens.weight", [VOCABULARY, HIDDEN]
    for layer in range(LAYERS):
        parts = {"input_layernorm.weight": [HIDDEN], **mixer(layer), "post_attention_layernorm.weight": [HIDDEN],
                 "mlp.gate_proj.weight": [WIDTH, HIDDEN], "mlp.up_proj.weight": [WIDTH, HIDDEN],
                 "mlp.down_proj.weight": [HIDDEN, WIDTH]}
        for name, shape in parts.items():
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", [HIDDEN]


def header():
    entries, offset = {}, 0
    for name, shape in tensors():
        size = 2
        for extent in shape:
            size *= extent
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def random_block():
    """bfloat16 of either sign between 0.008 and 0.03."""
    upper = bytes(0x3C | (value & 0x80) for value in range(256))
    block = bytearray(os.urandom(BLOCK))
    block[1::2] = bytes(block[1::2]).translate(upper)
    return block


def main():
    directory = sys.argv[1]
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(CONFIG, file, indent=1)
    head, left = header()
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(head)
        while left > 0:
            left -= file.write(random_block()[:min(BLOCK, left)])


if __name__ == "__main__":
    main()
