"""Merges an adapter into a model that is already in memory.

python examples/merge_state_dict.py BASE.safetensors ADAPTER
"""

import sys

from safetensors.torch import load_file

import loramerge as lm


def main(base: str, adapter: str) -> None:
    tensors = load_file(base)
    merged = lm.merge_tensors(tensors, {adapter: 1.0})
    changed = [name for name in merged if merged[name] is not tensors.get(name)]
    print(f"{len(changed)} of {len(merged)} tensors changed, for example {changed[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
