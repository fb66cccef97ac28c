"""The prefilter against Hyperscan: the same literals at the same offsets. Peer: Debian's libhyperscan-dev."""

import random
import struct
import subprocess
from pathlib import Path

import pytest

from agent._native import ffi, lib
from agent.core.engine import available_engines
from agent.logs.literals import Literal
from tests.interop.conftest import PeerAbsent

pytestmark = pytest.mark.interop

# Reads u32 count; per literal u32 caseless, size and text; u32 size and block. Prints "end literal" of each occurrence.
SOURCE = r"""
#include <hs/hs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t take(void) { uint32_t n = 0; if (!fread(&n, 4, 1, stdin)) exit(2); return n; }
static char *take_text(size_t *size)
{
    *size = take();
    char *text = malloc(*size + 1);
    if (fread(text, 1, *size, stdin) != *size) exit(2);
    return text;
}
static int show(unsigned id, unsigned long long from, unsigned long long to, unsigned flags, void *context)
{
    printf("%llu %u\n", to, id);
    return 0;
}
int main(void)
{
    uint32_t count = take();
    const char *texts[5000]; unsigned flags[5000], ids[5000]; size_t sizes[5000], size;
    for (uint32_t i = 0; i < count; i++) {
        ids[i] = i;
        flags[i] = take() ? HS_FLAG_CASELESS : 0;
        texts[i] = take_text(&sizes[i]);
    }
    char *block = take_text(&size);
    hs_database_t *database; hs_compile_error_t *error; hs_scratch_t *scratch = NULL;
    if (hs_compile_lit_multi(texts, flags, ids, sizes, count, HS_MODE_BLOCK, NULL, &database, &error)) return 3;
    if (hs_alloc_scratch(database, &scratch)) return 3;
    return hs_scan(database, block, size, 0, scratch, show, NULL) ? 4 : 0;
}
"""
ALPHABET = b"abcdeABE -_=\x00\x7f\x80\xff"


def build_hyperscan(folder: str) -> Path:
    program = Path(folder) / "hyperscan"
    command = ["cc", "-O1", "-x", "c", "-", "-o", str(program), "-lhs"]
    built = subprocess.run(command, input=SOURCE, capture_output=True, text=True)
    if built.returncode:
        raise PeerAbsent("libhyperscan-dev is not installed; packaging/deps peers installs it")
    return program


def found(literals: list[Literal], block: bytes, engine: int) -> list[tuple[int, int]]:
    """(end, literal) by our prefilter."""
    texts = [ffi.from_buffer("uint8_t[]", literal.text) for literal in literals]
    given = [(text, len(text), lit.caseless) for text, lit in zip(texts, literals, strict=True)]
    handle = lib.prefilter_new(ffi.new("struct literal[]", given), len(given), block, len(block) // 2, engine)
    prefilter = ffi.gc(handle, lib.prefilter_free)
    hits, next_at = ffi.new("struct literal_hit[]", 1 << 17), ffi.new("size_t *")
    buffer = ffi.from_buffer("uint8_t[]", block)
    count = lib.prefilter_find(prefilter, buffer, 0, len(block), hits, 1 << 17, next_at)
    assert next_at[0] == len(block)
    return sorted((hits[i].at + len(literals[hits[i].literal].text), hits[i].literal) for i in range(count))


@pytest.mark.parametrize("count", [1, 20, 80, 200, 600, 1500])
def test_the_same_literals_at_the_same_offsets(count: int, peer: object, tmp_path: Path) -> None:
    assert callable(peer)
    program = peer(lambda name: build_hyperscan(str(tmp_path)), "libhyperscan-dev")
    rng = random.Random(count)
    for _ in range(3):
        words = {bytes(rng.choices(ALPHABET, k=rng.randint(2, 24))) for _ in range(count)}
        literals = [Literal(word.lower(), True) if rng.random() < 0.3 else Literal(word) for word in sorted(words)]
        parts = [
            rng.choice(literals).text if rng.random() < 0.3 else bytes(rng.choices(ALPHABET, k=9)) for _ in range(4000)
        ]
        block = b"".join(part.swapcase() if rng.random() < 0.2 else part for part in parts)
        wire = [struct.pack("=I", len(literals))]
        wire += [struct.pack("=II", lit.caseless, len(lit.text)) + lit.text for lit in literals]
        wire += [struct.pack("=I", len(block)), block]
        done = subprocess.run([program], input=b"".join(wire), capture_output=True)
        assert done.returncode == 0
        theirs = sorted(tuple(map(int, line.split())) for line in done.stdout.splitlines())
        assert len(theirs) > len(literals) / 4
        for engine in available_engines().values():
            assert found(literals, block, engine) == theirs
