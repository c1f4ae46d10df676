"""Bytes: headers, ranges, streaming writers, atomic outputs, digests. Knows nothing of LoRA."""
