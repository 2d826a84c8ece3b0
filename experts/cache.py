"""Features by key: memory up to a byte limit, then optionally a folder on disk."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from diskcache import Cache

from experts.config import CacheConfig


class FeatureCache:
    """Least-recently-used arrays in memory, backed by a disk cache when a folder is given.

    Experts are frozen, so an entry never goes stale: its key holds everything its value depends on.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._limit = int(config.memory_mb * 2**20)
        self._entries: OrderedDict[str, np.ndarray] = OrderedDict()
        self._disk = Cache(config.disk, size_limit=int(config.disk_mb * 2**20)) if config.disk else None
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> np.ndarray | None:
        """The array, or None; counts a hit or a miss."""
        if key in self._entries:
            self._entries.move_to_end(key)
            self.hits += 1
            return self._entries[key]
        stored = self._disk.get(key) if self._disk is not None else None
        if stored is None:
            self.misses += 1
            return None
        self.hits += 1
        shape, data = stored
        feature = np.frombuffer(data, dtype=np.float32).reshape(shape)
        self._remember(key, feature)
        return feature

    def put(self, key: str, feature: np.ndarray) -> None:
        """Stores a float32 array, dropping the least recently used ones over the limit."""
        self._remember(key, feature)
        if self._disk is not None:
            self._disk.set(key, (feature.shape, feature.tobytes()))

    def _remember(self, key: str, feature: np.ndarray) -> None:
        replaced = self._entries.pop(key, None)
        self.bytes += feature.nbytes - (replaced.nbytes if replaced is not None else 0)
        self._entries[key] = feature
        while self.bytes > self._limit and self._entries:
            _, dropped = self._entries.popitem(last=False)
            self.bytes -= dropped.nbytes

    def __len__(self) -> int:
        return len(self._entries)
