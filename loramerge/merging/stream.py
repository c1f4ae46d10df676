"""Carries a plan out: workers over row blocks, each with its own buffers, reading, computing, hashing and writing."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loramerge.adapters.updates import Update, apply_earlier, in_place
from loramerge.errors import InputError, LoramergeError, UnsupportedError
from loramerge.merging.bring_back import Recorder, bring_back, check_digests, edited
from loramerge.merging.deltas import Deltas
from loramerge.merging.kernels import COMPUTE_DTYPES, TORCH_DTYPES, Measured, NonFinite
from loramerge.merging.lanes import CudaLane, DeviceLane, Lane, Operators, choose_device
from loramerge.merging.plan import OutputFile, Plan, Step
from loramerge.tensors.checkpoint import Located
from loramerge.tensors.dtypes import bits, display
from loramerge.tensors.hashing import BLOCK_BYTES, block_digest, digest_tensor, row_blocks, row_layout, tensor_digest
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.text import quoted
from loramerge.tensors.writer import AlignedBuffer

FACTOR_CACHE_BYTES = 64 << 20

Progress = Callable[[int, int], None]


class Sink(Protocol):
    """Where the bytes go: files, or nowhere when only the digests are wanted."""

    def begin(self, file: OutputFile, header: bytes, size: int) -> bool:
        """A file is begun; `header` belongs at its start. False where its bytes need not even be read."""

    def write(self, file: OutputFile, offset: int, view: memoryview) -> None:
        """A range of a begun file. Called by many threads at once."""

    def end(self, file: OutputFile) -> None:
        """All of a file was written."""


@dataclass
class Result:
    """What became of one tensor: its digest, that of its source, and how much of the change rounding kept."""

    digest: str | None
    source_digest: str | None = None
    kept: float = 0.0
    wanted: float = 0.0
    unchanged: bool = False
    """The updates turned out to be all zero, and the bytes were copied."""

    @property
    def retention(self) -> float | None:
        """`<M - W, D> / <D, D>` (sampled rows); 1 is ideal. None where nothing was to change."""
        return self.kept / self.wanted if self.wanted > 0 else None


@dataclass
class _Work:
    """One output tensor while it is being written."""

    file: OutputFile
    step: Step
    info: TensorInfo
    rows: int
    row_bytes: int
    blocks: list[tuple[int, int]]
    digests: list[bytes]
    sources: list[bytes]
    measured: list[Measured]
    originals: list[bytes]
    """Digests of the blocks that were brought back, where that was done."""
    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    operators: Operators | None = None


class FactorFile(Protocol):
    """What factors are read from: an adapter, or what an undo file holds of one."""

    @property
    def name(self) -> str: ...

    @property
    def transposed(self) -> frozenset[str]: ...

    @property
    def checkpoint(self) -> _HasTensors: ...


class _HasTensors(Protocol):
    @property
    def tensors(self) -> Mapping[str, Located]: ...


class Factors:
    """Reads the adapters' factors in the compute dtype; a few stay in memory for updates that share them."""

    def __init__(self, adapters: Sequence[FactorFile], dtype: torch.dtype, device: torch.device) -> None:
        self._adapters = adapters
        self._dtype = dtype
        self._device = device
        self._cache: OrderedDict[tuple[int, str], Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, adapter: int, key: str) -> Tensor:
        """One factor, checked to be finite.

        Raises:
            InputError: `adapter.non-finite` with the tensor and how many of its values are not numbers.
        """
        with self._lock:
            found = self._cache.get((adapter, key))
            if found is not None:
                self._cache.move_to_end((adapter, key))
                return found
        source = self._adapters[adapter]
        located = source.checkpoint.tensors[key]
        raw = bytearray(located.info.nbytes)
        located.file.source.read_into(located.info.begin, memoryview(raw))
        held = TORCH_DTYPES[located.info.dtype]
        flat = torch.frombuffer(raw, dtype=held) if raw else torch.empty(0, dtype=held)
        stored = flat.view(located.info.shape)
        if key in source.transposed:
            stored = stored.mT
        dtype = self._dtype if stored.is_floating_point() else torch.int64
        tensor = stored.to(device=self._device, dtype=dtype).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                "adapter.non-finite",
                f"{quoted(key)} holds {count} values that are not finite numbers",
                fix="the training diverged or the file is damaged: use an earlier save",
                file=source.name,
                tensors=[key],
            )
        with self._lock:
            self._cache[adapter, key] = tensor
            self._bytes += tensor.nbytes
            while self._bytes > FACTOR_CACHE_BYTES and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._bytes -= old.nbytes
        return tensor


def stream(
    plan: Plan,
    sink: Sink,
    *,
    jobs: int,
    device: str = "auto",
    progress: Progress | None = None,
    recorder: Recorder | None = None,
) -> dict[str, Result]:
    """Runs every step of a plan.

    Args:
        plan: what to do.
        sink: where the bytes go.
        jobs: workers, each with one torch thread.
        device: where to compute.
        progress: told (bytes done, bytes in all) now and then, from this thread.
        recorder: told what every changed block was, so that it can come back.

    Returns:
        what became of each tensor, by name.

    Raises:
        InputError: non-finite factors or results, an input that changed or cannot be read.
        OutputError: from the sink.
    """
    return _Run(plan, sink, jobs, choose_device(device), recorder).run(progress)


class _Run:
    def __init__(
        self, plan: Plan, sink: Sink, jobs: int, device: torch.device, recorder: Recorder | None = None
    ) -> None:
        self.plan = plan
        self.recorder = recorder
        self.deltas = Deltas(plan.undo.adapters) if plan.undo is not None else None
        self.sink = sink
        self.jobs = jobs
        self.device = device
        self.dtype = COMPUTE_DTYPES[str(plan.options.get("compute_dtype", "float32"))]
        self.factors = Factors(plan.factor_files, self.dtype, device)
        self.results: dict[str, Result] = {}
        self.files = list(plan.files)
        self.total = sum(step.nbytes for file in self.files for step in file.written)
        self.done = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.files_left: dict[str, int] = {}
        self.steps = {step.tensor: step for step in plan.steps}
        self.tasks: Iterator[tuple[Callable[..., None], tuple[Any, ...]]] = self._tasks()

    def run(self, progress: Progress | None) -> dict[str, Result]:
        threads_before = torch.get_num_threads()
        precision_before = torch.get_float32_matmul_precision()
        torch.set_num_threads(1)  # workers run over blocks; threads inside an operation would only wait for one another
        torch.set_float32_matmul_precision("highest")
        # Waited for by events, not by Thread.join: a signal during a join makes CPython take the thread for finished
        # (bpo-45274), and it would go on writing into what is being cleaned up.
        gone = [threading.Event() for _ in range(self.jobs)]
        # Not daemons: one that a signal caught while it started is not waited for below, and a daemon thread that
        # is still ending when Python ends makes C++ terminate.
        workers = [threading.Thread(target=self._worker, args=(event,)) for event in gone]
        try:
            for worker in workers:
                worker.start()
            last = 0.0
            for event in gone:
                while not event.wait(0.05):
                    if progress is not None and time.monotonic() - last > 0.1:
                        last = time.monotonic()
                        progress(self.done, self.total)
        finally:
            self.stop.set()
            if self.error is not None or sys.exc_info()[0] is not None:
                self._give_up()
            for worker, event in zip(workers, gone, strict=True):
                if worker.ident is not None:  # else it never ran, or will see `stop` before anything else
                    event.wait()
                    worker.join()
            torch.set_num_threads(threads_before)
            torch.set_float32_matmul_precision(precision_before)
        if self.error is not None:
            raise self.error
        if progress is not None:
            progress(self.total, self.total)
        return self.results

    def _worker(self, gone: threading.Event) -> None:
        lane: Lane | None = None
        try:
            with torch.inference_mode():
                lane = self._lane()
                while not self.stop.is_set():
                    with self.lock:
                        task = next(self.tasks, None)
                    if task is None:
                        return
                    function, arguments = task
                    function(lane, *arguments)
        except BaseException as error:  # handed to the caller's thread, which raises it
            with self.lock:
                if self.error is None:
                    self.error = error
            self.stop.set()
            self._give_up()
        finally:
            try:
                if lane is not None:
                    lane.close()
            finally:
                gone.set()

    def _give_up(self) -> None:
        """Nobody need wait any longer for bytes that come from elsewhere."""
        for file in self.plan.base.files:
            cancel = getattr(file.source, "cancel", None)
            if cancel is not None:
                cancel()

    def _lane(self) -> Lane:
        longest, widest = BLOCK_BYTES, BLOCK_BYTES
        for file in self.files:
            for step in file.steps:
                rows, row_bytes = row_layout(bits(step.dtype), step.shape)
                longest = max(longest, row_bytes)
                if self.recorder is not None or step.undo is not None:
                    widest = max(widest, row_bytes)
                if step.dtype != step.source.info.dtype and rows:
                    block = row_blocks(rows, row_bytes)
                    if block:
                        in_row = step.source.info.nbytes // rows
                        widest = max(widest, (block[0][1] - block[0][0]) * in_row)
        if self.device.type == "cuda":
            return CudaLane(longest, widest, self.dtype, self.device)
        if self.device.type != "cpu":
            return DeviceLane(longest, widest, self.dtype, self.device)
        return Lane(longest, widest, self.dtype)

    def _tasks(self) -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
        """The tasks of every file, file by file; side by side where the base comes in several streams at once.

        An undo file holds blocks in the order of the tasks: file by file, wherever the base comes from. Called under
        the lock.
        """
        abreast = max((getattr(file.source, "abreast", 1) for file in self.plan.base.files), default=1)
        if self.recorder is not None:
            abreast = 1
        left = deque(self.files)
        turn: deque[tuple[set[int], Iterator[tuple[Callable[..., None], tuple[Any, ...]]]]] = deque()
        while left or turn:
            while left and len(turn) < abreast:
                sources = {id(step.source.file.source) for step in left[0].steps}
                if any(sources & others for others, _ in turn):
                    break  # a stream is read by one file at a time: it goes in one direction only
                turn.append((sources, self._tasks_of(left.popleft())))
            sources, tasks = turn.popleft()
            task = next(tasks, None)
            if task is not None:
                yield task
                if abreast == 1:
                    turn.appendleft((sources, tasks))
                else:
                    turn.append((sources, tasks))

    def _tasks_of(self, file: OutputFile) -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
        """Blocks in file order; runs of small untouched tensors travel together."""
        header, infos = file.layout()
        end = infos[-1].end if infos else len(header)
        if file.frame is not None:
            end = file.frame.source.size
        stay = {step.tensor for step in file.steps if file.lies_there(step)}
        self.results |= {name: Result(None) for name in stay}
        works = [
            self._work(file, step, info)
            for step, info in zip(file.steps, infos, strict=True)
            if step.tensor not in stay
        ]
        self.files_left[file.name] = sum(1 for w in works if w.left) + 1
        if not self.sink.begin(file, header, end):
            self.done += sum(work.info.nbytes for work in works)
            self.results |= {work.step.tensor: Result(None) for work in works}
            return
        run: list[_Work] = []
        for work in works:
            if not work.blocks:
                self.results[work.step.tensor] = Result(tensor_digest([]))
                continue
            if work.step.verbatim and work.info.nbytes <= BLOCK_BYTES and len(work.blocks) == 1:
                if run and not _adjacent(run, work):
                    yield self._copy_run, (run,)
                    run = []
                run.append(work)
                continue
            if run:
                yield self._copy_run, (run,)
                run = []
            one = self._copy_block if work.step.verbatim else self._change_block
            for index in range(len(work.blocks)):
                if self.recorder is not None and not work.step.verbatim:
                    self.recorder.announce(work.step, index)
                yield one, (work, index)
        if run:
            yield self._copy_run, (run,)
        yield self._file_part_done, (file,)

    def _work(self, file: OutputFile, step: Step, info: TensorInfo) -> _Work:
        rows, row_bytes = row_layout(bits(step.dtype), step.shape)
        blocks = row_blocks(rows, row_bytes)
        n = len(blocks)
        return _Work(
            file,
            step,
            info,
            rows,
            row_bytes,
            blocks,
            [b""] * n,
            [b""] * n,
            [Measured() for _ in range(n)],
            [b""] * n,
            n,
        )

    def _copy_run(self, lane: Lane, run: list[_Work]) -> None:
        """Small tensors that lie side by side in source and output: one read, one write."""
        first, last = run[0], run[-1]
        length = last.info.end - first.info.begin
        view = lane.window(first.info.begin, length)
        first.step.source.file.source.read_into(first.step.source.info.begin, view)
        for work in run:
            at = work.info.begin - first.info.begin
            work.digests[0] = block_digest(view[at : at + work.info.nbytes])
        self.sink.write(first.file, first.info.begin, view)
        for work in run:
            self._block_done(work, work.info.nbytes)

    def _copy_block(self, lane: Lane, work: _Work, index: int) -> None:
        r0, r1 = work.blocks[index]
        offset = work.info.begin + r0 * work.row_bytes
        view = lane.window(offset, (r1 - r0) * work.row_bytes)
        source = work.step.source
        source.file.source.read_into(source.info.begin + r0 * work.row_bytes, view)
        work.digests[index] = block_digest(view)
        self.sink.write(work.file, offset, view)
        self._block_done(work, len(view))

    def _change_block(self, lane: Lane, work: _Work, index: int) -> None:
        operators = self._operators(lane, work)
        step = work.step
        if not operators.each and step.undo is None and step.dtype == step.source.info.dtype:
            self._copy_block(lane, work, index)  # every update is zero: the bytes, not their sum with zero
            if self.recorder is not None:
                self.recorder.skip(step, index)
            return
        r0, r1 = work.blocks[index]
        cols = work.row_bytes * 8 // bits(step.dtype)
        length = (r1 - r0) * work.row_bytes
        offset = work.info.begin + r0 * work.row_bytes
        view = lane.window(offset, length)
        aligned = offset % (bits(step.dtype) // 8) == 0
        target = _tensor(lane.output, offset, r1 - r0, cols, step.dtype) if aligned else None
        if target is None:
            # An odd tensor before this one left it at an odd offset, where kernels do not work: work beside it.
            target = torch.empty((r1 - r0) * cols, dtype=TORCH_DTYPES[step.dtype])
        in_row = cols * bits(step.source.info.dtype) // 8
        keeps = self.recorder is not None or step.undo is not None  # the original, beside what it becomes
        if step.dtype == step.source.info.dtype and aligned and not keeps:
            read, source = view, target
        else:
            buffer = lane.input()
            read = buffer.window(0, (r1 - r0) * in_row)
            source = _tensor(buffer, 0, r1 - r0, cols, step.source.info.dtype)
        step.source.file.source.read_into(step.source.info.begin + r0 * in_row, read)
        if step.source.input == 0:
            work.sources[index] = block_digest(read)
        if step.undo is not None:
            stays = not operators.each and step.dtype == step.source.info.dtype
            source = self.brought_back(step, index, source, r0 * cols, cols, target if stays else None)
            work.originals[index] = block_digest(source.view(torch.uint8).numpy().data)
        measure = any(u.kind != "token-rows" for u in step.updates)
        if operators.each:
            try:
                work.measured[index] = lane.change(source, target, r0 * cols, cols, operators, measure)
            except NonFinite as error:
                raise self._non_finite(work, error) from None
        elif source is not target:
            target.copy_(source)
        if self.recorder is not None and operators.each:
            self.recorder.record(step, index, source, target, r0 * cols, cols)
        elif self.recorder is not None:
            self.recorder.skip(step, index)
        if not aligned:
            view[:] = target.view(torch.uint8).numpy().data
        came_back = step.undo is not None and source is target  # nothing was added to it
        work.digests[index] = work.originals[index] if came_back else block_digest(view)
        self.sink.write(work.file, offset, view)
        self._block_done(work, length)

    def brought_back(
        self, step: Step, index: int, merged: Tensor, first: int, cols: int, out: Tensor | None = None
    ) -> Tensor:
        """The original of a merged block, in `out` if that is given."""
        undo = self.plan.undo
        assert undo is not None and self.deltas is not None
        try:
            return bring_back(undo, step.source.name, index, merged, first, cols, self.deltas, out)
        except InputError as error:
            info, undone = step.source.info, undo.tensors[step.source.name]
            held = digest_tensor(step.source.file.source, info.begin, bits(info.dtype), info.shape)
            if undone.merged in (None, held):
                raise
            raise edited(step.source.name, self.plan.base.name) from error  # the code is right, what it is for is not

    def _operators(self, lane: Lane, work: _Work) -> Operators:
        """The operators of a tensor, built by the worker that needs them first."""
        with work.lock:
            if work.operators is None:
                built = [u.operator(self.factors.read, _Weights(self, work.step)) for u in work.step.updates]
                lane.finish_operators()
                each = [o for o in built if o is not None]
                work.operators = Operators(each, not in_place(work.step.updates))
        return work.operators

    def source_blocks(self, step: Step) -> Iterator[tuple[int, Tensor]]:
        """(first element, block) over a step's source tensor, in whole rows, in the compute dtype."""
        info = step.source.info
        rows, row_bytes = row_layout(bits(step.dtype), step.shape)
        cols = row_bytes * 8 // bits(step.dtype)
        in_row = cols * bits(info.dtype) // 8
        per = max(1, (4 << 20) // in_row)
        cuts = [(r0, min(r0 + per, rows)) for r0 in range(0, rows, per)]
        if step.undo is not None:
            cuts = row_blocks(rows, row_bytes)  # as they were recorded
        for index, (r0, r1) in enumerate(cuts):
            raw = bytearray((r1 - r0) * in_row)
            step.source.file.source.read_into(info.begin + r0 * in_row, memoryview(raw))
            stored = torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype])
            if step.undo is not None:
                stored = self.brought_back(step, index, stored, r0 * cols, cols)
            yield r0 * cols, stored.to(device=self.device, dtype=self.dtype)

    def _block_done(self, work: _Work, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            work.left -= 1
            if work.left:
                return
        if work.step.undo is not None:
            assert self.plan.undo is not None
            check_digests(self.plan.undo, work.step.source.name, work.sources, work.originals, self.plan.base.name)
        with self.lock:
            self.results[work.step.tensor] = _result(work)
            work.operators = None
        self._file_part_done(None, work.file)

    def _file_part_done(self, lane: Lane | None, file: OutputFile) -> None:
        with self.lock:
            self.files_left[file.name] -= 1
            last = self.files_left[file.name] == 0
        if last:
            self.sink.end(file)

    def _non_finite(self, work: _Work, error: NonFinite) -> LoramergeError:
        step = work.step
        if error.inherited:
            return InputError(
                "base.non-finite",
                f"{quoted(step.tensor)} is not finite in the base already",
                fix="the base is damaged: download it again",
                file=step.source.file.source.name,
                tensors=[step.tensor],
            )
        return UnsupportedError(
            "merge.overflow",
            f"{error.count} values of {quoted(step.tensor)} do not fit {display(step.dtype)} "
            f"(the largest is {error.largest:.4g})",
            fix="--dtype bfloat16 (or float32), or a smaller weight",
            file=step.source.file.source.name,
            tensors=[step.tensor],
        )


class _Weights:
    """The weights of the base as an update of one tensor may see them (`loramerge.adapters.updates.Weights`)."""

    def __init__(self, run: _Run, step: Step) -> None:
        self._run = run
        self._step = step

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        return self._run.source_blocks(self._step)

    def before(self, tensor: str, update: Update) -> Tensor:
        step = self._run.steps[tensor]
        whole = torch.cat([block for _, block in self._run.source_blocks(step)])
        apply_earlier(whole, step.updates, update, self._run.factors.read, _Weights(self._run, step))
        return whole


def _adjacent(run: list[_Work], work: _Work) -> bool:
    """Whether a tensor follows a run directly, in the source file and in the output, and still fits one block."""
    first, last = run[0], run[-1]
    return (
        work.step.source.file is last.step.source.file
        and work.step.source.info.begin == last.step.source.info.end
        and work.info.begin == last.info.end
        and work.info.end - first.info.begin <= BLOCK_BYTES
    )


def _tensor(buffer: AlignedBuffer, offset: int, rows: int, cols: int, dtype: str) -> Tensor:
    """The kernels' view of a window of a buffer."""
    start = buffer.start_of(offset)
    return torch.frombuffer(buffer.memory, dtype=TORCH_DTYPES[dtype], count=rows * cols, offset=start)


def _result(work: _Work) -> Result:
    result = Result(tensor_digest(work.digests))
    if work.step.undo is not None:
        result.source_digest = tensor_digest(work.originals)
    elif work.step.source.input == 0:
        sources = work.sources if all(work.sources) else work.digests
        same_layout = work.step.dtype == work.step.source.info.dtype
        result.source_digest = tensor_digest(sources) if same_layout else None
    result.unchanged = not work.step.verbatim and not any(work.sources) and work.step.source.input == 0
    result.kept = sum(m.kept for m in work.measured)
    result.wanted = sum(m.wanted for m in work.measured)
    return result
