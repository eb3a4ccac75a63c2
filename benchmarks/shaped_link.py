"""Two "nodes" on one machine, with a link between them whose bandwidth is set. Needs root and iproute2."""

import os
import subprocess
import sys

NODES = ("node0", "node1")


class Link:
    """Two namespaces joined by a bridge; a context manager that leaves nothing behind."""

    def __enter__(self) -> "Link":
        if os.geteuid() != 0:
            sys.exit("this benchmark makes network namespaces, which needs root: run it as root")
        self.__exit__()
        self._ip("link add steplink type bridge", "link set steplink up")
        self.nodes = []
        for i, node in enumerate(NODES):
            inside, outside, address = f"veth-{node}", f"br-{node}", f"10.77.0.{i + 1}"
            self._ip(
                f"netns add {node}", f"link add {inside} type veth peer name {outside}",
                f"link set {inside} netns {node}", f"link set {outside} master steplink", f"link set {outside} up",
                f"-n {node} addr add {address}/24 dev {inside}", f"-n {node} link set {inside} up",
                f"-n {node} link set lo up",
            )  # fmt: skip
            self.nodes.append((node, inside, address))
        return self

    def __exit__(self, *_: object) -> None:
        # a pair outlives its namespace while a process of a run that was killed is in there
        links = (*(f"br-{node}" for node in NODES), "steplink")
        for command in (*(f"netns del {node}" for node in NODES), *(f"link del {name}" for name in links)):
            subprocess.run(["ip", *command.split()], stderr=subprocess.DEVNULL, check=False)

    @staticmethod
    def _ip(*commands: str) -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)

    def shape(self, mbit: int | None) -> None:
        """Limits both directions; None: no limit."""
        for node, interface, _ in self.nodes:
            enter = ["ip", "netns", "exec", node, "tc", "qdisc"]
            subprocess.run([*enter, "del", "dev", interface, "root"], stderr=subprocess.DEVNULL, check=False)
            if mbit is not None:
                burst = "128kb" if mbit <= 1000 else "1280kb"
                limit = f"add dev {interface} root tbf rate {mbit}mbit burst {burst} latency 200ms"
                subprocess.run([*enter, *limit.split()], check=True)

    def counters(self) -> dict[str, int]:
        """Bytes that the first node's interface has sent and received, and those on its loopback."""
        node, interface, _ = self.nodes[0]
        found = {}
        for name in (interface, "lo"):
            for way in ("tx", "rx"):
                file = f"/sys/class/net/{name}/statistics/{way}_bytes"
                out = subprocess.run(
                    ["ip", "netns", "exec", node, "cat", file], capture_output=True, check=True
                )
                found["lo" if name == "lo" else way] = int(out.stdout)
        return found
