"""Adapters: dialects (how trainers name and shape factors) and updates (what they mean)."""
