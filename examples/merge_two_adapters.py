"""Merges two adapters into a checkpoint, verifies the result, and shows what rounding kept.

python examples/merge_two_adapters.py BASE ADAPTER ADAPTER OUT
"""

import sys

import loramerge as lm


def main(base: str, first: str, second: str, out: str) -> None:
    receipt = lm.merge(base, {first: 0.7, second: 0.3}, out)
    print(f"{receipt.counts['changed']} tensors changed, {receipt.counts['copied']} copied")
    print(f"retention {receipt.retention:.4f}, least {receipt.least_retention}")
    report = lm.verify(out, base=base)
    print("verified" if report["ok"] else f"differs: {report['differ']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
