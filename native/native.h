#ifndef EMISSARY_NATIVE_H
#define EMISSARY_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/*
 * What agent._native offers to Python.
 *
 * Every function here is pure: it keeps no state, allocates nothing, touches no Python object and may run without the
 * GIL (cffi releases it around each call). All memory belongs to the caller, who keeps it alive and lets nobody else
 * write to it until the call returns. native/build.py gives this file to cffi without the lines that begin with '#'.
 */

/* Ways to compute the same result. The numbers are fixed: tests run each engine that the machine has. */
enum engine { ENGINE_SCALAR, ENGINE_SSE2, ENGINE_AVX2, ENGINE_NEON, ENGINE_COUNT };

/* The engine's name in lower case; static storage. `engine` is below ENGINE_COUNT. */
const char *engine_name(int engine);

/* 1 when this build has the engine and this CPU can run it, else 0. */
int engine_available(int engine);

/* The fastest engine that is available. */
int engine_best(void);

/*
 * Index the lines of block[start..size): write the offset of each newline (byte 10), counted from the start of the
 * block, to ends[], in rising order, at most `capacity` of them. Returns how many were written. When that is
 * `capacity` there may be more: call again with start = ends[capacity - 1] + 1. `engine` must be available.
 * Reads only block[start..size), writes only ends[0..capacity).
 */
size_t line_ends(int engine, const uint8_t *block, size_t start, size_t size, size_t *ends, size_t capacity);

#endif
