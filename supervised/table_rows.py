"""Rows of a Hugging Face data set, of the hub or on the disk. They stay in its Arrow files, which are
mapped, and are read a block at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload
from unittest.mock import patch

import numpy as np

from posttrain.backend.errors import DataError, one_line
from posttrain.backend.extras import need
from posttrain.backend.hub import hub_is_reached, hub_reason
from supervised.rows import Row, read_rows, without_nulls

BLOCK = 1000  # rows in memory at once, where all are read
# Of CSV and TSV: an empty cell is null, and "NA", "None" or "null" are texts: a country, a name, an answer.
CELLS = {"keep_default_na": False, "na_values": [""]}


class TableRows(Sequence[Row]):
    """`places` are the numbers of the rows in their split, for errors."""

    def __init__(self, table: Any, name: str, split: str, places: Sequence[int] | np.ndarray):
        self._table, self._name, self._split, self._places = table, name, split, places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self[place : place + 1][0]
        with loading(self._name, self._split):
            columns = self._table[index]
        return [
            (
                f"{self._name}[{self._split}]:{place}",
                {name: without_nulls(column[i]) for name, column in columns.items()},
            )
            for i, place in enumerate(self._places[index])
        ]

    def picked(self, places: Sequence[int]) -> "TableRows":
        return TableRows(self._table.select(places), self._name, self._split, np.asarray(self._places)[places])


def picked(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    return rows.picked(places) if isinstance(rows, TableRows) else [rows[i] for i in places]


def file_rows(path: str) -> Sequence[Row]:
    """Those of a JSON file or, by its name, of a Parquet file. DataError as of both."""
    return table_rows(path, None, "train") if str(path).lower().endswith(".parquet") else read_rows(path)


def table_rows(name: str, subset: str | None, split: str) -> TableRows:
    """DataError if the set cannot be loaded or has no examples."""
    need("datasets", f"dataset {name!r}")
    import datasets  # a second of import that the other builders need not wait for
    from datasets import config as datasets_config

    path = Path(name).expanduser().absolute()  # "." is no folder to load_dataset
    with loading(name, split):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict) and split not in saved:
                raise ValueError(f"it has {', '.join(map(str, saved))}")
            table: Any = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            repository, _, revision = (str(path), "", "") if path.exists() else name.partition("@")
            repository, files = (str(path.parent), path.name) if path.is_file() else (repository, None)
            if files and path.suffix != path.suffix.lower():  # the library knows lower-case endings alone
                repository, files = path.suffix[1:].lower().replace("jsonl", "json"), str(path)
            unreached = datasets_config.HF_HUB_OFFLINE or not (path.exists() or hub_is_reached())
            load = partial(
                datasets.load_dataset, repository, subset, data_files=files, split=split, revision=revision or None
            )
            with patch.object(datasets_config, "HF_HUB_OFFLINE", unreached):
                try:
                    table = load(**CELLS)
                except (ValueError, TypeError):  # other formats have no such options
                    table = load()
        rows = TableRows(table, name, split, range(len(table)))
    if not rows:
        raise DataError(f"dataset {name!r}, split {split!r}, has no examples")
    return rows


@contextmanager
def loading(name: str, split: str) -> Iterator[None]:
    """What the library raises becomes a DataError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = one_line(cause, 300)
        reason = reason if Path(name).expanduser().absolute().exists() else hub_reason(error, reason)
        raise DataError(f"dataset {name!r}, split {split!r}, could not be loaded: {reason}") from error
