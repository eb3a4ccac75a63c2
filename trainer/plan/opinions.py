"""What other laws say to a plan's N and D, and the loss that one may expect. Imports nothing heavy."""

from dataclasses import dataclass

from stepline.trainer.plan.expect import own_loss_law, unlike
from stepline.trainer.plan.laws import DEEPSEEK, EPOCH, PORIAN, POWER_LINES, STEP_LAW, LossLaw
from stepline.trainer.plan.planner import Plan
from stepline.trainer.plan.power_law import Source


@dataclass(frozen=True)
class Opinion:
    """Of one law."""

    name: str
    """As in the keys of `second_opinion`."""
    lr: float | None
    batch_tokens: float
    extrapolated: bool
    """Whether the run is outside of what that law was fitted on, as far as it tells."""


def opinions(plan: Plan) -> list[Opinion]:
    """What the other laws say to the same N and D; Step Law itself where the plan's law is a fitted one."""
    i = plan.inputs
    n, d = i.params, i.tokens
    active = i.active_params or n

    def far(source: Source) -> bool:
        return bool(source.outside(n, d, active))

    said = [
        Opinion("power_lines", None, POWER_LINES.batch_tokens(d), far(POWER_LINES.source)),
        Opinion("deepseek", DEEPSEEK.lr(active, d), DEEPSEEK.batch_tokens(active, d), far(DEEPSEEK.source)),
        Opinion("porian", PORIAN.lr(n), PORIAN.batch_tokens(n), far(PORIAN.source)),
    ]
    if plan.law is not STEP_LAW:
        said.append(Opinion("step_law", STEP_LAW.lr(n, d), STEP_LAW.batch_tokens(d), far(STEP_LAW.source)))
    return said


def second_opinion(plan: Plan) -> dict[str, float]:
    """`opinions` by `deepseek_lr`, `deepseek_batch_tokens` and so on."""
    said = {}
    for other in opinions(plan):
        if other.lr is not None:
            said[f"{other.name}_lr"] = other.lr
        said[f"{other.name}_batch_tokens"] = other.batch_tokens
    return said


def usable_loss_law(plan: Plan) -> LossLaw | None:
    """The law's own where it is of such runs; Epoch's where it has none at all."""
    return EPOCH if plan.law.loss_law is None else own_loss_law(plan.law, plan.inputs)


def expected_loss_of(plan: Plan) -> str:
    """Whose loss law it is and what it may be used for, or why there is none."""
    law = usable_loss_law(plan)
    if law is None:
        return f"{plan.law.source.name} was fitted with {' and '.join(unlike(plan.law, plan.inputs))}"
    if law is EPOCH:
        dense = "; of dense models only, here at all weights of the mixture" if plan.inputs.mixture else ""
        return f"{EPOCH.source.name} ({EPOCH.source.paper}); its intercept is that of its own corpus{dense}"
    return f"{law.source.name} ({law.source.paper}): {law.equation}"


def expected_loss_text(plan: Plan) -> str:
    """The loss, or why there is none, for the screen."""
    law, i = usable_loss_law(plan), plan.inputs
    if law is None:
        return f"no expected loss: {expected_loss_of(plan)}"
    told, beyond = law.equation, ""
    if law is EPOCH:
        told = "for ranking, not a prediction for your data"
        told += ", and of dense models only" if i.mixture else ""
    elif plan.law.source.outside(i.params, i.tokens, i.active_params):
        beyond = ", extrapolated"
    return f"expected loss {law.loss(i.params, i.tokens):.4f} by {law.source.name}{beyond}: {told}"
