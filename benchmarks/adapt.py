"""Sparse fine-tuning beside full fine-tuning and LoRA: loss, time, memory and size of the file.

    pip install peft
    python benchmarks/adapt.py [--out docs/results/adapt.json] [--seeds 3]

A Transformer (`gpt:2x128`) learns the characters of Python's standard library, and is then
fine-tuned to another kind of text: the documentation that `help()` shows (`pydoc_data.topics`). All
adapters have the same number of trained parameters: those of LoRA of rank 4 beside the four linear
layers of each block. LoRA, and a fixed random mask once more, are those of PEFT; the fixed mask,
SET and RigL of rewire are differences made by `rewire.adapt`. The rate of each contender is chosen
from `RATES` on a part of the text for that, with seed 0 (and so were the steps between updates,
`EVERY`, in trials before); then each seed trains anew and is tested once. Topology, LoRA's first
values and the order of batches depend on the seed; the base is one.

Time is the CPU time of one thread, in turns, the median over rounds. Memory is measured in a
process for each contender, with a wider network (`gpt:4x512`, 12.6 million weights) and one sample
a batch, so that weights and what optimizers keep of them count: the most that the process grows by
while fine-tuning is set up and makes three steps, an update of the topology among them. A quarter
of an hour on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.app import data
from rewire.app.bench import machine
from rewire.app.data.stdlib import CHARACTERS, STEPS, encode
from rewire.app.models.sequences import GPT
from rewire.app.resident import Memory
from rewire.storage import tensors

RANK, LAYERS = 4, ("qkv", "out", "up", "down")
SIZE, WIDE = (2, 128), (4, 512)
BATCH, PRETRAIN, PRETRAIN_RATE = 8, 3000, 2e-3
FINETUNE = 250
EVERY = {"SET": 10, "RigL": 50}  # steps between updates, the last after three quarters
ADAPTERS = (1e-3, 3e-3, 1e-2, 3e-2)
RATES = {"full": (1e-4, 3e-4, 1e-3), "lora": ADAPTERS, "sparse": ADAPTERS}
CONTENDERS = {
    "full fine-tuning": "full",
    "LoRA (PEFT)": "lora",
    "fixed random mask (PEFT's SHiRA)": "sparse",
    "fixed random mask": "sparse",
    "SET": "sparse",
    "RigL": "sparse",
}


def network(size: tuple[int, int]) -> GPT:
    """A Transformer of so many blocks and numbers."""
    return GPT(STEPS, len(CHARACTERS), *size)


def texts() -> dict[str, Tensor]:
    """The text to be fine-tuned to, in samples of one character more than is read."""
    whole = encode("\n".join(topics[key] for key in sorted(topics)))
    samples = whole[: len(whole) // STEPS * STEPS].view(-1, STEPS)
    after = torch.cat([samples[1:, :1], samples[:1, :1]])  # the last sample's is never looked at
    samples = torch.cat([samples, after], 1)[:-1]
    parts = {"train": 0.8, "choose": 0.1, "test": 0.1}
    sizes = [int(share * len(samples)) for share in parts.values()]
    return dict(
        zip(parts, samples.split([*sizes[:-1], len(samples) - sum(sizes[:-1])]), strict=True)
    )


def loss_of(model: nn.Module, samples: Tensor) -> Tensor:
    """Mean cross-entropy of a character, in nats."""
    return F.cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())


@torch.no_grad()
def bits(model: nn.Module, samples: Tensor) -> float:
    """Bits per character."""
    model.eval()
    sums = [loss_of(model, part).item() * len(part) for part in samples.split(64)]
    model.train()
    return sum(sums) / len(samples) / math.log(2)


def batches(samples: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Random samples, the same for all contenders."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield samples[torch.randint(len(samples), (BATCH,), generator=generator)]


class Contender:
    """One way of fine-tuning a base: a step, what it has trained, and its file."""

    def __init__(
        self, name: str, base: nn.Module, rate: float, seed: int, every: int | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.name, self.model, self.method = name, base, None
        self.adapter: rewire.Adapter | None = None
        if "PEFT" in name:
            import peft
        if name.startswith("LoRA"):
            config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
            self.model = peft.get_peft_model(base, config)
        elif "PEFT" in name:
            config = peft.ShiraConfig(r=RANK, random_seed=seed, target_modules=list(LAYERS))
            self.model = peft.get_peft_model(base, config)
        elif name != "full fine-tuning":
            self.adapter = rewire.adapt(
                base,
                connections=trained_by_lora(base),
                only=[f"*.{layer}" for layer in LAYERS],
                generator=torch.Generator().manual_seed(seed),
            )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.Adam(trained, rate)
        if name in ("SET", "RigL"):
            self.method = rewire.methods.create(
                name.lower(),
                self.model,
                self.optimizer,
                every=every or EVERY[name],
                until=FINETUNE * 3 // 4,
                seed=seed,
            )

    def step(self, batch: Tensor) -> None:
        """One step of the optimizer and the method."""
        loss = loss_of(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.method is not None:
            self.method.step()

    def bytes(self) -> int:
        """Of the file that one would hand on."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter_model.safetensors"
            if self.adapter is not None:
                self.adapter.save(path)
            elif "PEFT" in self.name:
                self.model.save_pretrained(folder)  # type: ignore[operator]
            else:
                tensors.write(path, dict(self.model.state_dict()))
            return path.stat().st_size


def trained_by_lora(base: nn.Module) -> int:
    """Parameters of LoRA of rank `RANK`: rank times inputs and outputs of each layer."""
    chosen = (m for n, m in base.named_modules() if n.rpartition(".")[2] in LAYERS)
    return sum(RANK * sum(layer.weight.shape) for layer in chosen if isinstance(layer, nn.Linear))


# --- the parts ------------------------------------------------------------------------------------


def pretrained() -> tuple[GPT, float]:
    """The base, and its bits per character on text of its own kind."""
    torch.manual_seed(0)
    code = data.load("stdlib")
    samples = {
        part: torch.cat([x, y[:, -1:]], 1)
        for part, x, y in (
            ("train", code.train_x, code.train_y),
            ("test", code.test_x, code.test_y),
        )
    }
    model = network(SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN)
    for batch in batches(samples["train"], PRETRAIN, 0):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        schedule.step()
    return model, bits(model, samples["test"][:500])


def finetuned(
    name: str, base: nn.Module, parts: dict[str, Tensor], rate: float, seed: int
) -> Contender:
    """A contender at the end of fine-tuning."""
    contender = Contender(name, copy.deepcopy(base), rate, seed)
    for batch in batches(parts["train"], FINETUNE, seed):
        contender.step(batch)
    return contender


def losses(base: nn.Module, parts: dict[str, Tensor], seeds: int) -> dict[str, Any]:
    """What each contender reaches."""
    results = {}
    for name, kind in CONTENDERS.items():
        tried = {}
        for rate in RATES[kind]:
            tried[rate] = bits(finetuned(name, base, parts, rate, 0).model, parts["choose"])
        best = min(tried, key=tried.__getitem__)
        runs = []
        for seed in range(seeds):
            contender = finetuned(name, base, parts, best, seed)
            runs.append(bits(contender.model, parts["test"]))
        results[name] = {
            "trained": contender.trained,
            "rate": best,
            "chosen_from": {str(rate): found for rate, found in tried.items()},
            "bits": runs,
            "bytes": contender.bytes(),
        }
        print(name, results[name], flush=True)
    return results


def times(base: nn.Module, parts: dict[str, Tensor], rounds: int = 40) -> dict[str, float]:
    """Milliseconds of CPU time of a step, without updates of the topology, in turns."""
    batch = next(batches(parts["train"], 1, 0))
    contenders = {
        name: Contender(name, copy.deepcopy(base), 1e-4, 0, every=10_000) for name in CONTENDERS
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 3):
        for name, contender in contenders.items():
            start = time.thread_time()
            contender.step(batch)
            if number >= 3:
                taken[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(each) for name, each in taken.items()}


def memory_of(name: str) -> float:
    """MiB that this process grows by in fine-tuning of the wide network."""
    torch.manual_seed(0)
    base = network(WIDE)
    samples = torch.randint(len(CHARACTERS), (1, STEPS + 1))
    # What is loaded at the first use of anything is there before.
    small = Contender(name, network((1, 64)), 1e-4, 0, every=1)
    for _ in range(2):
        small.step(samples)
    with torch.no_grad():
        loss_of(base, samples)
    memory = Memory()
    memory.reset()
    before = memory.now()
    contender = Contender(name, base, 1e-4, 0, every=2)
    for _ in range(3):
        contender.step(samples)
    return (memory.peak() - before) / 2**20


def memories() -> dict[str, float]:
    """MiB of each contender, each in a process of its own."""
    found = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--memory", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.splitlines()[-1])
    return found


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| fine-tuning | trained | rate | bits a character | ms a step | memory, MiB | file, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in report["results"].items():
        mean, spread = statistics.mean(found["bits"]), statistics.stdev(found["bits"])
        lines.append(
            f"| {name} | {found['trained']:,} | {found['rate']:g} | {mean:.3f} ± {spread:.3f} | "
            f"{report['milliseconds'][name]:.0f} | {report['mebibytes'][name]:.0f} | "
            f"{found['bytes'] / 1024:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft")
    if options.memory:
        print(memory_of(options.memory))
        return
    base, own = pretrained()
    parts = texts()
    before = bits(base, parts["test"])
    print(
        f"base: {own:.3f} bits per character of its own kind, {before:.3f} of the other", flush=True
    )
    report = {
        "machine": machine.describe(None) | {"peft": metadata.version("peft")},
        "base": {"weights": sum(p.numel() for p in base.parameters()), "own": own, "other": before},
        "steps": FINETUNE,
        "every": EVERY,
        "results": losses(base, parts, options.seeds),
        "milliseconds": times(base, parts),
        "mebibytes": memories(),
    }
    print(table(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
