"""Outbound network for sandboxes: a bridge, a veth pair and an address for each, NAT, and nothing between them.

    sandbox eth0 (10.231.0.7) -- wf... (isolated port) -- bridge wf0 (10.231.0.1) -- NAT -- the host's way out

Sandboxes reach what the host reaches, but not one another, not the host's own services (except its resolver, when
that is where names are looked up), and not 169.254.0.0/16, where clouds keep credentials.

Several daemons may share one bridge: every address is claimed by a locked file that the kernel lets go of when its
daemon dies. The rules live in a table of our own; it can drop, but it cannot overrule another table that drops. On a
host whose `FORWARD` policy is DROP (Docker sets it), allow the bridge there too:
`iptables -I DOCKER-USER -i wf0 -j ACCEPT; iptables -I DOCKER-USER -o wf0 -j ACCEPT`.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import random
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from woodfrog.errors import HostError, SandboxError
from woodfrog.linux.rtnetlink import add_pair

__all__ = ["Network", "NetworkLease", "Resolver", "nft_rules", "resolver"]

LEASES = Path("/run/woodfrog")
FORWARDING_WAS_OFF = "forwarding-was-off"
"""Made beside the leases when forwarding was turned on here: `make clean-machine` turns it off again."""
SYS_NET = Path("/sys/class/net")
LINK_GONE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Resolver:
    """What a sandbox's /etc/resolv.conf says, and the name servers in it."""

    text: str
    servers: tuple[str, ...]


def resolver(host_text: str, upstream_text: str | None, gateway: str) -> Resolver:
    """The sandbox's resolv.conf, from the host's.

    A server on the host's loopback (systemd-resolved's stub, dnsmasq) cannot be reached from inside: systemd-resolved's
    own list of upstreams replaces it, or else the host itself, at the bridge's address.
    """

    def read(text: str) -> tuple[list[str], list[str]]:
        servers, rest = [], []
        for line in text.splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[0] == "nameserver":
                with suppress(ValueError):
                    address = ipaddress.ip_address(fields[1].split("%")[0])
                    # There is no IPv6 inside.
                    if address.version == 4 and not address.is_loopback:
                        servers.append(str(address))
            elif fields and fields[0] in ("search", "domain", "options"):
                rest.append(" ".join(fields))
        return servers, rest

    servers, rest = read(host_text)
    if not servers and upstream_text is not None:
        servers, more = read(upstream_text)
        rest = more or rest
    if not servers:
        servers = [gateway]
    lines = [*(f"nameserver {s}" for s in servers), *rest]
    return Resolver("".join(f"{x}\n" for x in lines), tuple(servers))


def nft_rules(table: str, bridge: str, subnet: str, dns_servers: tuple[str, ...]) -> str:
    """The nftables script that (re)makes our table, in one transaction."""
    dns = "".join(
        f"    iifname {bridge} ip daddr {s} {p} dport 53 accept\n" for s in dns_servers for p in ("udp", "tcp")
    )
    return f"""\
add table ip {table}
delete table ip {table}
table ip {table} {{
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {subnet} oifname != "{bridge}" masquerade
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname {bridge} oifname {bridge} drop
    oifname {bridge} ct state established,related accept
    oifname {bridge} drop
    iifname {bridge} ip saddr != {subnet} drop
{dns}    iifname {bridge} ip daddr 169.254.0.0/16 drop
  }}
  chain input {{
    type filter hook input priority 0; policy accept;
    iifname {bridge} ct state established,related accept
{dns}    iifname {bridge} drop
  }}
}}
"""


async def _command(*argv: str, input: str) -> None:
    # Not a pipe: uvloop fails when the command ends before it has read all.
    stdin = os.memfd_create("input", os.MFD_CLOEXEC)
    try:
        os.write(stdin, input.encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=stdin, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
    except FileNotFoundError:
        package = {"ip": "iproute2", "nft": "nftables"}[argv[0]]
        raise HostError(
            f"network: no `{argv[0]}` on this host; install {package} (apt-get install {package})", code="network"
        ) from None
    finally:
        os.close(stdin)
    _, complaint = await process.communicate()
    if process.returncode:
        lines = [x.strip() for x in complaint.decode(errors="replace").splitlines() if x.strip()]
        raise HostError(f"network: `{' '.join(argv)}` failed: {'; '.join(lines) or process.returncode}", code="network")


class Network:
    """The bridge and its addresses. One per daemon; made on first use.

    Args:
        bridge: name of the bridge, at most 15 characters.
        subnet: IPv4 network of the sandboxes; the first address is the bridge's.
    """

    def __init__(self, bridge: str = "wf0", subnet: str = "10.231.0.0/16", *, leases: Path = LEASES) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,14}", bridge):
            raise HostError(f"network_bridge {bridge!r}: letters and digits only, at most 15", code="network")
        try:
            self.subnet = ipaddress.IPv4Network(subnet)
        except ValueError as e:
            raise HostError(f"network_subnet {subnet!r}: {e}", code="network") from None
        if self.subnet.num_addresses < 8:
            raise HostError(f"network_subnet {subnet}: too small; use a /29 or wider", code="network")
        if self.subnet.prefixlen < 8 or self.subnet.is_loopback or self.subnet.is_multicast:
            raise HostError(f"network_subnet {subnet}: no machine can have such addresses", code="network")
        self.bridge = bridge
        self.gateway = str(self.subnet[1])
        self.table = f"woodfrog_{bridge}"
        self.mtu = 1500
        self._leases = leases / bridge
        self._next = random.randrange(self.subnet.num_addresses)
        self._ready = False
        self._setup = asyncio.Lock()

    def resolver(self) -> Resolver:
        """What a sandbox's resolv.conf must say, from the host's files as they are now."""

        def read(path: str) -> str | None:
            with suppress(OSError):
                return Path(path).read_text(errors="replace")
            return None

        return resolver(read("/etc/resolv.conf") or "", read("/run/systemd/resolve/resolv.conf"), self.gateway)

    async def setup(self) -> None:
        """Make bridge and rules. Called by `lease`; safe to repeat, also by several daemons.

        Raises:
            HostError: what the host lacks, and the remedy.
        """
        async with self._setup:
            if self._ready:
                return
            self._leases.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._leases / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        await asyncio.sleep(0.02)
                await self._make()
            finally:
                os.close(lock)
            self._ready = True

    async def _make(self) -> None:
        self.mtu = _way_out_mtu()
        digest = sha256(self.bridge.encode()).hexdigest()
        # A fixed address: else it changes with the ports, and sandboxes lose their way to the gateway.
        mac = "02:" + ":".join(digest[i : i + 2] for i in range(0, 10, 2))
        if not (SYS_NET / self.bridge).exists():
            try:
                await _command("ip", "-batch", "-", input=f"link add {self.bridge} address {mac} type bridge\n")
            except HostError as e:
                raise HostError(
                    f"{e.message}. Needed: the bridge kernel module (modprobe bridge) and CAP_NET_ADMIN", code="network"
                ) from None
        with suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{self.bridge}/disable_ipv6").write_text("1")
        await _command(
            "ip", "-batch", "-",
            input=f"addr replace {self.gateway}/{self.subnet.prefixlen} dev {self.bridge}\nlink set {self.bridge} up\n",
        )  # fmt: skip
        try:
            await _command(
                "nft", "-f", "-",
                input=nft_rules(self.table, self.bridge, str(self.subnet), self.resolver().servers),
            )  # fmt: skip
        except HostError as e:
            raise HostError(
                f"{e.message}. Needed: nftables with NAT (kernel modules nf_tables, nft_masq)", code="network"
            ) from None
        forward = Path("/proc/sys/net/ipv4/ip_forward")
        if forward.read_text().strip() != "1":
            try:
                forward.write_text("1")
                (self._leases.parent / FORWARDING_WAS_OFF).touch()
            except OSError as e:
                raise HostError(
                    f"network: cannot turn on forwarding ({e.strerror}); run: sysctl -w net.ipv4.ip_forward=1",
                    code="network",
                ) from None

    def _claim(self) -> tuple[str, int, Path]:
        """An address nobody else holds, the descriptor that locks it, and its file."""
        count = self.subnet.num_addresses
        for _ in range(count):
            self._next = (self._next + 1) % count
            if self._next < 2 or self._next == count - 1:
                continue
            address = str(self.subnet[self._next])
            path = self._leases / address
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it may have removed the file between our open and our lock.
                if os.fstat(fd).st_ino == os.stat(path).st_ino:
                    return address, fd, path
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(fd)
        raise HostError(
            f"network: all {count - 3} addresses of {self.subnet} are in use; set WOODFROG_NETWORK_SUBNET wider",
            code="network",
        )

    async def lease(self, id: str) -> NetworkLease:
        """Claim an address for one sandbox.

        Raises:
            HostError: the host cannot do it, or no address is free.
        """
        await self.setup()
        try:
            address, fd, path = self._claim()
        except FileNotFoundError:  # the last sandbox of another daemon has just gone, and took all of it along
            self._ready = False
            await self.setup()
            address, fd, path = self._claim()
        link = "wf" + sha256(f"{self.bridge}/{address}/{id}".encode()).hexdigest()[:12]
        return NetworkLease(self, address, link, fd, path)

    async def teardown(self) -> None:
        """Remove bridge and rules, unless a sandbox of any daemon still uses them. Forwarding is left as it is."""
        async with self._setup:
            self._ready = False
            ports = SYS_NET / self.bridge / "brif"
            if not ports.exists() or any(ports.iterdir()):
                return
            await _command("ip", "-batch", "-", input=f"link del {self.bridge}\n")
            await _command("nft", "-f", "-", input=f"add table ip {self.table}\ndelete table ip {self.table}\n")
            shutil.rmtree(self._leases, ignore_errors=True)


def _way_out_mtu() -> int:
    """The MTU of the interface with the default route: larger packets would need fragments."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == "00000000":
                return int((SYS_NET / fields[0] / "mtu").read_text())
    return 1500


class NetworkLease:
    """One sandbox's address and device. From `Network.lease`; the sandbox it is given to destroys it."""

    def __init__(self, network: Network, address: str, link: str, fd: int, path: Path) -> None:
        self.address = address
        self.gateway = network.gateway
        self.prefix = network.subnet.prefixlen
        self.link = link
        """Name of the host's end of the pair."""
        self._network = network
        self._fd = fd
        self._path = path

    async def attach(self, init_pid: int) -> None:
        """Make the device pair, one end as `eth0` in the network namespace of that process."""
        network = self._network
        try:
            namespace = os.open(f"/proc/{init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            # In a thread: it may have to wait for namespaces that are being taken apart.
            await asyncio.to_thread(self._join, network.bridge, network.mtu, namespace)
        except OSError as e:
            # Somebody took the bridge away: it is made again for the next one.
            network._ready = False
            raise SandboxError(
                f"network: cannot connect {self.link} to {network.bridge}: {e.strerror or e}", code="network"
            ) from None

    def _join(self, bridge: str, mtu: int, namespace: int) -> None:
        try:
            add_pair(self.link, "eth0", mtu=mtu, bridge=bridge, namespace=namespace)
        finally:
            os.close(namespace)

    async def destroy(self) -> None:
        """Give the address back once the device is gone; it goes with the sandbox's network namespace."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + LINK_GONE_TIMEOUT_S
            pause = 0.001
            while (SYS_NET / self.link).exists():
                if loop.time() > deadline:
                    with suppress(HostError):
                        await _command("ip", "-batch", "-", input=f"link del {self.link}\n")
                    break
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.05)
        finally:
            with suppress(OSError):
                self._path.unlink()
            os.close(fd)
