"""Recipes: what to build from what, the lock that pins it, and the statement of where an output comes from."""
