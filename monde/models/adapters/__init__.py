"""Small adapters between model families and the one MoE layer; `base` says what an adapter owes."""
