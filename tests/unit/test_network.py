"""Which network gloo is told to use."""

import os

import psutil
import pytest

from pipeline.train.network import INTERFACE, choose_network


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No interface is named, neither before nor after."""
    monkeypatch.setenv(INTERFACE, "")


def outward() -> list[tuple[str, str]]:
    """Interfaces of this machine that lead to others, with their IPv4 addresses."""
    return [
        (name, each.address)
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family.name == "AF_INET" and not each.address.startswith("127.")
    ]


def test_the_interface_of_our_own_address_is_named():
    found = outward()
    if not found:
        pytest.skip("this machine has no network")
    name, address = found[0]
    choose_network(address)
    assert os.environ[INTERFACE] == name


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "", "no.such.host.invalid"])
def test_loopback_and_nowhere_name_none(address):
    choose_network(address)
    assert os.environ[INTERFACE] == ""


def test_the_own_name_of_a_host_leads_out_for_a_group_of_several():
    choose_network("192.0.2.1")  # no host's, so by the way out
    way_out, os.environ[INTERFACE] = os.environ[INTERFACE], ""
    if not way_out:
        pytest.skip("no way leads out of this machine")
    choose_network("127.0.1.1")
    assert os.environ[INTERFACE] == ""
    choose_network("127.0.1.1", leaves_host=True)
    assert os.environ[INTERFACE] == way_out


def test_who_names_one_decides(monkeypatch):
    monkeypatch.setenv(INTERFACE, "mine0")
    for _, address in outward():
        choose_network(address)
    assert os.environ[INTERFACE] == "mine0"
