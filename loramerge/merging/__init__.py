"""Merging: the plan, the stream that carries it out, the receipt that tells what happened."""
