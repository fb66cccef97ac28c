"""What native/native.h declares, as cffi gives it to Python. The rules of memory and the GIL are told there."""

from collections.abc import Callable
from typing import Any

Bytes = bytes | bytearray | memoryview

class CData:
    """A pointer or array owned by cffi; freed with the last reference."""

    def __getitem__(self, index: int) -> Any: ...
    def __setitem__(self, index: int, value: int) -> None: ...
    def __getattr__(self, field: str) -> Any: ...
    def __len__(self) -> int: ...
    def __add__(self, items: int) -> CData: ...

class CType:
    """A C type, parsed once."""

class _FFI:
    NULL: CData
    def new(self, cdecl: str, init: object = ...) -> CData: ...
    def string(self, text: CData) -> bytes: ...
    def unpack(self, array: CData, length: int) -> list[int]: ...
    def gc(self, pointer: CData, free: Callable[[CData], None]) -> CData: ...
    def typeof(self, cdecl: str) -> CType: ...
    def from_buffer(self, cdecl: str | CType, data: Bytes) -> CData: ...
    def buffer(self, array: CData) -> Any: ...

class _Lib:
    ENGINE_SCALAR: int
    ENGINE_NEON: int
    ENGINE_COUNT: int
    def engine_name(self, engine: int) -> CData: ...
    def engine_available(self, engine: int) -> int: ...
    def engine_best(self) -> int: ...
    def line_ends(self, engine: int, block: bytes, start: int, size: int, ends: CData, capacity: int) -> int: ...

    REGEX_UTF: int
    REGEX_INTERPRET: int
    REGEX_PATTERN_MAX: int
    def regex_compile(self, pattern: bytes, size: int, flags: int, fault: CData) -> CData: ...
    def regex_free(self, regex: CData) -> None: ...
    def regex_jit(self, regex: CData) -> int: ...
    def regex_version(self, text: CData) -> None: ...
    def regex_groups(self, regex: CData) -> int: ...
    def regex_group(self, regex: CData, index: int) -> CData: ...
    def scratch_new(self) -> CData: ...
    def scratch_free(self, scratch: CData) -> None: ...
    def regex_match(self, regex: CData, scratch: CData, text: bytes, size: int, flags: int, captures: CData) -> int: ...

    LITERAL_MIN: int
    LITERAL_MAX: int
    def prefilter_new(self, literals: CData, count: int, sample: bytes, sample_size: int, engine: int) -> CData: ...
    def prefilter_free(self, prefilter: CData) -> None: ...
    def prefilter_find(
        self,
        prefilter: CData,
        block: CData,
        start: int,
        size: int,
        hits: CData,
        capacity: int,
        next: CData,
    ) -> int: ...

    MATCH_WINDOW: int
    MATCH_PARTIAL: int
    MATCH_LIMIT: int
    LINE_MAX_SIZE: int
    WINDOW_STEP: int
    END_LINE: int
    END_OPEN: int
    END_PARTIAL: int
    def scanner_new(
        self,
        rules: CData,
        rule_count: int,
        literals: CData,
        literal_count: int,
        members: CData,
        sample: bytes,
        sample_size: int,
        engine: int,
    ) -> CData: ...
    def scanner_free(self, scanner: CData) -> None: ...
    def worker_new(self, scanner: CData) -> CData: ...
    def worker_free(self, worker: CData) -> None: ...
    def worker_tries(self, worker: CData) -> int: ...
    def scan(
        self,
        scanner: CData,
        worker: CData,
        block: CData,
        size: int,
        before: CData,
        end: int,
        suspended: CData,
        matches: CData,
        capacity: int,
        captures: CData,
        captures_capacity: int,
        consumed: CData,
    ) -> int: ...
    def match_seed(self, device: int, inode: int, generation: int) -> int: ...
    def match_id(self, seed: int, offset: int, rule: int) -> int: ...
    def format_matches(
        self,
        format: CData,
        matches: CData,
        count: int,
        captures: CData,
        block: CData,
        offset: int,
        numbers: CData,
        out: CData,
        capacity: int,
        done: CData,
    ) -> int: ...

    SPAWN_DESCRIPTORS: int
    SPAWN_CWD: int
    SPAWN_CGROUP: int
    SPAWN_AFFINITY: int
    SPAWN_USER: int
    SPAWN_LIMITS: int
    SPAWN_EXEC: int
    def spawn_program(self, spawn: CData, fault: CData) -> int: ...

ffi: _FFI
lib: _Lib
