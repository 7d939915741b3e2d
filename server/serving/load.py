"""How much is asked for and not yet sent; what is too much is refused at once, with a time to come back.

Refusing early keeps answers quick for those who were let in, and memory bounded whatever arrives. The event loop alone
calls it. Not here: the drawing itself (`server.serving.batching`).
"""

from __future__ import annotations

import math
import time

from server.serving.errors import ApiError

MOST_RETRY_SECONDS = 60
_WEIGHT = 0.2  # of the newest in the moving average of seconds a unit


class Load:
    """Units under way.

    Attributes:
        units: asked for and not yet sent.
    """

    def __init__(self, most_units: int) -> None:
        self.most_units, self.units = most_units, 0
        self._seconds_a_unit = 0.0

    def admit(self, units: int) -> Admission:
        """Raises `ApiError` (429) where there is no room; one request alone always has it."""
        if self.units and self.units + units > self.most_units:
            raise ApiError(
                429, "the service has as much to do as it takes; come again after the seconds in Retry-After",
                code="rate_limit_exceeded", retry_after=self.retry_after,
            )  # fmt: skip
        self.units += units
        return Admission(self, units, ahead=self.units)

    @property
    def retry_after(self) -> int:
        """Seconds in which half of what is under way should be done."""
        return min(MOST_RETRY_SECONDS, max(1, math.ceil(self.units * self._seconds_a_unit / 2)))

    def drawn(self, seconds: float, ahead: int) -> None:
        took = seconds / ahead
        self._seconds_a_unit += (took - self._seconds_a_unit) * (_WEIGHT if self._seconds_a_unit else 1.0)


class Admission:
    """Room that one request holds until `release`, which may be called again."""

    def __init__(self, load: Load, units: int, *, ahead: int) -> None:
        self._load, self._units, self._ahead, self._began = load, units, ahead, time.monotonic()

    def drawn(self) -> None:
        """Its pictures are there: what that took tells the next ones how long to wait."""
        self._load.drawn(time.monotonic() - self._began, self._ahead)

    def release(self) -> None:
        self._load.units -= self._units
        self._units = 0
