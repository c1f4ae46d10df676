"""Binding: which stored tensors an adapter's modules are, decided from names and shapes alone."""
