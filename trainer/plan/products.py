"""What the products of 2:4 sparse and of FP8 layers take beside their operands and results. Imports no torch.

Counted from models/linear_products.py, models/sparse_linear.py and the references of kernels/, which CPUs run operation
by operation.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Products:
    """Of linear layers `[tokens, reads]` to `[tokens, makes]`; compute, master: bytes of an element."""

    compute: int
    master: int
    sparse: bool = False
    mvue: bool = False
    fp8: bool = False
    row_scales: bool = False
    fused: bool = False
    """What is made for a moment alone has one tensor: its result."""

    def backward(self, tokens: int, reads: int, makes: int) -> int:
        """Most bytes of one layer's backward beside the gradient of its result, W's of FP8 among them."""
        x, grad, weight = tokens * reads, tokens * makes, reads * makes
        dx = x * self.compute
        if not self.fp8:
            made = max(self._sparse(weight), weight * self.compute + dx) if self.sparse else 0
            return max(made, dx + self._estimated(grad))
        if self.fused:  # the gradient in 8 bits, and what of the products' operands is transposed
            return dx + 2 * grad + x
        # with scales of rows it is scaled twice, for dW beside dX
        cast = (3 if self.row_scales else 2) * grad * self.master + (dx if self.row_scales else 0)
        product = (x + grad + weight) * self.master  # operands and result of dW, dX's are no more
        return max(cast, grad + dx + max(self._estimated(grad), product))

    def stacked_backward(self, rows: int, reads: int, makes: int, stack: int) -> int:
        """The same of experts' layers, whose weights are `stack` elements: W~, and the gradients of x and W, in parts
        and whole; in FP8 what is rounded is scaled and clipped, and becomes a number again."""
        if not (self.sparse or self.fp8):
            return 0
        made, rounded = self._sparse(stack) if self.sparse else 0, 0
        if self.fp8:
            kept = stack * self.compute if self.sparse else 0
            made = max(made, kept + 2 * stack * self.master)
            rounded = 2 * rows * makes * self.master
        x = rows * reads
        return max(made, rounded, (stack + x + max(x, 2 * stack)) * self.compute)

    def _sparse(self, elements: int) -> int:
        """beta S(W) while it is made (`sparse_weight`)."""
        if self.fused:
            return elements * self.compute
        # a quarter of thresholds, what is above them, what they take away, the difference and the result
        soft = elements * (9 * self.compute // 4 + 1)
        wide = 0 if self.compute == self.master else 2 * elements * self.master
        return max(soft, elements * self.compute + (wide or elements * self.compute))

    def _estimated(self, elements: int) -> int:
        """`mvue24` of so many: the gradient transposed, a quarter of random numbers, p, a / p, three of four ends of
        intervals, all beginnings and ends, -a / p, the result; and three masks. Outside of FP8 a padded copy too."""
        if not self.mvue:
            return 0
        padded = 0 if self.fp8 else self.compute
        return elements * (padded + (self.master if self.fused else 8 * self.master + 3))
