"""A sandbox's pair of network devices, asked of the kernel itself (rtnetlink(7)).

`ip` would do the same. To start a program takes a daemon that holds much memory some milliseconds, of every sandbox.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

__all__ = ["add_pair"]

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/veth.h
_NEW_LINK = 16
_REQUEST, _ACK, _EXCLUSIVE, _CREATE = 1, 4, 0x200, 0x400
_ERROR = 2
_ACK_HAS_TEXT = 0x200
_SOL_NETLINK, _SHORT_ACK, _TEXT_ACK = 270, 10, 11
_TEXT = 1
_IFNAME, _MTU, _MASTER, _LINKINFO, _NET_NS_FD = 3, 4, 10, 18, 28
_KIND, _DATA, _PORT_KIND, _PORT_DATA = 1, 2, 4, 5
_PEER = 1
_ISOLATED = 33
_UP = 1
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_NUMBER = struct.Struct("=I")
_ATTRIBUTE = struct.Struct("=HH")
_STATUS = struct.Struct("=i")
_ANSWER_S = 10.0


def _attribute(kind: int, *content: bytes) -> bytes:
    data = b"".join(content)
    return (_ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data).ljust(-(-len(data) // 4) * 4 + 4, b"\0")


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _link(name: str, number: int, flags: int, *attributes: bytes, up: bool = False) -> bytes:
    body = _LINK.pack(0, 0, 0, _UP if up else 0, _UP if up else 0) + _attribute(_IFNAME, _text(name))
    body += b"".join(attributes)
    return _HEADER.pack(_HEADER.size + len(body), _NEW_LINK, _REQUEST | _ACK | flags, number, 0) + body


def _failure(flags: int, body: bytes) -> OSError | None:
    (status,) = _STATUS.unpack_from(body)
    if status == 0:
        return None
    told, at = "", _STATUS.size + _HEADER.size
    while flags & _ACK_HAS_TEXT and at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _TEXT:
            told = ": " + body[at + _ATTRIBUTE.size : at + length].rstrip(b"\0").decode(errors="replace")
        at += max(-(-length // 4) * 4, _ATTRIBUTE.size)
    return OSError(-status, os.strerror(-status) + told)


def add_pair(name: str, peer: str, *, mtu: int, bridge: str, namespace: int) -> None:
    """Make two devices that are joined: one here, a port of the bridge that reaches no other port, and up; one in
    another network namespace. It waits for the kernel's lock of all network devices.

    Args:
        name, peer: of the one here and of the other, at most 15 characters each.
        mtu: bytes of a packet, of both.
        namespace: a descriptor of the other's.

    Raises:
        OSError: the kernel refuses; there may be a pair that goes with the namespace.
    """
    size = _NUMBER.pack(mtu)
    other = _LINK.pack(0, 0, 0, 0, 0) + _attribute(_IFNAME, _text(peer)) + _attribute(_MTU, size)
    other += _attribute(_NET_NS_FD, _NUMBER.pack(namespace))
    make = _link(
        name,
        1,
        _CREATE | _EXCLUSIVE,
        _attribute(_MTU, size),
        _attribute(_MASTER, _NUMBER.pack(socket.if_nametoindex(bridge))),
        _attribute(_LINKINFO, _attribute(_KIND, b"veth"), _attribute(_DATA, _attribute(_PEER, other))),
    )
    # Only a port can be isolated, and nothing goes through it before it is up.
    port = _attribute(_PORT_KIND, b"bridge") + _attribute(_PORT_DATA, _attribute(_ISOLATED, b"\1"))
    begin = _link(name, 2, 0, _attribute(_LINKINFO, port), up=True)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as s:
        for option in (_SHORT_ACK, _TEXT_ACK):
            s.setsockopt(_SOL_NETLINK, option, 1)
        s.settimeout(_ANSWER_S)
        for message in (make, begin):
            s.send(message)
            answer = s.recv(1 << 16)
            _, kind, flags, _, _ = _HEADER.unpack_from(answer)
            if kind != _ERROR:
                raise OSError(errno.EPROTO, f"the kernel answered with a message of type {kind}")
            if (failure := _failure(flags, answer[_HEADER.size :])) is not None:
                raise failure
