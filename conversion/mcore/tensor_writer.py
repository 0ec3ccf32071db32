"""The writing of megatron-core's saves to the disk."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.ranks import gathered
from megatron_embed.conversion.files.checksums import FileSums, Summing
from megatron_embed.conversion.files.disk_errors import system_error
from megatron_embed.conversion.mcore.tensors import without_crc32


def write_tensors(state: dict[str, Any], folder: Path) -> dict[str, FileSums]:
    """Do megatron-core's part of a save; return the checksums of the tensors' files of all ranks."""
    sums: dict[str, FileSums] = {}
    failures: list[BaseException] = []
    # Results of a synchronous save stay in this process. The default is a manager process, which imports the main
    # module again (so scripts without a `__main__` guard fail) and outlives a killed run.
    filesystem_async._results_queue = queue.Queue()
    writer = filesystem_async.FileSystemWriterAsync
    write = staticmethod(partial(_write_buckets, sums, failures))
    try:
        with without_crc32(), mock.patch.object(writer, "write_preloaded_data_multiproc", write):
            dist_checkpointing.save(state, str(folder), _parallel())
    except CheckpointException as error:  # raised on all ranks, without the system's own error
        everyone = gathered(system_error(failures[0]) if failures else None)
        raise next((each for each in everyone if each is not None), error) from None
    return {name: each for rank in gathered(sums) for name, each in rank.items()}


def _parallel() -> FullyParallelSaveStrategyWrapper:
    """Return megatron-core's writer that divides replicated tensors (the weights) over the data-parallel ranks."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)


def _write_buckets(
    sums: dict[str, FileSums],
    failures: list[BaseException],
    transforms: list[Any],
    msc: bool,
    rank: int,
    buckets: list[Any],
    results: Any,
) -> None:
    """Write this rank's files in threads and sum them up; megatron-core would fork a process for each file.

    If the system kills a forked writer, its parent waits for ever. If a writer's parent is killed, the writer lives on
    with the parent's connections, so that no other rank notices.
    """

    def write(bucket: Any) -> Any:
        outcome: queue.Queue[Any] = queue.Queue()
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, 0, bucket, outcome, _NothingToCount(), use_fsync=True
        )
        _, written = outcome.get_nowait()
        return written

    def open_summed(path: str, mode: str) -> _SummedFile:
        return _SummedFile(Path(path), sums)

    with (
        ThreadPoolExecutor(len(buckets)) as pool,
        mock.patch.object(filesystem_async, "open", open_summed, create=True),
    ):
        written = list(pool.map(write, buckets))
    failures += [each for each in written if isinstance(each, BaseException)]
    results.put(failures[0] if failures else dict(enumerate(written)))


class _NothingToCount:
    """Stand-in for the queue by which forked writers report their end to the parent."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


class _SummedFile(BufferedWriter):
    """A new file that sums up its bytes and stores the checksums when it is closed."""

    def __init__(self, path: Path, sums: dict[str, FileSums]) -> None:
        super().__init__(FileIO(path, "wb"))
        self._name, self._told, self._summing = path.name, sums, Summing()

    def write(self, data: Any) -> int:
        self._summing.update(data)
        return super().write(data)

    def close(self) -> None:
        super().close()
        self._told[self._name] = self._summing.result()


def bytes_on_all_ranks(state: dict[str, Any]) -> int:
    """Return the bytes of the tensors that a save will write."""
    # plain tensors, such as fp16's loss scale, go into common.pt, which is small
    sharded = [each for each in nested_values(state) if isinstance(each, ShardedBase)]
    tensors = [each for each in sharded if isinstance(each.data, torch.Tensor)]
    own = sum(each.data.nbytes for each in tensors if is_main_replica(each.replica_id))
    total = torch.tensor(own, dtype=torch.int64, device=host.device())
    dist.all_reduce(total)
    return int(total.item())
