"""CPU seconds of an extraction beside a thin SVD and beside the Gram matrix, of one matrix, in one process.

    python tests/benchmarks/extract_speed.py [--shapes 1024x2816 ...] [--ranks 16 64] [--spectra low-rank power noise]

One thread each. The SVD in fp32 is what most tools call; `gram` is the eigenvectors of the smaller Gram matrix in fp64,
the best exact way. Prints a Markdown table; `--json FILE` keeps every number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramerge.algebra.extract import extract

SHAPES = ("1024x2816", "2048x2048", "4096x4096")
SPECTRA = ("low-rank", "power", "noise")


def matrix(spectrum: str, m: int, n: int) -> Tensor:
    """Rank 16 in noise a tenth as large as its last singular values; singular values i^-0.7; noise alone."""
    g = torch.Generator().manual_seed(m * n)
    noise = torch.randn(m, n, generator=g)
    if spectrum == "low-rank":
        low = torch.randn(m, 16, generator=g) @ torch.randn(16, n, generator=g)
        noise = low + 0.05 * min(m, n) ** 0.5 * noise
    if spectrum == "power":
        k = min(m, n)
        left, right = (torch.linalg.qr(torch.randn(side, k, generator=g))[0] for side in (m, n))
        noise = (left * torch.arange(1, k + 1) ** -0.7) @ right.T
    return noise


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def gram(d: Tensor) -> tuple[Tensor, Tensor]:
    wide = d.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T if d.shape[0] <= d.shape[1] else wide.T @ wide)
    return values.flip(0).clamp(min=0), vectors


def measure(m: int, n: int, spectrum: str, ranks: list[int], with_svd: bool) -> list[dict[str, Any]]:
    d = matrix(spectrum, m, n)
    svd_s = cpu_seconds(lambda: torch.linalg.svd(d, full_matrices=False))[0] if with_svd else float("nan")
    gram_s, (values, _) = cpu_seconds(lambda: gram(d))
    rows = []
    for rank in ranks:
        runs = [cpu_seconds(partial(extract, d, rank, seed=1)) for _ in range(3)]
        ours_s, found = min(runs, key=lambda run: run[0])
        optimum = float(values[rank:].sum().sqrt())
        error = float(torch.linalg.matrix_norm(d.double() - found.B.double() @ found.A.double()))
        rows.append(
            {
                "shape": f"{m}x{n}",
                "spectrum": spectrum,
                "rank": rank,
                "svd_s": svd_s,
                "gram_s": gram_s,
                "ours_s": ours_s,
                "over_optimum": error / optimum,
                "certificate": found.certificate,
                "method": found.method,
                "depth": found.depth,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    parser.add_argument("--no-svd", action="store_true", help="leave out the slow one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    extract(torch.randn(300, 300), 4)
    print("| shape | spectrum | rank | ours s | SVD / ours | Gram / ours | error / optimum | certificate | how |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        m, n = map(int, shape.split("x"))
        for spectrum in options.spectra:
            for row in measure(m, n, spectrum, options.ranks, not options.no_svd):
                rows.append(row)
                print(
                    f"| {shape} | {spectrum} | {row['rank']} | {row['ours_s']:.3f} "
                    f"| {row['svd_s'] / row['ours_s']:.1f} | {row['gram_s'] / row['ours_s']:.1f} "
                    f"| {row['over_optimum']:.6f} | {row['certificate']:.6f} | {row['method']} {row['depth']} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
