"""Balanced clustering at the paper's scale, beside k-means-constrained.

    python benchmarks/clustering.py                        # 1,309,312 rows of 1,024 into 4, 16 and 64 domains
    python benchmarks/clustering.py --rows 50000 --width 256 --domains 4 --peer-rows 10000     # in minutes

Rows are drawn around centres of unequal weight (three for a domain), of which every one is a mixture of others, taken
to unit length and written to a file; nothing is learned about real prompts here. For each number of domains: seconds,
the peak of the process's own memory (RssAnon; pages of the file belong to the system, which takes them back) and of all
that is resident, the sizes' difference. Then both cluster the same first rows (100,000 by default), k-means-constrained
from one start with its own settings but ours for tolerance, and the sums of squared distances to the domains' means are
compared: ratio, theirs by ours, above 0.99 is the aim. The peer runs as long as it takes: at 64 domains that is hours.
Disk: 4 * rows * width bytes (5.4 GB), removed at the end.
"""

import argparse
import json
import os
import platform
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import numpy as np

from lora_lexicon.domains.cluster import cluster
from lora_lexicon.domains.vectors import blocks, unit
from lora_lexicon.recipe import DomainsRecipe

PAPER_ROWS = 1_309_312  # of 3D-EX


class Peak:
    """The most memory, in GB, that this process held meanwhile: its own, and all that is resident."""

    def __enter__(self) -> "Peak":
        self.own, self.resident, self._over = 0.0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
            self.own = max(self.own, int(sizes["RssAnon"]) * 1024 / 1e9)
            self.resident = max(self.resident, int(sizes["VmRSS"]) * 1024 / 1e9)


def made(rows: int, width: int, kinds: int, folder: Path) -> np.ndarray:
    """(rows, width) float32 unit vectors as a memory map of a file without a name in `folder`."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(kinds, width)) + rng.normal(size=(kinds, kinds)) @ rng.normal(size=(kinds, width)) / 8
    weights = rng.dirichlet(np.ones(kinds))
    with TemporaryFile(dir=folder) as file:
        for part in blocks(rows, width):
            count = part.stop - part.start
            noise = 2 * rng.standard_normal((count, width), dtype=np.float32)
            file.write(unit(centres[rng.choice(kinds, count, p=weights)] + noise).data)
        file.flush()
        return np.asarray(np.memmap(file, np.float32, "r", shape=(rows, width)))


def inertia(vectors: np.ndarray, labels: np.ndarray) -> float:
    """The sum of the rows' squared distances to their domain's mean, in float64."""
    total = 0.0
    for i in range(int(labels.max()) + 1):
        own = vectors[labels == i].astype(np.float64)
        total += float(((own - own.mean(axis=0)) ** 2).sum())
    return total


def peer(vectors: np.ndarray, recipe: DomainsRecipe) -> np.ndarray:
    """k-means-constrained's labels, from one start."""
    from k_means_constrained import KMeansConstrained

    low, high = len(vectors) // recipe.domains, -(-len(vectors) // recipe.domains)
    model = cast(Any, KMeansConstrained)(
        recipe.domains, size_min=low, size_max=high, n_init=1, tol=recipe.tolerance, random_state=recipe.seed
    )
    return model.fit_predict(vectors)


def timed(name: str, make: Any, vectors: np.ndarray, recipe: DomainsRecipe) -> tuple[dict[str, Any], np.ndarray]:
    with Peak() as peak:
        start = time.perf_counter()
        labels = make(vectors, recipe)
        seconds = time.perf_counter() - start
    sizes = np.bincount(labels, minlength=recipe.domains)
    row = {
        "who": name, "rows": len(vectors), "domains": recipe.domains, "seconds": round(seconds, 1),
        "own_gb": round(peak.own, 2), "resident_gb": round(peak.resident, 2),
        "sizes_differ_by": int(sizes.max() - sizes.min()),
    }  # fmt: skip
    return row, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=PAPER_ROWS)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--domains", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--peer-rows", type=int, default=100_000, help="rows that both cluster; 0: no peer")
    parser.add_argument("--peer-domains", type=int, nargs="+", default=[4], help="into how many")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the vectors' file lies meanwhile")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    vectors = made(options.rows, options.width, 3 * max(options.domains), options.folder)
    recipe, rows, ratios = DomainsRecipe(), [], {}
    for count in options.domains:
        row, _ = timed("lora-lexicon", cluster, vectors, replace(recipe, domains=count))
        rows.append(row)
        print(row, flush=True)
    some = np.array(vectors[: options.peer_rows])
    for count in options.peer_domains if options.peer_rows else ():
        wanted, sums = replace(recipe, domains=count), {}
        for name, make in (("lora-lexicon", cluster), ("k-means-constrained", peer)):
            row, labels = timed(name, make, some, wanted)
            sums[name] = row["inertia"] = inertia(some, labels)
            rows.append(row)
            print(row, flush=True)
        ratios[count] = sums["k-means-constrained"] / sums["lora-lexicon"]
        print(f"{count} domains of {len(some)} rows: inertia ratio {ratios[count]:.4f}", flush=True)
    result = {
        "claim": f"balanced clustering of {options.rows} x {options.width} into {options.domains[-1]} domains",
        "unit": "seconds",
        "ours": rows[len(options.domains) - 1]["seconds"],
        "peers": {f"k-means-constrained, {r['rows']} rows, {r['domains']} domains": r["seconds"]
                  for r in rows if r["who"] == "k-means-constrained"},
        "ratio": {f"inertia, {count} domains": ratio for count, ratio in ratios.items()},
        "rows": rows,
        "environment": {"cores": os.cpu_count(), "machine": platform.machine(), "numpy": np.__version__},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
