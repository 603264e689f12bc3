"""Over which network ranks speak: the one that leads to the other hosts, not the one of this host's name.

gloo listens where the name of a host leads. On many machines (Debian's default) that is 127.0.1.1, where no
other host can reach it, and a group of two hosts ends after minutes in "connectFullMesh failed". So the
interface of the address that the hosts already reach each other by is named to it.
"""

import os
import socket

import psutil  # type: ignore[import-untyped]

INTERFACE = "GLOO_SOCKET_IFNAME"
"""What gloo takes the name of its interface from; whoever sets it decides."""

_ANY_PORT = 9
_ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737): the way to it is the way out of this host."""

_LOOPBACK = ("127.", "::1")


def choose_network(address: str, *, leaves_host: bool = False) -> None:
    """Name the interface that leads to `address`, another host's or our own, to gloo.

    Nothing is done where it is named already, where the address is loopback, or where it leads nowhere. For a
    group that `leaves_host` though the address is loopback here, as this host's name is, the way out counts.
    """
    if os.environ.get(INTERFACE):
        return
    ours = _way_to(address)
    if leaves_host and ours.startswith(_LOOPBACK):
        ours = _way_to(_ELSEWHERE)
    if not ours or ours.startswith(_LOOPBACK):
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == ours for each in addresses):
            os.environ[INTERFACE] = name


def _way_to(address: str) -> str:
    """Our own address on the way to another; empty where there is none."""
    try:
        family, *_, target = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it looks up the way
            return str(probe.getsockname()[0])
    except OSError:
        return ""
