"""Keys of a config that say nothing, because what they belong to is off. Imports no torch."""

from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins

BELONGS = {
    "model.moe.": ("model.ffn", "moe"),
    "model.revffn.": ("model.blocks", "revffn"),
    "model.coupling": ("model.blocks", "revffn"),
    "parallel.zero.": ("parallel.backend", "zero"),
    "parallel.deepspeed.": ("parallel.backend", "zero"),
    "parallel.demo.": ("parallel.sync", "demo"),
    "parallel.diloco.": ("parallel.sync", "diloco"),
    "parallel.random_k.": ("parallel.sync", "random_k"),
}
"""By the beginning of a key: the key and its value without which it has no effect."""


def untrained_router(config: Config) -> list[str]:
    """A sentence where a mixture's loss says nothing to its router: the one chosen expert's weight is then always 1."""
    moe = config.model.moe
    if config.model.ffn != "moe" or moe.top_k > 1 or not moe.renormalise:
        return []
    return [
        "with model.moe.top_k=1 and model.moe.renormalise every weight is 1, and the loss does not train the router; set "
        "model.moe.renormalise=false"
    ]


def idle_keys(config: Config, origins: Origins) -> list[str]:
    """A sentence for each key of the command line that has no effect."""
    notes = []
    for key, origin in origins.items():
        for start, (switch, value) in BELONGS.items():
            section, name = switch.split(".")
            if (
                origin == "override"
                and key.startswith(start)
                and getattr(getattr(config, section), name) != value
            ):
                notes.append(f"{key} has no effect without {switch}={value}")
    demo, key = config.parallel.demo, "parallel.demo.ahead"
    if config.parallel.sync == "demo" and origins.get(key) == "override" and demo.ahead and not demo.looks_ahead:
        notes.append(f"{key} has no effect without parallel.demo.delay=1 and parallel.demo.accumulate=updates")
    return notes
