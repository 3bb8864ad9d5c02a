"""The base model with its LoRA slots: loading, identity, merging, quantization. Needs torch."""
