"""Layers that cannot be 2:4 sparse or multiplied in FP8, before the first step. Imports no torch."""

from stepline.models.config import nearest_multiple
from stepline.trainer.config import Config
from stepline.trainer.config_multiples import product_multiples
from stepline.trainer.errors import UserError


def check_products(config: Config) -> None:
    """Raises UserError for layers that cannot be 2:4 sparse or multiplied in FP8."""
    model, sparse, fp8 = config.model, config.sparse.mode == "s-ste", config.precision.fp8
    ignored = [
        key
        for key, set_ in (
            ("forward", config.sparse.forward != "auto"),
            ("force", config.sparse.force),
            ("grad_weight", config.sparse.grad_weight == "mvue"),
            ("dense_fraction", config.sparse.dense_fraction > 0),
        )
        if set_
    ]
    if ignored and not sparse:
        raise UserError(f"sparse.{ignored[0]} needs sparse layers; set sparse.mode to s-ste, or leave it out")
    if model.ffn == "moe" and config.sparse.grad_weight == "mvue":
        raise UserError(
            "sparse.grad_weight=mvue is not made for experts, whose products are grouped; set it to dense"
        )
    if fp8 and config.precision.compute == "fp64":
        raise UserError(
            "precision.fp8 rounds to 8 bits, which fp64 is not for; set precision.compute to bf16 or fp32"
        )
    if config.precision.fp8_scales == "row":
        check_row_scales(fp8, sparse)
    forced = check_forward(config)
    multiple, of_keys = product_multiples(config.precision, config.sparse)
    kind = "2:4 sparse FP8 products" if forced else "FP8 products" if fp8 else "2:4 sparse layers"
    # what is refused: key, its value, and the width that it gives
    widths = [
        ("hidden_size", model.hidden_size, "layers", model.inner_size),
        ("ffn_size", model.ffn_size, "layers", model.ffn_size),
    ]
    if model.ffn == "moe" and model.moe.shared_size:
        widths.append(("moe.shared_size", model.moe.shared_size, "layers", model.moe.shared_size))
    if fp8:
        name = "hidden_size" if model.head_dim is None else "head_dim"
        widths.append((name, getattr(model, name), "attention's keys", model.dim_per_head * model.kv_heads))
    units = {"moe.shared_size": multiple} | model.units(multiple, of_keys)
    for name, value, what, width in widths:
        if width % multiple:
            key = "width" if value == width else name
            raise UserError(
                f"model.{name} gives {what} a width of {width}, and {kind} take multiples of {multiple}; the nearest "
                f"{key}: {nearest_multiple(value, units[name])}"
            )


def check_row_scales(fp8: bool, sparse: bool) -> None:
    """Raises UserError where precision.fp8_scales=row has no product that takes them."""
    if not fp8:
        raise UserError("precision.fp8_scales=row scales FP8; set precision.fp8=true, or leave it out")
    if sparse:
        raise UserError(
            "precision.fp8_scales=row is for dense layers, as 2:4 sparse products take one scale for all tokens; set "
            "it to tensor, or sparse.mode to none"
        )


def check_forward(config: Config) -> bool:
    """Whether products are to be sparse whatever is faster; raises UserError where settings contradict that."""
    sparse, asked = config.sparse, "sparse.force=true" if config.sparse.force else "sparse.forward=sparse"
    if sparse.force and sparse.forward == "dense":
        raise UserError("sparse.force=true contradicts sparse.forward=dense; leave one of them out")
    forced = sparse.force or sparse.forward == "sparse"
    if forced and not config.precision.fp8:
        raise UserError(f"{asked} is made for FP8; set precision.fp8=true, or leave it out")
    if forced and config.model.ffn == "moe" and not config.model.moe.shared_size:
        raise UserError(
            f"{asked} has no layer to work on: no grouped 2:4 product exists for experts; leave it out"
        )
    return forced
