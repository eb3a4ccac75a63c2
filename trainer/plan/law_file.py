"""law.json: a law fitted on a user's own runs (`stepline laws fit`), read with checks and written whole."""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from stepline.models.config import Section
from stepline.trainer.config_io import shipped_configs
from stepline.trainer.errors import UserError, nearest
from stepline.trainer.files import write_whole
from stepline.trainer.plan.laws import STEP_LAW, LossLaw, PowerLaw, Source, Spread, StepLaw

PUBLISHED = "step-law"
"""The name of the law that `stepline plan` uses by default."""
# Bounds no fit comes near: within them nothing overflows for any N and D that a plan accepts.
Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
Scale = Annotated[float, Field(gt=1e-30, le=1e30)]
Weight = Annotated[float, Field(ge=0, le=1e30)]
Exponent = Annotated[float, Field(ge=-10, le=10)]
Count = Annotated[float, Field(gt=0, le=1e30)]


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"the range goes from {limits[0]:g} down to {limits[1]:g}")
    return limits


Range = Annotated[tuple[Count, Count], AfterValidator(_ascending)]


class FittedSpread(Section):
    """Mean and covariance of (ln value, exponents…) at `centre` (laws.Spread)."""

    centre: list[Count]
    mean: list[Finite]
    covariance: list[list[Finite]]
    quantile: float = Field(gt=0, le=1e3)

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        size = len(self.centre) + 1
        if len(self.mean) != size:
            raise ValueError(f"mean has {len(self.mean)} numbers; centre asks for {size}")
        if [len(row) for row in self.covariance] != [size] * size:
            raise ValueError(f"covariance must have {size} rows of {size} numbers")
        if any(self.covariance[i][i] < 0 for i in range(size)):
            raise ValueError("covariance has a negative number on its diagonal")
        return self


class FittedPowerLaw(Section):
    """value = scale * product of argument_i ^ exponent_i."""

    scale: Scale
    exponents: list[Exponent]
    spread: FittedSpread | None = None

    @model_validator(mode="after")
    def _arguments(self) -> Self:
        if self.spread is not None and len(self.spread.centre) != len(self.exponents):
            raise ValueError(f"spread.centre must have {len(self.exponents)} numbers, one for each exponent")
        return self

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

    entropy: Finite
    params_scale: Weight
    params_exponent: Exponent
    tokens_scale: Weight
    tokens_exponent: Exponent
    method: str = ""
    """What was fitted and what was kept, in words."""
    error_percent: Finite | None = None
    """Root mean square of the relative misses on the cells of the fit."""
    left_out_error_percent: Finite | None = None
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    sync: str = "all_reduce"
    assumes: str = ""
    """Schedule and fixed hyperparameters of the runs."""
    held_out: str = ""
    """What the losses were measured on: split and data (`expect.held_out_text`)."""
    kind: str = ""
    """Of the models (`kind.kind_of`): `ffn=dense blocks=standard canon=none ...`; empty where that is not known."""
    lr: FittedPowerLaw
    """Peak learning rate from (N, D)."""
    batch_tokens: FittedPowerLaw
    """Global batch in tokens from D."""
    params: Range
    """Range of N of the runs."""
    tokens: Range
    tokens_per_param: Range
    method: str = ""
    """What was fitted and what was kept, in words."""
    notes: list[str] = Field(default_factory=list)
    """What the runs do not tell, each one sentence: optima on a grid's edge, cells that diverged."""
    cells: int = 0
    runs: int = 0
    diverged: int = 0
    loss: FittedLoss | None = None
    """Best loss from (N, D); None where the file has none."""

    @model_validator(mode="after")
    def _exponents(self) -> Self:
        if (len(self.lr.exponents), len(self.batch_tokens.exponents)) != (2, 1):
            raise ValueError("lr needs two exponents, batch_tokens one")
        return self

    def law(self) -> StepLaw:
        """The law that the planner uses."""
        source = Source(
            self.name,
            f"own fit: {self.runs} runs in {self.cells} cells",
            "N: non-embedding linear weights; D, batch: tokens",
            params=self.params,
            tokens=self.tokens,
            tokens_per_param=self.tokens_per_param,
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
            self.kind,
        )


def find_law(name: str | Path) -> Path:
    """A law file by path, or one that travels with the package by its name (configs/laws)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs() / "laws"
    candidate = shipped / f"{path.name.removesuffix('.json')}.json"
    if candidate.is_file() and len(path.parts) == 1:  # never for a path: it names another file
        return candidate
    names = sorted(p.stem for p in shipped.glob("*.json"))
    names.append(PUBLISHED)
    raise UserError(
        f"no law file '{name}'{nearest(path.stem, names)} (shipped: {', '.join(names)}); "
        "make one with `stepline laws fit`"
    )


def named_law(name: str | Path) -> StepLaw:
    """The law of a file or a shipped one, or the published Step Law by its name; raises UserError."""
    return STEP_LAW if str(name) == PUBLISHED else read_law(find_law(name))


def problem_of(error: ValidationError) -> str:
    """The first problem as `field: why`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    why = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{where}: {why}" if where else why


def read_law(path: Path) -> StepLaw:
    """The law in a law.json; raises UserError with one sentence."""
    try:
        content = LawFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path} is no law of `stepline laws fit`: {problem_of(error)}") from None
    return content.law()


def write_law(law: LawFile, path: Path) -> None:
    """Writes law.json whole or not at all."""
    write_whole(path, json.dumps(law.model_dump(mode="json"), indent=2, allow_nan=False) + "\n")
