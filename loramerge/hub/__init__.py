"""The Hub: references to repositories, and what is in them as sources of bytes."""
