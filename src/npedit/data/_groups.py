"""Which rows show the same subject: those with the same `group`."""

from __future__ import annotations

import numpy as np

from npedit.data._rows import Rows


class Groups:
    """The rows of each group, by their numbers. A row without a group is alone in its group."""

    def __init__(self, rows: Rows):
        found = rows.column("group").dictionary_encode().combine_chunks()
        self._codes = found.indices.to_numpy(zero_copy_only=False)
        names = found.dictionary.to_pylist()
        self._no_group = names.index("") if "" in names else -1
        self._order = np.argsort(self._codes, kind="stable")
        self._starts = np.searchsorted(self._codes[self._order], np.arange(len(names) + 1))

    def members(self, number: int) -> list[int]:
        """The numbers of all rows of a row's group, in increasing order."""
        code = self._codes[number]
        if code == self._no_group:
            return [number]
        return self._order[self._starts[code] : self._starts[code + 1]].tolist()

    @property
    def shared(self) -> list[int]:
        """The first row of each group that has several rows."""
        sizes = np.diff(self._starts)
        codes = [code for code in np.flatnonzero(sizes > 1).tolist() if code != self._no_group]
        return self._order[self._starts[codes]].tolist()
