"""Views of fused weights, hand-made bases: which stored element every row of a view is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loramerge.adapters.operators import gather
from loramerge.adapters.views import Part, Place, Take, View, whole_view
from loramerge.binding.families import families
from loramerge.binding.namespace import Namespace, Slot
from loramerge.binding.rows import arranged, halves_of_pairs, join, select, transposed
from loramerge.errors import MismatchError


def names_of(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> Namespace:
    return Namespace([Slot(n, n, "F32", s) for n, s in shapes.items()], families(), config)


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every element of every tensor a number of its own."""
    tensors, at = {}, 0
    for name, shape in shapes.items():
        n = int(torch.tensor(shape).prod())
        tensors[name] = torch.arange(at, at + n, dtype=torch.float64).view(shape)
        at += n
    return tensors


def seen(shapes: Mapping[str, tuple[int, ...]], name: str, **config: Any) -> Tensor:
    """The matrix that an adapter's module of this name sees, gathered from numbered tensors."""
    target = names_of(shapes, **config).target(name)
    assert target is not None, name
    view = target.view
    flat = {n: t.reshape(-1) for n, t in numbers(shapes).items()}
    assert sum(len(t) for part in view.parts for t in part.take) == view.rows
    return gather(view, {n: flat[n] for n in {p.tensor for p in view.parts}})


HEADS, KV, HD, IN = 4, 2, 6, 10
SIZES = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
SPLIT = {"q_proj": HEADS * HD, "k_proj": KV * HD, "v_proj": KV * HD}


def per_group(split: Sequence[Tensor], groups: int) -> Tensor:
    """Fused rows where each group holds its share of every part."""
    return torch.cat([t.reshape(groups, -1, t.shape[-1]) for t in split], dim=1).reshape(-1, split[0].shape[-1])


# (fused name, split names' parent, model type, config, heights, groups)
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, int], int]] = {
    "phi3": ("self_attn.qkv_proj", "self_attn", {"model_type": "phi3", **SIZES}, (24, 12, 12), 1),
    "neox": (
        "attention.query_key_value",
        "attention",
        {"model_type": "gpt_neox", "num_attention_heads": 4},
        (24, 24, 24),
        4,
    ),
    "bloom": ("self_attention.query_key_value", "self_attention", {"model_type": "bloom", "n_head": 4}, (24,) * 3, 4),
    "falcon-new": (
        "self_attention.query_key_value",
        "self_attention",
        {"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
        (24, 12, 12),
        2,
    ),
    "falcon-mq": (
        "self_attention.query_key_value",
        "self_attention",
        {"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 4, "multi_query": True},
        (24, 6, 6),
        1,
    ),
    "falcon-old": (
        "self_attention.query_key_value",
        "self_attention",
        {"model_type": "falcon", "num_attention_heads": 4, "multi_query": False},
        (24, 24, 24),
        4,
    ),
    "megatron": ("self_attention.linear_qkv", "self_attention", SIZES, (24, 12, 12), 2),
    "litgpt": ("attn.qkv", "attn", SIZES, (24, 12, 12), 1),
    "litgpt-old": ("attn.attn", "attn", SIZES, (24, 12, 12), 2),
    "qwen3.5": (
        "linear_attn.in_proj_qkv",
        "linear_attn",
        {
            "text_config": {
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 6,
                "linear_num_value_heads": 4,
                "linear_value_head_dim": 5,
            }
        },
        (12, 12, 20),
        1,
    ),
    "baichuan": ("self_attn.W_pack", "self_attn", {}, (24, 24, 24), 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_split_module_sees_its_rows_of_a_fused_weight(case: str, leaf: str) -> None:
    fused, parent, config, heights, groups = CASES[case]
    width = (IN,) if leaf == "weight" else ()
    shapes = {f"m.layers.0.{fused}.{leaf}": (sum(heights), *width)}
    whole = next(iter(numbers(shapes).values())).reshape(sum(heights), -1)
    chunks = whole.reshape(groups, -1, whole.shape[1]).split([h // groups for h in heights], dim=1)
    for part, chunk in zip(SPLIT, chunks, strict=True):
        got = seen(shapes, f"m.layers.0.{parent}.{part}.{leaf}", **config)
        assert torch.equal(got, chunk.reshape(-1, whole.shape[1])), part


@pytest.mark.parametrize("case", CASES)
def test_fused_module_sees_the_rows_of_split_weights(case: str) -> None:
    fused, parent, config, heights, groups = CASES[case]
    shapes = {f"m.layers.0.{parent}.{p}.weight": (h, IN) for p, h in zip(SPLIT, heights, strict=True)}
    got = seen(shapes, f"m.layers.0.{fused}.weight", **config)
    assert torch.equal(got, per_group(list(numbers(shapes).values()), groups))


def test_columns_of_a_conv1d() -> None:
    shapes = {"h.0.attn.c_attn.weight": (IN, 72), "h.0.attn.c_attn.bias": (72,)}
    tensors = numbers(shapes)
    got = seen(shapes, "h.0.attn.k_proj.weight", model_type="gpt2")
    assert torch.equal(got, tensors["h.0.attn.c_attn.weight"].T[24:48])
    got = seen(shapes, "h.0.attn.v_proj.bias", model_type="gpt2")
    assert torch.equal(got[:, 0], tensors["h.0.attn.c_attn.bias"][48:])


def test_multihead_attention_in_both_fusions() -> None:
    fused = {"attn.in_proj_weight": (72, 24), "attn.in_proj_bias": (72,)}
    assert torch.equal(seen(fused, "attn.k_proj.weight"), numbers(fused)["attn.in_proj_weight"][24:48])
    assert torch.equal(seen(fused, "attn.v_proj.bias")[:, 0], numbers(fused)["attn.in_proj_bias"][48:])
    split = {f"attn.{p}.weight": (24, 24) for p in SPLIT}
    assert torch.equal(seen(split, "attn.in_proj_weight"), torch.cat(list(numbers(split).values())))


def test_codegen_groups_hold_q_then_v_then_k() -> None:
    shapes = {"h.0.attn.qkv_proj.weight": (96, 32)}
    whole = numbers(shapes)["h.0.attn.qkv_proj.weight"]
    q, v, k = whole.view(4, 3, 8, 32).unbind(1)
    for name, wanted in (("q", q), ("k", k), ("v", v)):
        got = seen(shapes, f"h.0.attn.{name}_proj.weight", model_type="codegen")
        assert torch.equal(got, wanted.reshape(-1, 32)), name


def test_deberta_takes_q_k_v_head_by_head() -> None:
    """As `qp.view(..., heads, 3 * hd).chunk(3, dim=-1)` (transformers 5.23, modeling_deberta.py)."""
    shapes = {"encoder.layer.0.attention.self.in_proj.weight": (72, 24)}
    whole = numbers(shapes)["encoder.layer.0.attention.self.in_proj.weight"]
    chunks = whole.view(4, 18, 24).chunk(3, dim=1)
    for name, wanted in zip(("query", "key", "value"), chunks, strict=True):
        got = seen(
            shapes,
            f"encoder.layer.0.attention.self.{name}_proj.weight",
            model_type="deberta",
            num_attention_heads=4,
        )
        assert torch.equal(got, wanted.reshape(24, 24)), name


def test_without_a_config_the_output_projection_tells_the_rows_of_q() -> None:
    shapes = {"layers.0.self_attn.qkv_proj.weight": (48, IN), "layers.0.self_attn.o_proj.weight": (IN, 24)}
    whole = numbers(shapes)["layers.0.self_attn.qkv_proj.weight"]
    assert torch.equal(seen(shapes, "layers.0.self_attn.q_proj.weight"), whole[:24])
    assert torch.equal(seen(shapes, "layers.0.self_attn.v_proj.weight"), whole[36:])


def test_rows_that_nothing_tells_are_an_error() -> None:
    with pytest.raises(MismatchError, match="heads, kv-heads"):
        names_of({"l.0.self_attn.qkv_proj.weight": (48, IN)}).target("l.0.self_attn.q_proj.weight")
    names = names_of({"l.0.attention.query_key_value.weight": (72, IN)}, model_type="gpt_neox")
    with pytest.raises(MismatchError, match="config"):
        names.target("l.0.attention.q_proj.weight")


def test_a_fusion_of_another_model_type_is_not_guessed() -> None:
    names = names_of({"l.0.attention.query_key_value.weight": (72, IN)}, model_type="unheard_of")
    assert names.target("l.0.attention.q_proj.weight") is None


def test_one_fusion_seen_in_another() -> None:
    shapes = {"model.layers.0.self_attn.qkv_proj.weight": (48, IN)}
    config = {"model_type": "phi3", **SIZES}
    q, k, v = numbers(shapes)["model.layers.0.self_attn.qkv_proj.weight"].split([24, 12, 12])
    got = seen(shapes, "decoder.layers.0.self_attention.linear_qkv.weight", **config)
    assert torch.equal(got, per_group([q, k, v], KV))
    got = seen(shapes, "transformer.h.0.attn.qkv.weight", **config)
    assert torch.equal(got, torch.cat([q, k, v]))


def test_rotary_pairs_of_a_vision_tower() -> None:
    shapes = {"vision_tower.encoder.blocks.0.wqkv.weight": (72, IN)}
    config = {"model_type": "kimi_k25", "vision_config": {"num_attention_heads": 4}, **SIZES}
    q, k, v = numbers(shapes)["vision_tower.encoder.blocks.0.wqkv.weight"].chunk(3)

    def halves(t: Tensor) -> Tensor:  # transformers 5.23, core_model_loading.py PermuteForRope
        return t.view(4, 3, 2, IN).transpose(1, 2).reshape(24, IN)

    for name, wanted in (("q", halves(q)), ("k", halves(k)), ("v", v)):
        got = seen(shapes, f"model.vision_tower.layers.0.attn.{name}_proj.weight", **config)
        assert torch.equal(got, wanted), name
    split = {f"model.vision_tower.layers.0.attn.{p}.weight": (24, IN) for p in SPLIT}
    got = seen(split, "vision_tower.encoder.blocks.0.wqkv.weight", **config)
    a, b, c = got.chunk(3)
    assert torch.equal(torch.cat([halves(a), halves(b), c]), torch.cat(list(numbers(split).values())))


EXPERTS, INNER, HIDDEN = 3, 5, 8
STRAIGHT = {
    "l.0.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
    "l.0.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
}
TURNED = {
    "l.0.mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
    "l.0.mlp.experts.down_proj": (EXPERTS, INNER, HIDDEN),
}


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_expert_of_a_stack(expert: int) -> None:
    gate_up, down = numbers(STRAIGHT).values()
    for name, wanted in (
        ("gate_proj", gate_up[expert, :INNER]),
        ("up_proj", gate_up[expert, INNER:]),
        ("down_proj", down[expert]),
        ("gate_up_proj", gate_up[expert]),
    ):
        assert torch.equal(seen(STRAIGHT, f"l.0.mlp.experts.{expert}.{name}.weight"), wanted), name


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_vl_moe", "unheard_of"])
def test_expert_of_a_transposed_stack(model_type: str) -> None:
    gate_up, down = (t.mT for t in numbers(TURNED).values())
    gate, up = (gate_up[1, ::2], gate_up[1, 1::2]) if model_type == "gpt_oss" else gate_up[1].chunk(2)
    for name, wanted in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[1])):
        got = seen(TURNED, f"l.0.mlp.experts.1.{name}.weight", model_type=model_type)
        assert torch.equal(got, wanted), name
    whole = seen(TURNED, "l.0.mlp.experts.gate_up_projs.1.weight", model_type=model_type)
    assert torch.equal(whole, gate_up[1])


def test_square_down_projection_follows_its_gate() -> None:
    shapes = {
        "l.0.mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * HIDDEN),
        "l.0.mlp.experts.down_proj": (EXPERTS, HIDDEN, HIDDEN),
    }
    got = seen(shapes, "l.0.mlp.experts.2.down_proj.weight", model_type="gpt_oss")
    assert torch.equal(got, numbers(shapes)["l.0.mlp.experts.down_proj"][2].T)


def test_expert_beyond_the_stack_has_no_home() -> None:
    assert names_of(STRAIGHT).target(f"l.0.mlp.experts.{EXPERTS}.gate_proj.weight") is None


def test_experts_by_the_name_of_the_other_layout() -> None:
    shapes = {"model.layers.0.block_sparse_moe.experts.1.w3.weight": (INNER, HIDDEN)}
    got = seen(shapes, "model.layers.0.mlp.experts.1.up_proj.weight", model_type="mixtral")
    assert torch.equal(got, numbers(shapes)["model.layers.0.block_sparse_moe.experts.1.w3.weight"])


# (model type, on disk, in memory)
RENAMED = [
    ("llava", "language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("gemma3", "language_model.lm_head.weight", "lm_head.weight"),
    ("llava", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
     "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
    ("qwen2_audio", "audio_tower.layers.0.fc1.weight", "model.audio_tower.layers.0.fc1.weight"),
    ("qwen2_5_vl", "model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("qwen2_vl", "visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
    ("qwen3_5_text", "model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("qwen2_5_omni", "thinker.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("vit", "vit.encoder.layer.0.attention.attention.query.weight", "vit.layers.0.attention.q_proj.weight"),
    ("vit", "vit.encoder.layer.0.output.dense.bias", "vit.layers.0.mlp.fc2.bias"),
    ("dinov2", "encoder.layer.1.attention.output.dense.weight", "encoder.layer.1.attention.o_proj.weight"),
    ("swin", "encoder.layers.0.blocks.1.attention.self.key.weight",
     "encoder.layers.0.blocks.1.attention.k_proj.weight"),
    ("segformer", "segformer.encoder.block.1.0.mlp.dense2.weight", "segformer.stages.1.blocks.0.mlp.fc2.weight"),
    ("detr", "model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.mlp.fc1.weight"),
    ("gpt_neox", "embed_out.weight", "lm_head.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
    ("phimoe", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight"),
    ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight",
     "model.layers.0.block_sparse_moe.experts.gate_up_proj"),
    ("granitemoe", "model.layers.0.block_sparse_moe.router.layer.weight",
     "model.layers.0.block_sparse_moe.router.weight"),
    ("nemotron_h", "backbone.layers.0.mixer.in_proj.weight", "model.layers.0.mixer.in_proj.weight"),
    ("nomic_bert", "encoder.layers.0.mlp.fc11.weight", "layers.0.mlp.up_proj.weight"),
    ("kimi_k25", "vision_tower.encoder.blocks.0.mlp.fc0.weight", "model.vision_tower.layers.0.mlp.fc1.weight"),
    ("llama", "model.layers.0.self_attn.o_proj.weight", "transformer.h.0.attn.proj.weight"),
    ("llama", "model.layers.0.mlp.down_proj.weight", "decoder.layers.0.mlp.linear_fc2.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "disk", "memory"), RENAMED)
def test_names_on_disk_and_in_memory_are_one(model_type: str, disk: str, memory: str) -> None:
    shape = (EXPERTS, 2 * INNER, HIDDEN) if "input_linear" in disk else (4, 4)
    for base, asked in ((disk, memory), (memory, disk)):
        assert names_of({base: shape}, model_type=model_type).find(asked) == base


def test_index_shift_takes_the_whole_path_to_tell() -> None:
    stored = [f"vision_tower.encoder.blocks.0.mlp.fc{i}.weight" for i in (0, 1)]
    names = names_of(dict.fromkeys(stored, (4, 4)), model_type="kimi_k25")
    assert names.find("vision_tower.encoder.blocks.0.mlp.fc1.weight") == stored[1]
    assert names.find("model.vision_tower.layers.0.mlp.fc1.weight") == stored[0]


# --- rows -----------------------------------------------------------------------------------------


def test_selecting_and_joining_rows_undo_one_another() -> None:
    whole = whole_view("w", (12, 3))
    flat = {"w": torch.arange(36.0)}
    runs = [(Take(1, 6, 2),), (Take(0, 7, 6), Take(7, 9)), (Take(2, 5, 2), Take(9, 12))]
    pieces = [select(whole, r) for r in runs]
    rows = [[i for take in r for i in range(*take)] for r in runs]
    for piece, expected in zip(pieces, rows, strict=True):
        assert torch.equal(gather(piece, flat), flat["w"].view(12, 3)[expected])
    assert torch.equal(gather(join(pieces, runs), flat), flat["w"].view(12, 3))


@pytest.mark.parametrize(("heights", "groups"), [((6, 3), 3), ((4, 4), 4), ((8, 2, 2), 2), ((5, 7), 1)])
def test_arranged_parts_cover_every_row_once(heights: tuple[int, ...], groups: int) -> None:
    rows = [i for runs in arranged(heights, groups) for take in runs for i in range(*take)]
    assert sorted(rows) == list(range(sum(heights)))
    assert [sum(len(t) for t in runs) for runs in arranged(heights, groups)] == list(heights)


def test_selection_from_a_selection_and_from_columns() -> None:
    matrix = torch.arange(60.0).view(6, 10)
    turned = transposed(whole_view("w", (6, 10)))
    got = gather(select(select(turned, (Take(0, 10, 3),)), (Take(1, 4, 2),)), {"w": matrix.reshape(-1)})
    assert torch.equal(got, matrix.T[[3, 9]])
    pairs = halves_of_pairs(6, 1)
    assert torch.equal(
        gather(select(whole_view("w", (6, 10)), pairs), {"w": matrix.reshape(-1)}), matrix[[0, 2, 4, 1, 3, 5]]
    )


def test_neighbouring_pieces_become_one_part() -> None:
    view = select(whole_view("w", (6, 2)), (Take(3, 6), Take(0, 3)))
    assert view == View((6, 2), (Part("w", Place(0, 6, 2, 0, 2), False, (Take(3, 6), Take(0, 3))),))
