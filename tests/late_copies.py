"""Stands in for a GPU's copy stream where there is none: nothing is copied before somebody waits for it."""

from collections import deque

import torch


class LateCopies:
    """In order, as a stream does it, but as late as it can be: what is read too early or overwritten shows.

    Host memory is poisoned with NaN when it is made. A source is held until its copy is through. ``read``: what goes to
    the device, since the last time that somebody waited for that.
    """

    def __init__(self):
        self.waiting = deque()
        self.locked = []
        self.begun = self.through = 0
        self.read = []

    def lock(self, memory):
        memory.fill_(torch.nan)
        self.locked.append(memory.nbytes)

    def staging(self, like):
        return torch.full_like(like, torch.nan)

    def to_host(self, source, target):
        assert source.dtype == target.dtype and source.stride() == target.stride()
        self.waiting.append((source, target))
        self.begun += 1
        return Arrival(self, self.begun)

    def to_device(self, source):
        self.join()
        self.read.append(source)
        return source.clone()

    def settle(self):
        self.join()
        self.read.clear()

    def join(self):
        self.run(self.begun)

    def run(self, count):
        while self.through < count:
            source, target = self.waiting.popleft()
            target.copy_(source)
            self.through += 1


class Arrival:
    """Of one copy and all before it."""

    def __init__(self, copies, count):
        self.copies, self.count = copies, count

    def synchronize(self):
        self.copies.run(self.count)
