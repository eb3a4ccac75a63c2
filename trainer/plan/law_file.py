"""law.json: a law fitted on a user's own runs (`stepline laws fit`), read with checks and written whole."""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from stepline.models.config import Section
from stepline.trainer.config_io import shipped_configs
from stepline.trainer.errors import UserError, nearest
from stepline.trainer.plan.laws import LossLaw, PowerLaw, Source, Spread, StepLaw


class FittedSpread(Section):
    """Mean and covariance of (ln value, exponents…) at `centre` (laws.Spread)."""

    centre: list[float]
    mean: list[float]
    covariance: list[list[float]]
    quantile: float = Field(gt=0)


class FittedPowerLaw(Section):
    """value = scale * product of argument_i ^ exponent_i."""

    scale: float = Field(gt=0)
    exponents: list[float]
    spread: FittedSpread | None = None

    def law(self) -> PowerLaw:
        """The frozen law."""
        spread = None
        if self.spread is not None:
            s = self.spread
            rows = tuple(tuple(row) for row in s.covariance)
            spread = Spread(tuple(s.centre), tuple(s.mean), rows, s.quantile)
        return PowerLaw(self.scale, tuple(self.exponents), spread)


class FittedLoss(Section):
    """Best loss of a run, E + A N^-alpha + B D^-beta, with its intercept fitted on the user's own runs."""

    entropy: float
    params_scale: float = Field(ge=0)
    params_exponent: float
    tokens_scale: float = Field(ge=0)
    tokens_exponent: float
    method: str = ""
    """What was fitted and what was kept, in words."""
    error_percent: float | None = None
    """Root mean square of the relative misses on the cells of the fit."""
    left_out_error_percent: float | None = None
    """The same for each cell by a fit of all the others; None for a single cell."""

    def law(self, source: Source) -> LossLaw:
        """The frozen law."""
        n, d = f"N^{self.params_exponent:.4g}", f"D^{self.tokens_exponent:.4g}"
        equation = f"L = {self.entropy:.4g} + {self.params_scale:.4g} / {n} + {self.tokens_scale:.4g} / {d}"
        numbers = (self.params_scale, self.params_exponent, self.tokens_scale, self.tokens_exponent)
        return LossLaw(source, self.entropy, *numbers, (), equation)


class LawFile(Section):
    """Content of law.json."""

    name: str
    optimizer: str = "adamw"
    sync: str = "all_reduce"
    assumes: str = ""
    """Schedule and fixed hyperparameters of the runs."""
    held_out: str = ""
    """What the losses were measured on: split and data (`expect.held_out_text`)."""
    lr: FittedPowerLaw
    """Peak learning rate from (N, D)."""
    batch_tokens: FittedPowerLaw
    """Global batch in tokens from D."""
    params: tuple[float, float]
    """Range of N of the runs."""
    tokens: tuple[float, float]
    tokens_per_param: tuple[float, float]
    method: str = ""
    """What was fitted and what was kept, in words."""
    notes: list[str] = Field(default_factory=list)
    """What the runs do not tell, each one sentence: optima on a grid's edge, cells that diverged."""
    cells: int = 0
    runs: int = 0
    diverged: int = 0
    loss: FittedLoss | None = None
    """Best loss from (N, D); None where the file has none."""

    def law(self) -> StepLaw:
        """The law that the planner uses."""
        source = Source(
            self.name,
            f"own fit: {self.runs} runs in {self.cells} cells",
            "N: non-embedding linear weights; D, batch: tokens",
            self.params,
            self.tokens,
            self.tokens_per_param,
        )
        return StepLaw(
            source,
            self.lr.law(),
            self.batch_tokens.law(),
            self.optimizer,
            self.sync,
            self.assumes or "own runs",
            None if self.loss is None else self.loss.law(source),
            self.held_out,
        )


def find_law(name: str | Path) -> Path:
    """A law file by path, or one that travels with the package by its name (configs/laws)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs() / "laws"
    candidate = shipped / f"{path.name.removesuffix('.json')}.json"
    if candidate.is_file():
        return candidate
    names = sorted(p.stem for p in shipped.glob("*.json"))
    raise UserError(f"no law file '{name}'{nearest(path.stem, names)}; make one with `stepline laws fit`")


def read_law(path: Path) -> StepLaw:
    """The law in a law.json; raises UserError with one sentence."""
    try:
        content = LawFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is no law of `stepline laws fit`: {where or 'it'}: {first['msg']}") from None
    if len(content.lr.exponents) != 2 or len(content.batch_tokens.exponents) != 1:
        raise UserError(f"{path} is no law of `stepline laws fit`: lr needs two exponents, batch_tokens one")
    return content.law()


def write_law(law: LawFile, path: Path) -> None:
    """Writes law.json whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(law.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
