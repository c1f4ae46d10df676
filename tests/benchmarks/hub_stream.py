"""How long a merge straight from a Hub takes beside a download and a merge from disk, from a Hub on loopback.

    python tests/benchmarks/hub_stream.py --gb 1 --runs 3 --directory DIR

The ways take turns. Exits with 1 where streaming is slower than the faster of the others (median over median) or holds
more memory than the limit. Needs what merge_speed.py needs. See the README beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from merge_speed import Run, make_inputs, measure

LIMIT = 700e6
SERVER = Path(__file__).parents[1] / "hub" / "server.py"
SNAPSHOT = "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1])"
BASE = "hf://bench/base"


def together(*runs: Run) -> Run:
    """Several processes one after the other."""
    return Run(sum(r.wall for r in runs), sum(r.cpu for r in runs), max(r.peak_bytes for r in runs))


def run_way(way: str, adapter: Path, work: Path) -> Run:
    """One way from the Hub to a merged model in `work/out`."""
    log, tool = work / "log", [sys.executable, "-m", "loramerge"]
    merge = [*tool, "merge", "-q", "-o", str(work / "out")]
    if way == "stream":
        return measure([*merge, BASE, str(adapter)], log)
    if way == "pull -o, merge":
        pulled = measure([*tool, "pull", "-q", BASE, "-o", str(work / "base")], log)
        return together(pulled, measure([*merge, str(work / "base"), str(adapter)], log))
    if way == "pull, merge":
        pulled = measure([*tool, "pull", "-q", BASE], log)
        return together(pulled, measure([*merge, BASE, str(adapter)], log))
    # The client alone, which compares no digest: what people do without this tool.
    pulled = measure([sys.executable, "-c", SNAPSHOT, BASE.removeprefix("hf://")], log)
    snapshot = next((work / "home" / "hub").glob("models--bench--base/snapshots/*"))
    return together(pulled, measure([*merge, str(snapshot), str(adapter)], log))


WAYS = ("stream", "pull -o, merge", "pull, merge", "client, merge")


def environment(home: Path, endpoint: str) -> Mapping[str, str]:
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.directory.mkdir(parents=True, exist_ok=True)
    base, adapter = make_inputs(chosen.directory, chosen.gb)
    work, store = chosen.directory / "hub-work", chosen.directory / "hub-store"
    shutil.rmtree(store, ignore_errors=True)
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(store), f"{BASE.removeprefix('hf://')}={base}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    os.environ |= environment(work / "home", server.stdout.readline().strip())
    found: dict[str, list[Run]] = {way: [] for way in chosen.ways}
    try:
        for _ in range(chosen.runs):
            for way in chosen.ways:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                os.sync()
                found[way].append(run_way(way, adapter, work))
    finally:
        server.stdin.close()
        server.wait()
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
    return report(found, chosen.gb, chosen.json)


def report(found: Mapping[str, list[Run]], gigabytes: float, to: Path | None) -> int:
    """Prints the table. 1 where a limit is not held."""
    medians = {way: statistics.median(r.wall for r in runs) for way, runs in found.items()}
    mine = medians["stream"]
    print(f"{gigabytes:g} GB, median of {len(found['stream'])}\n")
    print("| way | wall s | ratio of streaming to it | CPU s | peak RSS MB |")
    print("| --- | --- | --- | --- | --- |")
    for way, runs in found.items():
        cpu, peak = statistics.median(r.cpu for r in runs), max(r.peak_bytes for r in runs)
        print(f"| {way} | {medians[way]:.2f} | {mine / medians[way]:.2f} | {cpu:.2f} | {peak / 1e6:.0f} |")
    peak = max(r.peak_bytes for r in found["stream"])
    ratio = mine / min((m for way, m in medians.items() if way != "stream"), default=mine)
    if to is not None:
        rows = {way: [vars(r) for r in runs] for way, runs in found.items()}
        to.write_text(json.dumps({"gb": gigabytes, "ratio": ratio, "peak_bytes": peak, "runs": rows}, indent=1))
    print(f"\nstreaming / fastest other: {ratio:.2f} (limit 1.00); peak {peak / 1e6:.0f} MB (limit {LIMIT / 1e6:.0f})")
    return int(ratio > 1.0 or peak > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
