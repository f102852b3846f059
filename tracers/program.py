# SPDX-License-Identifier: MIT
"""Loads the BPF programs, attaches them, and reads their maps.

One text is compiled for all of a run (compiled.py). The rest goes through bpf(2) directly,
because BCC has no tp_btf programs, and importing it takes long. Everything is held by file
descriptors: closing them, also by dying, detaches and frees all of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from cffi import FFI

from rsplice.errors import RspliceError
from rsplice.tracers.btf import Btf
from rsplice.tracers.compiled import MapSpec, compiled, map_places

_HERE = Path(__file__).resolve().parent
_SOURCES = ("access.h", "maps.h", "processes.h", "ends.h", "usdt.h", "asides.h", "account.h",
            "pages.h", "sockets.h", "judgements.h", "journey.h", "findings.h", "lent.h",
            "contents.h", "copies.h", "moments.h", "loans.h", "tails.h", "syscalls.c", "findings.c",
            "lifecycle.c", "pagecache.c", "network.c", "fuse_ring.c", "fuse.c", "io_uring.c",
            "journey.c", "usdt.c", "copies.c", "moments.c", "learn.c")  # fmt: skip

# include/uapi/linux/bpf.h
_MAP_CREATE = 0
_MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT, _MAP_LOOKUP_BATCH = 1, 2, 3, 4, 24
_MAP_TAKE = 21  # BPF_MAP_LOOKUP_AND_DELETE_ELEM
_PROG_LOAD, _TEST_RUN, _RAW_TRACEPOINT_OPEN, _LINK_CREATE = 5, 10, 17, 28
_TYPE_KPROBE, _TYPE_RAW_TRACEPOINT, _TYPE_TRACING = 2, 17, 26
_ATTACH_TRACE_RAW_TP, _ATTACH_TRACE_FENTRY, _ATTACH_TRACE_FEXIT = 23, 24, 25
_ATTACH_PERF_EVENT, _ATTACH_UPROBE_MULTI = 41, 48
_OBJ_GET_INFO = 15
_INFO_SIZE, _INFO_RECURSION_MISSES = 216, 208  # struct bpf_prog_info
_LINK_INFO_SIZE, _LINK_INFO_MISSED = 64, 48  # struct bpf_link_info, of a kprobe
# BPF_MAP_TYPE_PERCPU_HASH, _PERCPU_ARRAY, _LRU_PERCPU_HASH
_PERCPU = (5, 6, 10)
_SYS_BPF, _SYS_PERF_EVENT_OPEN = 321, 298
# include/uapi/linux/perf_event.h
_PERF_ATTR_SIZE, _PERF_FLAG_FD_CLOEXEC = 112, 8
_UPROBE_TYPE = Path("/sys/bus/event_source/devices/uprobe/type")
KPROBE_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")  #: there where kprobes are
_IOC_SET_BPF, _IOC_ENABLE = 0x40042408, 0x2400
_KRETPROBE = 1  # perf_event_attr.config, /sys/bus/event_source/devices/kprobe/format/retprobe
_CALL, _PSEUDO_KFUNC_CALL = 0x85, 2
_BATCH = 256  #: entries of a map that are read at once
# union bpf_attr: in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags
_BATCH_ATTRIBUTES = struct.Struct("=QQQQIIQQ")
_NOT_HERE = (errno.EINVAL, errno.ENOSPC, 524)  # 524: ENOTSUPP, the kernel's own
_CAST_CALL = 0x7FFF0001  # access.h

_ffi = FFI()
_ffi.cdef("long syscall(long number, ...); int *__errno_location(void);")
_libc: Any = _ffi.dlopen(None)


class BpfError(Exception):
    """bpf(2) failed: the errno, and the verifier's last words if there are any."""

    def __init__(self, number: int, log: str = "") -> None:
        super().__init__(f"{os.strerror(number)}{': ' + log if log else ''}")
        self.errno = number


def _bpf(command: int, attributes: bytes) -> int:
    """bpf(2). BpfError with its errno on failure."""
    return _bpf_at(command, _ffi.new("char[]", attributes.ljust(128, b"\0")))


def _bpf_at(command: int, attr: Any) -> int:
    """bpf(2) with 128 bytes of attributes, which it may write to."""
    result = _libc.syscall(
        _ffi.cast("long", _SYS_BPF), _ffi.cast("int", command), attr, _ffi.cast("unsigned int", 128)
    )
    if result < 0:
        raise BpfError(_libc.__errno_location()[0])
    return int(result)


def _open_uprobe(path: Any, offset: int) -> int:
    """An event for the instruction at *offset* of a file, in all processes. BpfError on failure."""
    try:
        kind = int(_UPROBE_TYPE.read_text())
    except OSError:
        raise BpfError(errno.EOPNOTSUPP, "this kernel has no uprobes") from None
    return _perf_event(kind, 0, _address(path), offset)


def _perf_event(kind: int, config: int, first: int, second: int) -> int:
    """An event of the PMU *kind* for all processes. BpfError on failure.

    :param first: config1, for a probe the address of a name
    :param second: config2, for a probe an offset
    """
    attributes = struct.pack("=IIQQQQQIIQQ", kind, _PERF_ATTR_SIZE, config, *[0] * 6, first, second)
    attr = _ffi.new("char[]", attributes.ljust(_PERF_ATTR_SIZE, b"\0"))
    everybody, any_cpu, no_group = (_ffi.cast("int", n) for n in (-1, 0, -1))
    fd = _libc.syscall(
        _ffi.cast("long", _SYS_PERF_EVENT_OPEN), attr, everybody, any_cpu, no_group,
        _ffi.cast("unsigned long", _PERF_FLAG_FD_CLOEXEC),
    )  # fmt: skip
    if fd < 0:
        raise BpfError(_libc.__errno_location()[0])
    return int(fd)


def _recursion_misses(program: int) -> int:
    """Of the program behind a descriptor."""
    info = _ffi.new("char[]", _INFO_SIZE)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", program, _INFO_SIZE, _address(info)))
    return int(struct.unpack_from("=Q", _ffi.buffer(info), _INFO_RECURSION_MISSES)[0])


def _breakpoint_misses(link: int) -> int:
    """Of the kprobe or kretprobe behind a link's descriptor."""
    info = _ffi.new("char[]", _LINK_INFO_SIZE)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", link, _LINK_INFO_SIZE, _address(info)))
    return int(struct.unpack_from("=Q", _ffi.buffer(info), _LINK_INFO_MISSED)[0])


def can_fexit(function: int) -> bool:
    """Whether the kernel lets a program be loaded for the return of the function of that BTF id."""
    nothing = bytearray(bytes.fromhex("b7000000000000009500000000000000"))  # r0 = 0; exit
    try:
        os.close(Program._load("nothing", nothing, _TYPE_TRACING, _ATTACH_TRACE_FEXIT, function))
    except BpfError:
        return False
    return True


def _address(data: Any) -> int:
    return int(_ffi.cast("uintptr_t", data))


def source_text(defines: str) -> str:
    """The whole BPF text, with *defines* in front and lines that name their files."""
    parts = [defines]
    for name in _SOURCES:
        parts.append(f'#line 1 "{name}"\n' + (_HERE / "bpf" / name).read_text())
    return "".join(parts)


class Map:
    """A BPF map, read and written as bytes.

    :param fd: its descriptor, owned by the Program
    :param key_size: bytes of a key
    :param value_size: bytes of a value, of one CPU's
    :param cpus: how many values an entry has: possible CPUs for a per-CPU map, else 1
    """

    def __init__(self, fd: int, key_size: int, value_size: int, cpus: int = 1) -> None:
        self.fd = fd
        self.cpus = cpus
        self.value_size = value_size
        self._stride = (value_size + 7) & ~7 if cpus > 1 else value_size
        self._key = _ffi.new("char[]", key_size)
        self._next = _ffi.new("char[]", key_size)
        self._value = _ffi.new("char[]", self._stride * cpus)
        self._batches = True
        self._takes = True

    def _call(self, command: int, value: Any, key: Any = None) -> None:
        key = self._key if key is None else key
        _bpf(command, struct.pack("=IIQQQ", self.fd, 0, _address(key), _address(value), 0))

    def get(self, key: bytes) -> list[bytes] | None:
        """The values of *key*, one per CPU; None if there is no such entry."""
        return self._get(_MAP_LOOKUP, key)

    def take(self, key: bytes) -> list[bytes] | None:
        """Removes *key*: its last values, one per CPU; None if there is no such entry.

        In one step for hashes by CPU since 5.14; before, what is added between two steps is lost.
        """
        if self._takes:
            try:
                return self._get(_MAP_TAKE, key)
            except BpfError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._takes = False
        values = self.get(key)
        self.delete(key)
        return values

    def _get(self, command: int, key: bytes) -> list[bytes] | None:
        _ffi.buffer(self._key)[:] = key
        try:
            self._call(command, self._value)
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        raw = bytes(_ffi.buffer(self._value))
        return [raw[i * self._stride :][: self.value_size] for i in range(self.cpus)]

    def put(self, key: bytes, value: bytes) -> None:
        _ffi.buffer(self._key)[:] = key
        _ffi.buffer(self._value)[: len(value)] = value
        self._call(_MAP_UPDATE, self._value)

    def delete(self, key: bytes) -> None:
        """Removes *key*; it is no error if it is gone already."""
        _ffi.buffer(self._key)[:] = key
        try:
            self._call(_MAP_DELETE, _ffi.NULL)
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise

    def items(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """All entries. Entries that vanish meanwhile are passed over."""
        if self._batches:
            try:
                yield from self._batched()
                return
            except BpfError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._batches = False
        yield from self._one_by_one()

    def _batched(self) -> list[tuple[bytes, list[bytes]]]:
        """All entries, many at once: hashes since 5.6, arrays by CPU since 5.13."""
        key_size = len(_ffi.buffer(self._key))
        size = self._stride * self.cpus
        keys = _ffi.new("char[]", key_size * _BATCH)
        values = _ffi.new("char[]", size * _BATCH)
        place = _ffi.new("char[]", max(8, key_size))
        attr = _ffi.new("char[128]")
        found: dict[bytes, list[bytes]] = {}
        begin, more = 0, True
        while more:
            fields = _BATCH_ATTRIBUTES.pack(
                begin, _address(place), _address(keys), _address(values), _BATCH, self.fd, 0, 0
            )
            _ffi.buffer(attr)[: len(fields)] = fields
            try:
                _bpf_at(_MAP_LOOKUP_BATCH, attr)
            except BpfError as error:
                if error.errno != errno.ENOENT:
                    raise
                more = False  # these are the last
            begin = _address(place)
            count = _BATCH_ATTRIBUTES.unpack_from(_ffi.buffer(attr))[4]
            raw_keys = bytes(_ffi.buffer(keys, count * key_size))
            raw = bytes(_ffi.buffer(values, count * size))
            for i in range(count):
                at = i * size
                found[raw_keys[i * key_size :][:key_size]] = [
                    raw[at + cpu * self._stride :][: self.value_size] for cpu in range(self.cpus)
                ]
        return list(found.items())

    def _one_by_one(self) -> Iterator[tuple[bytes, list[bytes]]]:
        keys: list[bytes] = []
        current: Any = _ffi.NULL
        limit = 1 << 20  # a key deleted under the cursor restarts the walk
        while len(keys) < limit:
            try:
                self._call(_MAP_NEXT, self._next, current)
            except BpfError as error:
                if error.errno == errno.ENOENT:
                    break
                raise
            keys.append(bytes(_ffi.buffer(self._next)))
            _ffi.buffer(self._key)[:] = keys[-1]
            current = self._key
        for key in dict.fromkeys(keys):
            values = self.get(key)
            if values is not None:
                yield key, values


def possible_cpus() -> int:
    """How many values an entry of a per-CPU map has."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return max(int(part.split("-")[-1]) for part in text.split(",")) + 1


def _create_map(spec: MapSpec) -> int:
    """The descriptor of a new map. BpfError, most likely for want of memory or privilege."""
    name = re.sub(r"\W", "_", spec.name).encode()[:15]
    attributes = struct.pack(
        "=IIIIIII16s", spec.type, spec.key_size, spec.value_size, spec.entries, spec.flags, 0, 0,
        name,
    )  # fmt: skip
    try:
        return _bpf(_MAP_CREATE, attributes)
    except BpfError as error:
        if error.errno != errno.EPERM:
            raise
        # Before 5.11 maps count as locked memory.
        hard = resource.RLIM_INFINITY
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        return _bpf(_MAP_CREATE, attributes)


def _with_maps(code: bytes, fds: Sequence[int]) -> bytes:
    """*code* with the descriptors of maps in the place of their numbers."""
    patched = bytearray(code)
    for at in map_places(code):
        (number,) = struct.unpack_from("=i", patched, at + 4)
        struct.pack_into("=i", patched, at + 4, fds[number])
    return bytes(patched)


class Program:
    """The compiled BPF text, its maps, and the probes attached so far.

    :param text: C text from source_text()
    :param btf: of the running kernel, for tp_btf
    :param direct: load as tp_btf with direct reads (access.h), else as raw tracepoints
    :param keep: whether other runs have the same text
    """

    def __init__(self, text: str, btf: Btf, direct: bool, keep: bool = True) -> None:
        self._btf = btf
        self._direct = direct
        self._fds: list[int] = []
        self._slow_fds: list[int] = []  # of uprobes, and of what is at functions of the kernel
        self._attached: list[int] = []  # programs that missed() asks
        self._breakpoints: list[int] = []  # links, some of _slow_fds, that it asks too
        self._held: list[tuple[int, str]] = []  # programs that are attached again and again
        self._runs: dict[str, int] = {}  # those that run_once() has loaded
        self._functions = dict[str, bytes]()
        self._maps: dict[str, tuple[MapSpec, int]] = {}
        found = compiled(text, keep)
        try:
            for spec in found.maps:
                self._maps[spec.name] = (spec, _create_map(spec))
        except BpfError as error:
            self.close()
            raise RspliceError(
                f"the kernel makes no map {spec.name} for the probes: {error}"
            ) from error
        fds = [fd for _, fd in self._maps.values()]
        for name, code in found.functions.items():
            self._functions[name] = _with_maps(code, fds)

    def has(self, function: str) -> bool:
        """Whether the text, as compiled for this kernel, defines *function*."""
        return function in self._functions

    def map(self, name: str) -> Map:
        spec, fd = self._maps[name]
        cpus = possible_cpus() if spec.type in _PERCPU else 1
        return Map(fd, spec.key_size, spec.value_size, cpus)

    def attach(self, program: int, tracepoint: str, hold: bool = False) -> None:
        """Attaches a loaded program, which it takes over, to the raw tracepoint it is for.

        BpfError on failure.

        :param hold: keep the program, for attach_again()
        """
        try:
            self._attach(program, tracepoint)
        except BpfError:
            os.close(program)
            raise
        self._attached.append(program)
        if hold:
            self._held.append((program, tracepoint))

    def _attach(self, program: int, tracepoint: str) -> None:
        name = _ffi.new("char[]", tracepoint.encode())
        where = 0 if self._direct else _address(name)
        self._fds.append(_bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QII", where, program, 0)))

    def detach(self) -> None:
        """Detaches what is on raw tracepoints; programs and maps stay."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def attach_again(self) -> None:
        """Attaches what detach() has detached and was to be held. BpfError on failure."""
        for program, tracepoint in self._held:
            self._attach(program, tracepoint)

    def set_tail(self, array: str, index: int, program: int) -> None:
        """Lets other programs end in *program*. Its descriptor stays the caller's."""
        self.map(array).put(struct.pack("=I", index), struct.pack("=I", program))

    def load(self, function: str, tracepoint: str) -> int:
        """Has the kernel check *function* for *tracepoint*; the program's descriptor.

        BpfError on failure. Several threads may load at once.
        """
        code = self._code(function)
        if not self._direct:
            return self._load(function, code, _TYPE_RAW_TRACEPOINT)
        self._use_cast(code)
        attach_id = self._btf.tracepoint_id(tracepoint) or 0
        return self._load(function, code, _TYPE_TRACING, _ATTACH_TRACE_RAW_TP, attach_id)

    def run_once(self, function: str, *arguments: int) -> None:
        """Runs *function* here and now, as if a raw tracepoint had been hit with *arguments*.

        BpfError on failure.
        """
        context = _ffi.new("unsigned long long[]", list(arguments))
        if function not in self._runs:
            code = self._code(function)
            self._runs[function] = self._load(function, code, _TYPE_RAW_TRACEPOINT)
        _bpf(
            _TEST_RUN,
            struct.pack(
                "=IIIIQQIIIIQQII", self._runs[function], 0, 0, 0, 0, 0, 0, 0,
                8 * len(arguments), 0, _address(context), 0, 0, 0,
            ),
        )  # fmt: skip

    def _code(self, function: str) -> bytearray:
        """The instructions of *function*; BpfError if the text has none of that name."""
        if function not in self._functions:
            raise BpfError(errno.ENOENT)
        return bytearray(self._functions[function])

    @staticmethod
    def _load(
        function: str, code: bytearray, program_type: int, attach_type: int = 0, attach_id: int = 0
    ) -> int:
        instructions = _ffi.from_buffer(code)
        licence = _ffi.new("char[]", b"GPL")
        for log_size in (0, 1 << 22):  # the verifier's log is only paid for when it is needed
            log = _ffi.new("char[]", log_size or 1)
            attributes = struct.pack(
                "=IIQQIIQII16sIIIIQIIQII", program_type, len(code) // 8, _address(instructions),
                _address(licence), 1 if log_size else 0, log_size,
                _address(log) if log_size else 0, 0, 0, function.encode()[:15], 0, attach_type,
                0, 0, 0, 0, 0, 0, 0, attach_id,
            )  # fmt: skip
            try:
                return _bpf(_PROG_LOAD, attributes)
            except BpfError as error:
                if log_size or error.errno == errno.EPERM:
                    text = bytes(_ffi.buffer(log)).split(b"\0")[0].decode(errors="replace")
                    words = text.strip().splitlines()
                    last = " / ".join(words[-3:-1])
                    raise BpfError(error.errno, f"{function}: {last}" if last else "") from None
        raise AssertionError("unreachable")

    def load_uprobe(self, function: str, many: bool) -> int:
        """Has the kernel check *function* for attach_uprobes(); the program's descriptor.

        BpfError on failure.
        """
        return self._load(
            function, self._code(function), _TYPE_KPROBE, _ATTACH_UPROBE_MULTI if many else 0
        )

    def attach_uprobes(
        self, program: int, many: bool, file: int, places: Sequence[tuple[int, int]]
    ) -> None:
        """Attaches a program to instructions of a file, in all processes, or to none of them.

        BpfError on failure. The program's descriptor stays the caller's.

        :param many: by one link for all (Linux 6.6), else by an event each (Linux 5.15)
        :param file: a descriptor of the file
        :param places: offset of an instruction, and the cookie that the program is told there
        """
        path = _ffi.new("char[]", f"/proc/self/fd/{file}".encode())
        if many:
            offsets = _ffi.new("uint64_t[]", [offset for offset, _ in places])
            cookies = _ffi.new("uint64_t[]", [cookie for _, cookie in places])
            attributes = struct.pack(
                "=IIIIQQQQIII", program, 0, _ATTACH_UPROBE_MULTI, 0, _address(path),
                _address(offsets), 0, _address(cookies), len(places), 0, 0,
            )  # fmt: skip
            self._slow_fds.append(_bpf(_LINK_CREATE, attributes))
            return
        links: list[int] = []
        try:
            for offset, cookie in places:
                event = _open_uprobe(path, offset)
                where = struct.pack("=IIIIQ", program, event, _ATTACH_PERF_EVENT, 0, cookie)
                try:
                    links.append(_bpf(_LINK_CREATE, where))
                finally:
                    os.close(event)  # the link holds it
        except BpfError:
            _close_all(links)
            raise
        self._slow_fds += links

    def attach_raw(self, function: str, tracepoint: str) -> None:
        """Attaches *function*, which reads no kernel memory directly, to a raw tracepoint.

        The tracepoint may be a module's. BpfError on failure.
        """
        name = _ffi.new("char[]", tracepoint.encode())
        program = self._load(function, self._code(function), _TYPE_RAW_TRACEPOINT)
        try:
            where = struct.pack("=QII", _address(name), program, 0)
            self._fds.append(_bpf(_RAW_TRACEPOINT_OPEN, where))
        except BpfError:
            os.close(program)
            raise
        self._attached.append(program)

    def attach_trampoline(self, function: str, kernel_function: str, at_return: bool) -> None:
        """Attaches *function* to the entry of a function of the kernel, or to its return.

        BpfError on failure.
        """
        where = self._btf.function_id(kernel_function)
        if where is None:
            raise BpfError(errno.ENOENT)
        code = self._code(function)
        if self._direct:
            self._use_cast(code)
        kind = _ATTACH_TRACE_FEXIT if at_return else _ATTACH_TRACE_FENTRY
        program = self._load(function, code, _TYPE_TRACING, kind, where)
        try:
            link = _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QII", 0, program, 0))
        except BpfError:
            os.close(program)
            raise
        self._slow_fds.append(link)
        self._attached.append(program)

    def missed(self) -> int:
        """How often the kernel passed over a program, whoever's event that was.

        Because it ran already on the same CPU: an interrupt comes into a program, or from 7.0 on
        any other task (__bpf_trace_run(), kernel/trace/bpf_trace.c). Or because all instances of a
        breakpoint were in use. That is recursion_misses of struct bpf_prog_info (Linux 5.12), and
        missed of struct bpf_link_info (6.7); 0 before that.
        """
        programs = sum(map(_recursion_misses, self._attached))
        return programs + sum(map(_breakpoint_misses, self._breakpoints))

    def attach_kprobe(self, function: str, kernel_function: str, at_return: bool) -> None:
        """Attaches *function* to a function of the kernel or of a module of its, by a breakpoint.

        By an event, as every kernel has them. BpfError on failure.
        """
        try:
            kind = int(KPROBE_TYPE.read_text())
        except OSError:
            raise BpfError(errno.EOPNOTSUPP, "this kernel has no kprobes") from None
        name = _ffi.new("char[]", kernel_function.encode())
        event = _perf_event(kind, _KRETPROBE if at_return else 0, _address(name), 0)
        try:
            code = self._code(function)
            if self._direct:
                self._use_cast(code)
            program = self._load(function, code, _TYPE_KPROBE)
            self._attached.append(program)
            try:
                where = struct.pack("=IIIIQ", program, event, _ATTACH_PERF_EVENT, 0, 0)
                self._breakpoints.append(_bpf(_LINK_CREATE, where))
            except BpfError:  # before 5.15 there are no such links
                self._enable(event, program)
                return
        except BpfError:
            os.close(event)
            raise
        os.close(event)  # the link holds it
        self._slow_fds.append(self._breakpoints[-1])

    def _enable(self, event: int, program: int) -> None:
        """Has *event* run a program. BpfError on failure."""
        try:
            fcntl.ioctl(event, _IOC_SET_BPF, program)
            fcntl.ioctl(event, _IOC_ENABLE, 0)
        except OSError as error:
            raise BpfError(error.errno or errno.EINVAL) from error
        self._slow_fds.append(event)

    def _use_cast(self, code: bytearray) -> None:
        """Turns calls of the placeholder into calls of the kfunc bpf_rdonly_cast."""
        kfunc = self._btf.function_id("bpf_rdonly_cast") or 0
        for at in range(0, len(code), 8):
            opcode, _, _, immediate = struct.unpack_from("<BBhi", code, at)
            if opcode == _CALL and immediate == _CAST_CALL:
                struct.pack_into("<BBhi", code, at, _CALL, _PSEUDO_KFUNC_CALL << 4, 0, kfunc)

    def close(self) -> None:
        """Detaches every probe and frees programs and maps."""
        self.detach()
        _close_all(self._slow_fds)
        self._slow_fds.clear()
        for fd in [*self._attached, *self._runs.values()]:
            os.close(fd)
        self._attached.clear()
        self._breakpoints.clear()
        self._runs.clear()
        self._held.clear()
        _close_all([fd for _, fd in self._maps.values()])
        self._maps.clear()


def _close_all(fds: Sequence[int]) -> None:
    """Closes what holds uprobes: 50 to 100 ms for each, which all at once take as long as one."""
    if fds:
        with ThreadPoolExecutor(min(len(fds), 64)) as pool:
            pool.map(os.close, fds)
