"""Which addresses are the public internet's, and not those of a network that a server stands in."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

#: IPv6 hosts on the internet have their addresses here (RFC 4291); outside of it are, among others,
#: loopback, link-local, unique local, multicast and IPv4-compatible addresses.
_GLOBAL_UNICAST = ip_network("2000::/3")
#: The last 32 bits are an IPv4 address: where a network has IPv6 only, IPv4 hosts are called so.
_NAT64 = ip_network("64:ff9b::/96")

#: What ``ipaddress`` takes for global, in some or all of the Python versions that are supported.
_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            "168.63.129.16/32",  # Azure's services for its virtual machines
            "192.0.0.0/24",  # protocol assignments, services of clouds among them
            "192.88.99.0/24",  # relays of 6to4
            "2001::/23",  # protocol assignments, Teredo (which embeds IPv4 addresses) among them
            "2002::/16",  # 6to4, which embeds IPv4 addresses
            "3fff::/20",  # documentation
        ),
    )
)


def is_public(text: str) -> bool:
    """Tell whether an address is that of a host on the public internet.

    Private, shared (100.64.0.0/10), loopback, link-local, multicast, reserved and unspecified
    addresses are not, nor those that embed one of these; 6to4 and Teredo are not at all.

    Args:
        text: the address, of IPv4 or IPv6.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = IPv4Address(int(address) & 0xFFFFFFFF)
        elif address not in _GLOBAL_UNICAST:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in _NOT_PUBLIC)
    )
