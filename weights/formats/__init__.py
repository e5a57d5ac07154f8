"""The layouts in which RoPE GPT-2s are stored, as tables, and how one is recognised."""
