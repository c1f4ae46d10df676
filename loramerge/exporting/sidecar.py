"""The files that readers of a layout look for beside a graph, and what they look for in the config."""

from __future__ import annotations

import json
from typing import Any

from loramerge.exporting.plan import ExportPlan

JS_KEY = "transformers.js_config"


def config(plan: ExportPlan, raw: bytes) -> bytes:
    """The config's bytes for this layout: as they are, or with one more field in front, which a browser reads."""
    if plan.settings.layout != LAYOUT_JS:
        return raw
    text = raw.decode("utf-8-sig")
    if JS_KEY in json.loads(text):
        return raw
    used = {graph.path.removeprefix("onnx/"): True for graph in plan.graphs}
    field = json.dumps({JS_KEY: {"use_external_data_format": used}})[1:-1]
    head, brace, rest = text.partition("{")
    comma = "" if rest.strip() == "}" else ","
    return f"{head}{brace}\n  {field}{comma}{rest}".encode()


def more(plan: ExportPlan) -> dict[str, bytes]:
    """Files of the layout's own, by name."""
    if plan.settings.layout != LAYOUT_GENAI:
        return {}
    return {"genai_config.json": (json.dumps(_genai(plan), indent=4) + "\n").encode()}


LAYOUT_JS, LAYOUT_GENAI = "transformersjs", "genai"


def _genai(plan: ExportPlan) -> dict[str, Any]:
    text = plan.config.get_text_config(decoder=True)
    graph = plan.graphs[0]
    names = {port.name for port in graph.spec.inputs}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    heads, size = graph.spec.layers[0]
    context = int(getattr(text, "max_position_embeddings", 0) or 2048)
    tokens = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:
        end = tokens["eos_token_id"]
        tokens["pad_token_id"] = end[0] if isinstance(end, list) else end
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph.path,
                "head_size": size,
                "hidden_size": int(text.hidden_size),
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": int(text.num_attention_heads),
                "num_hidden_layers": len(graph.spec.layers),
                "num_key_value_heads": heads,
            },
            "type": str(plan.config.model_type),
            "vocab_size": int(text.vocab_size),
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
