"""The ledger of what a rank sends to, and receives from, other replicas."""

from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes over the links between replicas, as the synchroniser declares them; headers of the network are extra."""

    sent: int = 0
    received: int = 0
    steps: int = 0

    def add(self, sent: int, received: int) -> None:
        """One optimizer step's bytes."""
        self.sent += sent
        self.received += received
        self.steps += 1

    def lap(self) -> dict[str, float]:
        """`bytes_sent` and `bytes_received` of a step, the mean since the last lap."""
        steps = max(self.steps, 1)
        row = {"bytes_sent": self.sent / steps, "bytes_received": self.received / steps}
        self.sent = self.received = self.steps = 0
        return row


def ring_bytes(size: int, replicas: int) -> int:
    """Bytes that each rank sends, and as many that it receives, in an all-reduce of `size` bytes: 2 (R - 1) / R."""
    return 2 * size * (replicas - 1) // replicas
