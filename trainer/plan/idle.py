"""Keys of a config that say nothing, because what they belong to is off. Imports no torch."""

from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins
from stepline.trainer.config_sync import DeMoConfig

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
    return notes + (_idle_of_demo(config.parallel.demo, origins) if config.parallel.sync == "demo" else [])


def _idle_of_demo(demo: DeMoConfig, origins: Origins) -> list[str]:
    idle = {
        "ahead": (
            demo.ahead and not demo.looks_ahead,
            "with parallel.demo.faithful"
            if demo.faithful
            else "without parallel.demo.delay=1 and parallel.demo.accumulate=updates",
        ),
        "density": (demo.kept is not None, "beside parallel.demo.kept"),
        "alpha": (demo.version == 1, "without parallel.demo.version=2"),
    }
    return [
        f"parallel.demo.{key} has no effect {why}"
        for key, (without, why) in idle.items()
        if without and origins.get(f"parallel.demo.{key}") == "override"
    ]
