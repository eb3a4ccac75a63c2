"""Rates of the data path on this machine: `stepline prepare` against raw sentencepiece, and the loader.

    python benchmarks/data.py [--workers K] [--copies C] [--rounds R] [--trained-mb 30,300] [--json]

The corpus is the Python standard library's source without its tests, `--copies` times. *prepare* is the whole
call (finding files, starting K workers, tokenising, hashing, writing, joining shards) with a given tokenizer;
*raw* is K processes that have the tokenizer and a fair share of the same documents in memory and do nothing
but `SentencePieceProcessor.encode`, timed from a common start to the last one's end. The two alternate;
medians of the rounds are compared. The loader's rate is tokens of `TrainLoader` batches (int64 inputs and
targets) consumed by one process, with prefetch, from the page cache. The memory of prepare's largest process is
compared between one copy of the corpus and all of them, and, where it trains a tokenizer of 32,000 tokens itself,
between sizes of generated text (`--trained-mb`): words of a made-up language by Zipf's law, and numbers.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

EXCLUDE = ["*/test/*", "*/tests/*", "*/idle_test/*", "*/site-packages/*", "*/dist-packages/*"]


def corpus(folder: Path, copies: int) -> list[Path]:
    """Copies of the standard library's readable source files under `folder`."""
    from stepline.trainer.data.discover import discover

    root = Path(sysconfig.get_paths()["stdlib"])
    files = [Path(f.path) for f in discover([root], EXCLUDE)[0] if f.path.endswith(".py")]
    made = []
    for copy in range(copies):
        for file in files:
            target = folder / str(copy) / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            # a first line of its own, so that the copies are different documents
            target.write_bytes(f"# copy {copy}\n".encode() + file.read_bytes())
            made.append(target)
    return made


def raw_worker(model: Path, files: list[Path], ready, begin, results) -> None:
    """Encode the documents of `files` once everyone is ready; report when that was done."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [file.read_bytes().decode() for file in files]
    ready.release()
    begin.wait()
    # one by one is its fastest way: a list of results of all texts costs memory
    tokens = sum(len(processor.encode(text, out_type=int)) for text in texts)
    results.put((time.monotonic(), tokens))


def raw_seconds(model: Path, files: list[Path], workers: int) -> tuple[float, int]:
    """Seconds and tokens of `workers` raw sentencepiece processes over the files, evenly shared."""
    context = multiprocessing.get_context("spawn")
    shares: list[list[Path]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for file in sorted(files, key=lambda f: -f.stat().st_size):
        lightest = loads.index(min(loads))
        shares[lightest].append(file)
        loads[lightest] += file.stat().st_size
    ready, begin, results = context.Semaphore(0), context.Event(), context.Queue()
    processes = [context.Process(target=raw_worker, args=(model, s, ready, begin, results)) for s in shares]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    start = time.monotonic()
    begin.set()
    ends = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return max(end for end, _ in ends) - start, sum(tokens for _, tokens in ends)


def prepare_rates(folder: Path, workers: int, copies: int, rounds: int, vocab_size: int) -> dict:
    """MB/s of prepare and of raw sentencepiece, alternating; leaves the prepared data in folder/data."""
    from stepline.trainer.data.prepare import prepare

    files = corpus(folder / "in", copies)
    size = sum(file.stat().st_size for file in files)
    data, times = folder / "data", {"prepare": [], "raw": []}
    prepare([folder / "in" / "0"], folder / "first", vocab_size=vocab_size, workers=workers, progress=False)
    model = folder / "first" / "tokenizer.model"
    for _ in range(rounds):
        shutil.rmtree(data, ignore_errors=True)
        start = time.monotonic()
        meta = prepare([folder / "in"], data, tokenizer=model, workers=workers, progress=False)
        times["prepare"].append(time.monotonic() - start)
        seconds, raw_tokens = raw_seconds(model, files, workers)
        times["raw"].append(seconds)
    rates = {name: size / 1e6 / statistics.median(seconds) for name, seconds in times.items()}
    return {
        "megabytes": size / 1e6,
        "workers": workers,
        "prepare_mb_per_s": rates["prepare"],
        "raw_mb_per_s": rates["raw"],
        "ratio": rates["prepare"] / rates["raw"],
        "seconds": times,
        "tokens": sum(split["tokens"] for split in meta["splits"].values()),
        "raw_tokens": raw_tokens,
    }


def made_up_text(path: Path, megabytes: float) -> Path:
    """Writes lines of 14 words and a number; a longer text has more rare words."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 5))) for _ in range(200_000)]
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
    left = megabytes * 1e6
    with path.open("w") as file:
        while left > 0:
            drawn = draw.choices(words, cum_weights=weights, k=14 * 1000)
            lines = (
                " ".join([*drawn[i : i + 14], str(draw.randint(0, 10**6))]) for i in range(0, 14_000, 14)
            )
            left -= file.write("\n".join(lines) + "\n")
    return path


def prepare_memory(inputs: Path, output: Path, model: Path | None, workers: int) -> float:
    """Largest resident memory of any process of one `stepline prepare`, in MB, measured in a process of its own.

    model: the tokenizer; None: a new one.
    """
    program = (
        "import resource, sys; from pathlib import Path; from stepline.trainer.data.prepare import prepare\n"
        "source, output = map(Path, sys.argv[1:3])\n"
        "model = Path(sys.argv[4]) if sys.argv[4:] else None\n"
        "prepare([source], output, tokenizer=model, workers=int(sys.argv[3]), progress=False)\n"
        "who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)\n"
        "print(max(resource.getrusage(w).ru_maxrss for w in who) / 1000)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        str(inputs),
        str(output),
        str(workers),
        *([model] if model else []),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loader_rate(data: Path, seq_len: int, batch_windows: int, seconds: float) -> float:
    """Million tokens/s through TrainLoader, everything touched by the consumer once."""
    from stepline.trainer.data.loader import TrainLoader

    loader = TrainLoader(
        [(data, 1.0)], seq_len=seq_len, batch_windows=batch_windows, micro_batch=8, prefetch=2
    )
    for _ in range(3):
        next(loader)
    tokens, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        tokens += next(loader).inputs.numel()
    rate = tokens / (time.monotonic() - start) / 1e6
    loader.close()
    return rate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=2.0, help="per loader measurement")
    parser.add_argument("--trained-mb", default="30,300", help="texts on which prepare trains a tokenizer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
        }
        result["prepare"] = prepare_rates(
            folder, options.workers, options.copies, options.rounds, options.vocab_size
        )
        model = folder / "first" / "tokenizer.model"
        result["prepare_peak_mb"] = {
            f"{copies} x the corpus": prepare_memory(
                source, folder / f"memory-{copies}", model, options.workers
            )
            for copies, source in ((1, folder / "in" / "0"), (options.copies, folder / "in"))
        }
        for size in options.trained_mb.split(","):
            text = made_up_text(folder / "made-up.txt", float(size))
            peak = prepare_memory(text, folder / f"trained-{size}", None, options.workers)
            result["prepare_peak_mb"][f"{size} MB, trained"] = peak
            shutil.rmtree(folder / f"trained-{size}")
        result["loader_mtokens_per_s"] = {
            f"seq {seq_len}, {windows} windows": loader_rate(
                folder / "data", seq_len, windows, options.seconds
            )
            for seq_len, windows in ((256, 8), (256, 64), (4096, 8), (4096, 64))
        }
    if options.json:
        print(json.dumps(result))
        return
    prepared = result["prepare"]
    print(result["machine"])
    print(f"corpus                  {prepared['megabytes']:8.1f} MB, {prepared['tokens'] / 1e6:.2f}M tokens")
    print(f"raw sentencepiece x {prepared['workers']}   {prepared['raw_mb_per_s']:8.2f} MB/s")
    print(f"stepline prepare x {prepared['workers']}    {prepared['prepare_mb_per_s']:8.2f} MB/s")
    print(f"ratio                   {prepared['ratio']:8.2f} (target 0.90)")
    for inputs, peak in result["prepare_peak_mb"].items():
        print(f"prepare's memory, {inputs:<15}{peak:9.0f} MB in its largest process")
    for shape, rate in result["loader_mtokens_per_s"].items():
        print(f"loader, {shape:<22}{rate:9.1f} M tokens/s (target 20)")


if __name__ == "__main__":
    main()
