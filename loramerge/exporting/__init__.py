"""Deployable forms of a model: ONNX graphs from transformers' own exporter, weights streamed from the checkpoint."""
