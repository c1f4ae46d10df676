"""Adapters from two checkpoints: what a fine-tune changed, as low-rank pairs with their errors."""
