"""Adapters into one adapter: combined by a method, or brought to other ranks."""
