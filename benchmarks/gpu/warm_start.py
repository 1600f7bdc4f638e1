"""Block `warm_start`: the supervised run of block `learning`, which goes on with it: all of it that needs no vLLM."""

from benchmarks.gpu.checks import Record
from benchmarks.gpu.learning import supervised
from benchmarks.gpu.user_runs import run_folders


def main() -> None:
    record = Record()
    with run_folders("learning") as folder:
        supervised(record, folder / "sft")
    record.print()


if __name__ == "__main__":
    main()
