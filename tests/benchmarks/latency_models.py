"""The models of latency.py: a GPT-2 of random weights with its adapters, in torch and as ONNX graphs."""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import helper, numpy_helper
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import loramerge as lm

HIDDEN, HEADS, VOCAB = 1024, 16, 50257
ALPHA = 32
# Bottlenecks of the paper's size, 11.09 million parameters in 24 layers.
LIN, HOULSBY = 224, 112
LORAS = {"unmerged r=4": 4, "unmerged r=16": 16}
BOTTLENECKS = {"adapter, 1 a layer (Lin)": LIN, "adapters, 2 a layer (Houlsby)": HOULSBY}
VARIANTS = ["base again", "merged r=4", *LORAS, *BOTTLENECKS]

Run = Callable[[int], None]


# Adapters in torch


class Bottleneck(nn.Module):
    """`x + relu(n(x) D) U`: n a LayerNorm in Lin et al. (2020), nothing in Houlsby et al. (2019)."""

    def __init__(self, size: int, norm: bool) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(HIDDEN) if norm else nn.Identity()
        self.down, self.up = nn.Linear(HIDDEN, size), nn.Linear(size, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.up(torch.relu(self.down(self.norm(x))))
        return result


class Then(nn.Module):
    """A module, and an adapter on what it returns."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapter(self.inner(*args, **kwargs))


def bottlenecks(variant: str, layers: int) -> list[list[Bottleneck]]:
    """The adapters of each layer, the same ones at each call."""
    torch.manual_seed(BOTTLENECKS[variant])
    count, norm = (1, True) if BOTTLENECKS[variant] == LIN else (2, False)
    return [[Bottleneck(BOTTLENECKS[variant], norm) for _ in range(count)] for _ in range(layers)]


def insert(model: Any, variant: str) -> None:
    """Houlsby: behind attention and behind the MLP, before each is added to the stream. Lin: behind the whole layer."""
    blocks = model.transformer.h
    for i, adapters in enumerate(bottlenecks(variant, len(blocks))):
        if len(adapters) == 1:
            blocks[i] = Then(blocks[i], adapters[0])
        else:
            blocks[i].attn.c_proj = Then(blocks[i].attn.c_proj, adapters[0])
            blocks[i].mlp.c_proj = Then(blocks[i].mlp.c_proj, adapters[1])


# The same in an ONNX graph


class Branches:
    """New nodes for an exported graph; its weights stay in the file of data that it shares with the base."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path, load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.count = 0

    def constant(self, values: Any) -> str:
        self.count += 1
        array = np.ascontiguousarray(np.asarray(values, np.float32))
        self.model.graph.initializer.append(numpy_helper.from_array(array, f"adapter_{self.count}"))
        return f"adapter_{self.count}"

    def reader(self, name: str) -> onnx.NodeProto:
        """The first node that reads a weight or another node's output."""
        found: onnx.NodeProto = next(node for node in self.nodes if name in node.input)
        return found

    def behind(self, node: onnx.NodeProto, make: Callable[[str], tuple[list[onnx.NodeProto], str]]) -> None:
        """Puts what `make` makes of a node's output between it and all who read it."""
        name = node.output[0]
        node.output[0] = f"{name}_bare"
        nodes, last = make(node.output[0])
        nodes[-1].output[list(nodes[-1].output).index(last)] = name
        at = next(i for i, other in enumerate(self.nodes) if other is node) + 1
        self.nodes[at:at] = nodes

    def op(self, kind: str, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
        self.count += 1
        return helper.make_node(kind, list(inputs), [f"branch_{self.count}"], f"branch_{self.count}", **attributes)

    def save(self, path: Path) -> None:
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        # Shapes that an exporter noted for values of the old graph are of no use to the new one.
        del self.model.graph.value_info[:]
        onnx.save(self.model, path)


def with_lora(source: Path, out: Path, factors: dict[str, torch.Tensor], layers: int, rank: int) -> None:
    """`y + (x A) B` beside each `c_attn`, alpha / r in B already: the cheapest way to write it."""
    graph = Branches(source)
    for i in range(layers):
        prefix = f"base_model.model.transformer.h.{i}.attn.c_attn"
        node = graph.reader(f"transformer.h.{i}.attn.c_attn.weight")
        A = graph.constant(factors[f"{prefix}.lora_A.weight"].T)
        B = graph.constant(ALPHA / rank * factors[f"{prefix}.lora_B.weight"].T)

        def make(y: str, x: str = node.input[0], A: str = A, B: str = B) -> tuple[list[onnx.NodeProto], str]:
            down = graph.op("MatMul", [x, A])
            up = graph.op("MatMul", [down.output[0], B])
            added = graph.op("Add", [y, up.output[0]])
            return [down, up, added], added.output[0]

        graph.behind(node, make)
    graph.save(out)


def with_bottlenecks(source: Path, out: Path, variant: str, layers: int) -> None:
    graph = Branches(source)

    def put(node: onnx.NodeProto, adapter: Bottleneck) -> None:
        def make(y: str) -> tuple[list[onnx.NodeProto], str]:
            nodes, x = [], y
            if isinstance(adapter.norm, nn.LayerNorm):
                gain, bias = (graph.constant(p.detach()) for p in (adapter.norm.weight, adapter.norm.bias))
                nodes.append(graph.op("LayerNormalization", [x, gain, bias], axis=-1, epsilon=adapter.norm.eps))
                x = nodes[-1].output[0]
            for linear in (adapter.down, adapter.up):
                nodes.append(graph.op("MatMul", [x, graph.constant(linear.weight.detach().T)]))
                nodes.append(graph.op("Add", [nodes[-1].output[0], graph.constant(linear.bias.detach())]))
                if linear is adapter.down:
                    nodes.append(graph.op("Relu", [nodes[-1].output[0]]))
                x = nodes[-1].output[0]
            nodes.append(graph.op("Add", [y, x]))
            return nodes, nodes[-1].output[0]

        graph.behind(node, make)

    for i, adapters in enumerate(bottlenecks(variant, layers)):
        end = graph.reader(f"transformer.h.{i}.mlp.c_proj.weight")
        if len(adapters) == 2:
            put(graph.reader(f"transformer.h.{i}.attn.c_proj.weight"), adapters[0])
            put(end, adapters[1])
        else:
            while end.op_type != "Add":  # back to three dimensions, then the residual stream
                end = graph.reader(end.output[0])
            put(end, adapters[0])
    graph.save(out)


# Making and loading


def quiet() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make(work: Path, layers: int, runtimes: Sequence[str]) -> None:
    """Writes base, LoRAs, merged models and graphs into `work`, what is there already excepted."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    base, graphs = work / "base", work / "onnx"
    if not base.exists():
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=layers, n_embd=HIDDEN, n_head=HEADS, vocab_size=VOCAB, architectures=["GPT2LMHeadModel"]
        )
        model: Any = GPT2LMHeadModel(config)
        model.save_pretrained(base)
        del model
    for variant, rank in LORAS.items():
        if not (work / variant).exists():
            lora = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["c_attn"], fan_in_fan_out=True)
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), lora)
            torch.manual_seed(rank)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(work / variant)
            del model
    gc.collect()
    if not (work / "merged r=4").exists():
        lm.merge(base, work / "unmerged r=4", work / "merged r=4")
    if "onnxruntime" not in runtimes:
        return
    if not graphs.exists():
        lm.export(base, graphs, verify=False)
    if not (work / "onnx merged").exists():
        (work / "onnx merged").mkdir()
        lm.merge(graphs / "model.onnx", work / "unmerged r=4", work / "onnx merged" / "model.onnx")
    for variant, rank in LORAS.items():
        factors = load_file(work / variant / "adapter_model.safetensors")
        with_lora(graphs / "model.onnx", graphs / f"{variant}.onnx", factors, layers, rank)
    for variant in BOTTLENECKS:
        with_bottlenecks(graphs / "model.onnx", graphs / f"{variant}.onnx", variant, layers)


def tokens(sequence: int) -> np.ndarray:
    return np.random.default_rng(sequence).integers(0, VOCAB, (1, sequence))


def load_torch(work: Path, variant: str, args: argparse.Namespace) -> tuple[Run, Callable[[int], np.ndarray]]:
    folder = work / ("merged r=4" if variant == "merged r=4" else "base")
    model: Any = GPT2LMHeadModel.from_pretrained(folder)
    if variant in LORAS:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(work / variant))
    elif variant in BOTTLENECKS:
        insert(model, variant)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():  # memory of its own, not the pages of a file
        parameter.data = parameter.data.to(args.device, copy=True)
    model.to(args.device)
    ids = {n: torch.from_numpy(tokens(n)).to(args.device) for n in args.sequences}

    @torch.inference_mode()
    def run(sequence: int) -> None:
        model(input_ids=ids[sequence])
        if args.device != "cpu":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def last(sequence: int) -> np.ndarray:
        logits: np.ndarray = model(input_ids=ids[sequence]).logits[0, -1].float().cpu().numpy()
        return logits

    return run, last


def load_onnxruntime(work: Path, variant: str, args: argparse.Namespace) -> tuple[Run, Callable[[int], np.ndarray]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    if args.threads:
        options.intra_op_num_threads = args.threads
    path = work / "onnx" / "model.onnx"
    if variant == "merged r=4":
        path = work / "onnx merged" / "model.onnx"
    elif variant in LORAS or variant in BOTTLENECKS:
        path = work / "onnx" / f"{variant}.onnx"
    provider = "CPUExecutionProvider" if args.device == "cpu" else "CUDAExecutionProvider"
    session = ort.InferenceSession(path, options, providers=[provider])
    if provider not in session.get_providers():
        raise SystemExit(f"onnxruntime has no {provider} here; use --runtimes torch")
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    bindings = {}
    for n in args.sequences:
        given = {"input_ids": tokens(n), "attention_mask": np.ones((1, n)), "position_ids": np.arange(n)[None]}
        binding = bindings[n] = session.io_binding()
        for value in session.get_inputs():
            array = given.get(value.name, np.zeros((1, HEADS, 0, HIDDEN // HEADS)))
            array = np.ascontiguousarray(array.astype(types[value.type]))
            binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(array, args.device, 0))
        for value in session.get_outputs():
            binding.bind_output(value.name, args.device)

    def run(sequence: int) -> None:
        session.run_with_iobinding(bindings[sequence])

    def last(sequence: int) -> np.ndarray:
        run(sequence)
        logits: np.ndarray = bindings[sequence].get_outputs()[0].numpy()[0, -1]
        return logits

    return run, last


LOAD = {"torch": load_torch, "onnxruntime": load_onnxruntime}
