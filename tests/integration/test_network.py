from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from integration.sandboxes import Yard, python
from woodfrog.errors import HostError
from woodfrog.linux.network import Network, nft_rules, resolver
from woodfrog.linux.rtnetlink import add_pair


@pytest.fixture
async def yard() -> AsyncIterator[Yard]:
    yard = Yard.make()
    try:
        yield yard
    finally:
        await yard.close()


SERVER = """
import socket
s = socket.create_server(("0.0.0.0", 8000))
print("up", flush=True)
while True:
    c, peer = s.accept()
    c.sendall(peer[0].encode()); c.close()
"""


@pytest.fixture
def outside() -> Iterator[tuple[str, str]]:
    """A server in a network namespace of its own, behind the host: its address, and the host's as it sees it."""
    name = f"wft{os.getpid() % 100000}"
    ours, theirs = (f"198.18.{os.getpid() % 250}.{n}" for n in (1, 2))

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{ours}/30", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "addr", "add", f"{theirs}/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, "/usr/bin/env", "python3", "-c", SERVER], stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"up\n"
            yield theirs, ours
        finally:
            server.kill()
            server.wait()
            server.stdout.close()
    finally:
        subprocess.run(["ip", "link", "del", name], check=False)
        ip("netns", "del", name)


CONNECT = """
import socket, sys
try:
    print(socket.create_connection(({address!r}, {port}), timeout=2).recv(100).decode())
except OSError as e:
    print("failed:", e)
"""


async def connect(yard: Yard, sandbox: object, address: str, port: int = 8000) -> str:
    done = await python(sandbox, CONNECT.format(address=address, port=port))  # type: ignore[arg-type]
    return done.stdout.decode().strip()


@pytest.mark.root
async def test_outbound_through_nat_and_blocked(yard: Yard, outside: tuple[str, str]) -> None:
    theirs, ours = outside
    sandbox = await yard.sandbox(network=True)
    assert await connect(yard, sandbox, theirs) == ours
    done = await python(sandbox, "import os, socket; print(socket.if_nameindex(), open('/etc/resolv.conf').read())")
    assert b"eth0" in done.stdout
    assert b"nameserver " in done.stdout

    blocked = await yard.sandbox(network=False)
    prepared_then_blocked = await yard.prepare(network=True)
    from woodfrog.linux.rootplan import root_plan

    await prepared_then_blocked.assemble(root_plan(yard.request(prepared_then_blocked, network=False), yard.host))
    for one in (blocked, prepared_then_blocked):
        assert "failed:" in await connect(yard, one, theirs)
        assert (await python(one, "import socket; print(socket.if_nameindex())")).stdout == b"[(1, 'lo')]\n"
        code = """
            s = socket.create_server(("127.0.0.1", 0))
            socket.create_connection(s.getsockname())
        """
        assert (await python(one, "import socket\n" + code.replace(" " * 12, ""))).status == 0


@pytest.mark.root
async def test_sandboxes_reach_neither_one_another_nor_the_host(yard: Yard) -> None:
    one, two = await yard.sandbox(network=True), await yard.sandbox(network=True)
    assert one.network is not None and two.network is not None
    assert one.network.address != two.network.address
    listening = asyncio.create_task(
        python(one, "import socket; s = socket.create_server(('0.0.0.0', 8000)); s.settimeout(6); s.accept()")
    )
    with socket.create_server(("0.0.0.0", 0)) as host_service:
        port = host_service.getsockname()[1]
        await asyncio.sleep(0.5)
        answers = await asyncio.gather(
            connect(yard, two, one.network.address),
            connect(yard, two, yard.network.gateway, port),
            connect(yard, two, "169.254.169.254", 80),
        )
    assert all(a.startswith("failed:") for a in answers), answers
    assert b"timed out" in (await listening).stderr


@pytest.mark.root
async def test_addresses_and_devices_are_given_back(yard: Yard) -> None:
    network = Network(yard.network.bridge, str(yard.network.subnet.supernet(new_prefix=24)).replace("/24", "/29"))
    leases = [await network.lease(f"x{i}") for i in range(5)]
    assert len({x.address for x in leases}) == 5
    with pytest.raises(HostError, match="in use"):
        await network.lease("one too many")
    other_daemon = Network(network.bridge, str(network.subnet))
    with pytest.raises(HostError, match="in use"):
        await other_daemon.lease("one too many")
    await leases[2].destroy()
    again = await other_daemon.lease("y")
    assert again.address == leases[2].address
    for lease in (*leases, again):
        await lease.destroy()
    sandbox = await yard.prepare(network=True)
    assert sandbox.network is not None
    device = Path("/sys/class/net") / sandbox.network.link
    assert device.exists()
    begin = time.monotonic()
    await sandbox.destroy()
    assert not device.exists()
    assert time.monotonic() - begin < 2
    await network.teardown()
    assert not (Path("/sys/class/net") / network.bridge).exists()


def test_what_the_kernel_refuses_is_told() -> None:
    with open("/proc/self/ns/net") as namespace:
        for name, bridge, told in (
            ("wfta", "wf-not-there", "no interface with this name"),
            ("wft/a", "lo", "Invalid argument"),
            ("lo", "lo", "File exists"),
            ("wfta", "lo", "Operation not supported"),
        ):
            with pytest.raises(OSError, match=told):
                add_pair(name, "wftb", mtu=1500, bridge=bridge, namespace=namespace.fileno())
    assert not Path("/sys/class/net/wfta").exists() and not Path("/sys/class/net/wftb").exists()


async def test_missing_tools_name_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="install iproute2"):
        await Network("wfnone", "10.199.0.0/24", leases=tmp_path).lease("x")


BAD = [("wf0; drop", "10.0.0.0/16"), ("wf0", "10.0.0.1/16"), ("wf0", "x"), ("wf0", "10.0.0.0/30"), ("wf0", "0.0.0.0/0")]


@pytest.mark.parametrize(("bridge", "subnet"), BAD)
async def test_bad_settings(bridge: str, subnet: str) -> None:
    with pytest.raises(HostError, match="network_"):
        Network(bridge, subnet)


def test_resolver_replaces_what_cannot_be_reached() -> None:
    stub = "# comment\nnameserver 127.0.0.53\noptions edns0\nsearch lan\n"
    assert resolver("nameserver 1.1.1.1\nnameserver fe80::1%eth0\nsearch a b\n", None, "10.0.0.1").text == (
        "nameserver 1.1.1.1\nsearch a b\n"
    )
    upstream = resolver(stub, "nameserver 9.9.9.9\nsearch lan\n", "10.0.0.1")
    assert upstream.servers == ("9.9.9.9",)
    assert resolver(stub, None, "10.0.0.1").servers == ("10.0.0.1",)
    assert resolver("", None, "10.0.0.1").text == "nameserver 10.0.0.1\n"


def test_rules_let_names_be_looked_up_before_they_drop() -> None:
    lines = [x.strip() for x in nft_rules("t", "wf0", "10.0.0.0/16", ("10.0.0.1", "169.254.169.253")).splitlines()]
    accept = lines.index("iifname wf0 ip daddr 169.254.169.253 udp dport 53 accept")
    assert accept < lines.index("iifname wf0 ip daddr 169.254.0.0/16 drop")
    assert lines[lines.index("chain input {") :].index("iifname wf0 drop") > 0
