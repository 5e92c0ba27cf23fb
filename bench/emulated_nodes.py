"""Two nodes on one Linux machine: network namespaces, a veth pair between them, bandwidth shaped by tc's token bucket.

Ranks in one namespace talk over its loopback, ranks in different ones over the shaped pair. Needs root and iproute2.
Bandwidth only: no latency is added.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
BURST = "16kb"  # what passes unshaped at once: small beside the megabytes that are timed
# A packet that is longer than the burst is cut by the shaper into 1448 bytes each, which takes half of two cores at
# 200 Mbit/s, where a NIC does that itself. Longer ones would also let one flow push aside the others.
PACKET_BYTES = "15000"
QUEUE = "256mb"  # nothing is dropped: neither does the fabric of a cluster
WINDOW, CWND = "4096 524288 524288", "360"  # bytes under way, and the same in packets of 1448 bytes
PORT = 29400


def why_not() -> str | None:
    """What this machine lacks, in a line; None when nodes can be emulated."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "emulated nodes need Linux and root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"emulated nodes need iproute2 ({', '.join(missing)} not found)"
    try:
        with TwoNodes():
            pass
    except RuntimeError as error:
        return str(error)
    return None


def shape_link(device: str, mbit_per_s: float) -> None:
    """From within a node: what leaves it from now on. 0: as fast as the machine copies."""
    subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], capture_output=True)
    if mbit_per_s:
        _tool("tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit_per_s}mbit", "burst", BURST, "limit", QUEUE)  # fmt: skip


class TwoNodes:
    """The namespaces, while the context lasts. Their names hold this process's id, so runs do not meet."""

    def __enter__(self) -> TwoNodes:
        tag = f"monde{os.getpid()}"
        self.names = [f"{tag}a", f"{tag}b"]
        self.devices = [f"mv{os.getpid()}a", f"mv{os.getpid()}b"]
        try:
            for name in self.names:
                _tool("ip", "netns", "add", name)
            (a, b), (dev_a, dev_b) = self.names, self.devices
            _tool("ip", "link", "add", dev_a, "netns", a, "type", "veth", "peer", "name", dev_b, "netns", b)
            for i, (name, device) in enumerate(zip(self.names, self.devices, strict=True)):
                _tool("ip", "-n", name, "addr", "add", f"10.88.0.{i + 1}/24", "dev", device)
                _tool("ip", "-n", name, "link", "set", device, "gso_max_size", PACKET_BYTES, "up")
                _tool("ip", "-n", name, "link", "set", "lo", "up")
                # TCP as calm as a fabric with credits: few bytes under way, no slow start after a pause, no late
                # acknowledgements. Otherwise messages of a megabyte wait 40 ms now and then.
                settings = {"tcp_wmem": WINDOW, "tcp_rmem": WINDOW, "tcp_slow_start_after_idle": "0"}
                for setting, value in settings.items():
                    _tool(
                        "ip",
                        "netns",
                        "exec",
                        name,
                        "sh",
                        "-c",
                        f"echo {value} > /proc/sys/net/ipv4/{setting}",
                    )
                _tool(
                    "ip",
                    "-n",
                    name,
                    "route",
                    "change",
                    "10.88.0.0/24",
                    "dev",
                    device,
                    "quickack",
                    "1",
                    "initcwnd",
                    CWND,
                    "initrwnd",
                    CWND,
                )
        except RuntimeError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def run(self, module: str, ranks_per_node: int, arguments: Sequence[str], deadline_s: float) -> None:
        """`python -m module arguments` as every rank, node after node. Errors: RuntimeError with a rank's last words.

        Ranks find torchrun's variables, MONDE_NODE_DEVICE with the name of the link and one thread each.
        """
        world = 2 * ranks_per_node
        processes = []
        for rank in range(world):
            node = rank // ranks_per_node
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank % ranks_per_node),
                "LOCAL_WORLD_SIZE": str(ranks_per_node),
                "MASTER_ADDR": "10.88.0.1",
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": self.devices[node],
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", self.names[node], sys.executable, "-m", module, *arguments]
            processes.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            )
        end = time.monotonic() + deadline_s
        try:
            for rank, process in enumerate(processes):
                _, errors = process.communicate(timeout=max(end - time.monotonic(), 0.1))
                if process.returncode:
                    last = errors.strip().splitlines()[-1:] or ["no message"]
                    raise RuntimeError(f"rank {rank} ended with {process.returncode}: {last[0]}")
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ranks did not end within {deadline_s:g} s") from None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
