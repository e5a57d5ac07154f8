"""Which rotation profiles are in force, and in which row of the engine's tables."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from engine.messages import ProfileRow
from engine.request import Request
from engine.scaling import MAX_CONTEXT, UNSCALED, RopeScaling

OWN = 0
"""The row of the model's own profile, which is always there."""


class ProfileRows:
    """Hands rows out to requests that run, one row for each scaling in force.

    A row belongs to its scaling until the last request that runs with it is gone; then it is kept
    until another needs it, the least recently used first. Cached pages hold no row: their key is
    the scaling, and a scaling's tables are the same bits whenever they are made.
    """

    def __init__(
        self,
        own: RopeScaling = UNSCALED,
        trained_context: int = MAX_CONTEXT,
        num_rows: int = 1,
    ) -> None:
        """own: the model's scaling, as declared; trained_context: in tokens."""
        self._own = own
        self._trained_context = trained_context
        self._scalings: list[RopeScaling | None] = [own.in_force(1, trained_context)]
        self._scalings += [None] * (num_rows - 1)
        self._rows = {self._scalings[OWN]: OWN}
        self._holders = Counter[int]()
        self._idle = OrderedDict.fromkeys(range(1, num_rows))
        self._extents = [0] * num_rows
        self._news: dict[int, ProfileRow] = {}

    @property
    def num_in_force(self) -> int:
        """Rows that are in use, the model's own among them."""
        return len(self._scalings) - len(self._idle)

    def settle(self, request: Request) -> None:
        """Decide by a request's length what it is to be computed with; it has no row yet."""
        declared = request.params.rope or self._own
        request.scaling = declared.in_force(request.span, self._trained_context)
        request.steady_until = declared.steady_until(request.span, self._trained_context)

    def is_own(self, request: Request) -> bool:
        """Whether its rotation is the model's own, which never waits for a row."""
        return request.scaling == self._scalings[OWN]

    def has_room(self, request: Request) -> bool:
        """Whether the rotation that was settled has a row, or can have one."""
        return request.scaling in self._rows or bool(self._idle)

    def has_room_beside(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether the rotation that was settled could have a row while only the others run."""
        held = {OWN, *(other.profile for other in others)}
        return self._rows.get(request.scaling) in held or len(held) < len(self._scalings)

    def take(self, request: Request) -> None:
        """Give a request the row of its rotation. Without room for it a bug: KeyError."""
        row = self._rows.get(request.scaling)
        if row is None:
            row, _ = self._idle.popitem(last=False)
            self._rows.pop(self._scalings[row], None)
            self._rows[request.scaling] = row
            self._scalings[row] = request.scaling
            self._extents[row] = 0
            self._news.pop(row, None)
        self._idle.pop(row, None)
        self._holders[row] += 1
        request.profile = row

    def give_back(self, request: Request) -> None:
        """Its request does not run any more."""
        row = request.profile
        self._holders[row] -= 1
        if self._holders[row] == 0 and row != OWN:
            self._idle[row] = None

    def cover(self, request: Request, num_positions: int) -> None:
        """Have a request's row reach so far; it is made twice as long, so that this is rare."""
        row = request.profile
        if num_positions > self._extents[row]:
            self._extents[row] = max(num_positions, min(2 * self._extents[row], MAX_CONTEXT))
            self._news[row] = ProfileRow(row, request.scaling, self._extents[row])

    def news(self) -> list[ProfileRow]:
        """What the tables must hold from now on and did not when this was asked last."""
        news, self._news = list(self._news.values()), {}
        return news
