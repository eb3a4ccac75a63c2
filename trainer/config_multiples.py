"""Of what the products that a run asks for take multiples in width; read before the shape itself is checked."""

from typing import Any

from pydantic import ValidationError

from stepline.trainer.config import PrecisionConfig, SparseConfig


def product_multiples(precision: PrecisionConfig, sparse: SparseConfig) -> tuple[int, int]:
    """Of what products take multiples: in the widths that layers read, and in that of attention's keys."""
    forced = sparse.force or sparse.forward == "sparse"
    if precision.fp8:
        layers = 32 if forced and sparse.mode == "s-ste" else 16
        return layers, layers
    return 4 if sparse.mode == "s-ste" else 1, 1


def multiples_of(tree: dict[str, Any]) -> tuple[int, int]:
    """As `product_multiples`, of sections that are not checked; 1 where they are wrong, which is said of them."""
    try:
        precision = PrecisionConfig.model_validate(tree.get("precision", {}))
        sparse = SparseConfig.model_validate(tree.get("sparse", {}))
    except ValidationError:
        return 1, 1
    return product_multiples(precision, sparse)
