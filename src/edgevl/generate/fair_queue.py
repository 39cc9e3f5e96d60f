"""A queue in which clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of several clients: each client's in order, and one of each client in turn.

    So a client with a hundred requests delays another's by one. Not safe between threads.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._clients: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        """Return the items that wait."""
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Item]:
        """Go through the items, client by client."""
        for items in self._clients.values():
            yield from items

    def put(self, client: str, item: Item) -> None:
        """Add an item behind those of its client."""
        self._clients.setdefault(client, deque()).append(item)

    def put_back(self, client: str, item: Item) -> None:
        """Undo the `get` that returned ``item``: it is next again."""
        self._clients.setdefault(client, deque()).appendleft(item)
        self._clients.move_to_end(client, last=False)

    def get(self) -> tuple[str, Item]:
        """Take the next item: -> its client, the item.

        Raises:
            KeyError: there is none.
        """
        client, items = self._clients.popitem(last=False)
        item = items.popleft()
        if items:
            self._clients[client] = items  # behind the other clients
        return client, item

    def remove(self, client: str, item: Item) -> bool:
        """Drop an item; return whether it was there."""
        items = self._clients.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._clients[client]
        return True
