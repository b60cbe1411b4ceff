"""Prefetch: the next batches are read on a thread, while the model computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """A function of a number that also computes the next `depth` numbers on a thread.

    make: the function. Only the thread calls it, and it must not communicate with other ranks. It
    depends on nothing but the number, so a resumed run has the same results. end: no number from
    `end` on is computed ahead. stride: distance of the next number.

    An error of make is raised when its number is used, not earlier. Use it as a context manager:
    its end stops the thread, also after an error or an interrupt.
    """

    def __init__(self, make: Callable[[int], T], end: int, *, stride: int = 1, depth: int = 1):
        self.make, self.end = make, end
        self.stride, self.depth = stride, depth
        self._results: dict[int, Future[T]] = {}
        self._thread = ThreadPoolExecutor(1, "prefetch")

    def __call__(self, number: int) -> T:
        ahead = range(number + self.stride, self.end, self.stride)[: self.depth]
        wanted = [number, *ahead]
        for unused in self._results.keys() - set(wanted):
            self._results.pop(unused).cancel()
        for next_number in wanted:
            if next_number not in self._results:
                self._results[next_number] = self._thread.submit(self.make, next_number)
        return self._results.pop(number).result()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._results.clear()
