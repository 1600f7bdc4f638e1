"""Star graphs in files: text lines as in BST, Next-Token Failures and Q#, and a binary form.

The size is in the name: graph_{d}_{l}_sample_{n}.txt (BST, without N) or
deg_{d}_path_{l}_nodes_{N}_... (the other two). Every row is checked to be a star graph of that
size. Left out: reversed targets, which no original writes either.

    a,b|c,d|...|y,z/s,g=p1,p2,...,pl        one graph a line, the same in all three
    *.npy                                   rows of numeral ids in uint8 (uint16 for large N), memory-mapped
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError  # of a damaged .npy header

import numpy as np

from envs.star_graph import HeldOut, Seed, StarGraph, sample_graphs
from posttrain.backend.errors import ConfigError, DataError

CHUNK = 65_536  # lines parsed, or rows written, at a time
SPACES = str.maketrans("|,/=", "    ")
BST_NODES = 50  # N of BST's default, which its file names leave out


def format_line(tokens_T: Sequence[int] | np.ndarray, graph: StarGraph) -> str:
    """The line of a row, without its newline."""
    row = [int(token) for token in tokens_T]
    end = graph.prefix_length - 3
    edges = "|".join(f"{row[i]},{row[i + 1]}" for i in range(0, end, 3))
    return f"{edges}/{row[end]},{row[end + 1]}=" + ",".join(map(str, row[graph.prefix_length :]))


def read_lines(path: str | Path, graph: StarGraph, max_rows: int | None = None) -> np.ndarray:
    """tokens_B_T of a text file or its first `max_rows` lines, in `dtype_of(graph)`. DataError with
    the line number at the first bad line.
    """
    path = Path(path)
    parts, done = [], 0
    for lines in _chunks(path, max_rows):
        parts.append(
            _parse(lines, graph, lambda row, done=done: f"{path}, line {done + row + 1}").astype(dtype_of(graph))
        )
        done += len(lines)
    if not parts:
        raise DataError(f"{path} has no lines")
    return np.concatenate(parts)


def dtype_of(graph: StarGraph) -> type[np.unsignedinteger]:
    """The smallest dtype for the ids of a row."""
    return np.uint8 if graph.vocab_size <= 256 else np.uint16 if graph.vocab_size <= 65_536 else np.uint32


def _chunks(path: Path, max_rows: int | None) -> Iterator[list[str]]:
    lines: list[str] = []
    blank: list[str] = []  # an error only where a graph follows
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream):
                if number == max_rows:
                    break
                if not line.strip():
                    blank.append("")
                    continue
                lines += [*blank, line.rstrip()]
                blank = []
                if len(lines) >= CHUNK:
                    yield lines
                    lines = []
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not a text file of star graphs (byte {error.start} is not ASCII); give a text file"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; choose another file"
        ) from error
    if lines:
        yield lines


def _parse(lines: list[str], graph: StarGraph, where) -> np.ndarray:
    """Rows of lines; `where(row)` names a line in an error."""
    edges, path = graph.num_edges - 1, graph.path_length - 1
    form = re.compile(rf"(?:\d+,\d+\|){{{edges}}}\d+,\d+/\d+,\d+=\d+(?:,\d+){{{path}}}", re.ASCII)
    for row, line in enumerate(lines):
        if not form.fullmatch(line):
            raise DataError(f"{where(row)}: {_fault(line, graph)}: {line[:60]!r}")
    numbers = np.fromstring(" ".join(lines).translate(SPACES), sep=" ")  # float64: no number is too long
    numbers_B_M = np.minimum(numbers, 2**31).astype(np.int64).reshape(len(lines), -1)
    ends_M = numbers_B_M[:, 2 * graph.num_edges : 2 * graph.num_edges + 2]
    path_B_L = numbers_B_M[:, 2 * graph.num_edges + 2 :]
    tokens_B_T = graph.rows(
        numbers_B_M[:, 0 : 2 * graph.num_edges : 2], numbers_B_M[:, 1 : 2 * graph.num_edges : 2], path_B_L
    )
    tokens_B_T[:, graph.prefix_length - 3 : graph.prefix_length - 1] = ends_M
    if fault := graph.first_fault(tokens_B_T):
        raise DataError(f"{where(fault[0])}: {fault[1]}: {lines[fault[0]][:60]!r}")
    return tokens_B_T


def _fault(line: str, graph: StarGraph) -> str:
    """What keeps a line from having the form of this size."""
    match = re.fullmatch(r"((?:\d+,\d+\|)*\d+,\d+)/\d+,\d+=(\d+(?:,\d+)*)", line, re.ASCII)
    if not match:
        return "not of the form a,b|c,d|.../s,g=p1,p2,..."
    edges, nodes = match[1].count("|") + 1, match[2].count(",") + 1
    return (
        f"{edges} edges and a path of {nodes} nodes, where {graph.name} has {graph.num_edges} edges and "
        f"{graph.path_length} nodes"
    )


# --- sizes from names, binary files -------------------------------------------------------------


def graph_of_path(path: str | Path, num_nodes: int | None = None) -> StarGraph:
    """The size in a file's name; `num_nodes` is for names without N. Raises ConfigError."""
    name = Path(path).name
    if match := re.match(r"deg_(\d+)_path_(\d+)_nodes_(\d+)", name):
        d, length, named = map(int, match.groups())
        if num_nodes not in (None, named):
            raise ConfigError(f"{name} has graphs over {named} nodes, but num_nodes={num_nodes}")
        return StarGraph(d, length, named)
    if match := re.match(r"graph_(\d+)_(\d+)_sample_", name):
        return StarGraph(int(match[1]), int(match[2]), num_nodes or BST_NODES)
    raise ConfigError(
        f"{name}: no size in the name; name it graph_D_L_sample_COUNT.txt or deg_D_path_L_nodes_N_WHAT, or give the "
        "size"
    )


def read_rows(path: str | Path, graph: StarGraph, max_rows: int | None = None) -> np.ndarray:
    """tokens_B_T of a text file, or memory-mapped from a .npy file, checked a chunk at a time."""
    if Path(path).suffix != ".npy":
        return read_lines(path, graph, max_rows)
    try:
        tokens_B_T = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TokenError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give a .npy file as write_sampled makes them, or lines of text"
        ) from error
    if (
        not isinstance(tokens_B_T, np.ndarray)
        or tokens_B_T.ndim != 2
        or tokens_B_T.dtype.kind not in "iu"
        or not len(tokens_B_T)
    ):
        content = (
            f"{tokens_B_T.dtype} of shape {tokens_B_T.shape}"
            if isinstance(tokens_B_T, np.ndarray)
            else "several arrays"
        )
        raise DataError(f"{path} holds {content}, where rows of whole numbers are needed")
    tokens_B_T = tokens_B_T[:max_rows]
    for start in range(0, len(tokens_B_T), CHUNK):
        if fault := graph.first_fault(tokens_B_T[start : start + CHUNK]):
            raise DataError(f"{path}, row {start + fault[0] + 1}: {fault[1]}")
    return tokens_B_T


class KeptRows:
    """Selected rows of a table, copied only on access."""

    def __init__(self, rows_D_T: np.ndarray, kept_K: np.ndarray):
        """`kept_K` are indices into the table."""
        self.rows_D_T, self.kept_K = rows_D_T, kept_K

    def __len__(self) -> int:
        return len(self.kept_K)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.rows_D_T[self.kept_K[rows]]


def without(rows_D_T: np.ndarray, test: HeldOut) -> KeptRows:
    """The rows whose graph is not held out."""
    kept = [
        np.flatnonzero(~test.contains(rows_D_T[start : start + CHUNK])).astype(np.uint32) + np.uint32(start)
        for start in range(0, len(rows_D_T), CHUNK)
    ]
    return KeptRows(rows_D_T, np.concatenate(kept))


def write_sampled(path: str | Path, graph: StarGraph, count: int, seed: Seed, exclude: HeldOut | None = None) -> None:
    """Writes sampled rows to a .npy file named by size; chunk i has the seed (seed, i)."""
    rows_B_T = np.lib.format.open_memmap(path, mode="w+", dtype=dtype_of(graph), shape=(count, graph.length))
    first = seed if isinstance(seed, tuple) else (seed,)
    for number, start in enumerate(range(0, count, CHUNK)):
        size = min(CHUNK, count - start)
        rows_B_T[start : start + size] = sample_graphs(graph, size, (*first, number), exclude)
    rows_B_T.flush()
