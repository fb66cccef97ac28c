/* Lines: where are the newlines of a block? One loop per engine; each ends in the scalar one for the tail. */

#define _GNU_SOURCE /* memrchr */
#include <string.h>

#include "native.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* The output array and how far it is filled. */
struct ends {
    size_t *at;
    size_t count, capacity;
};

static void scan_scalar(const uint8_t *block, size_t start, size_t size, struct ends *out)
{
    for (size_t i = start; i < size && out->count < out->capacity; i++)
        if (block[i] == '\n')
            out->at[out->count++] = i;
}

#if defined(__x86_64__) || defined(__i386__)

/* Bit n of the mask is the byte at base + n. */
static inline void put_mask(uint32_t mask, size_t base, struct ends *out)
{
    for (; mask && out->count < out->capacity; mask &= mask - 1)
        out->at[out->count++] = base + (size_t)__builtin_ctz(mask);
}

__attribute__((target("sse2"))) static void scan_sse2(const uint8_t *block, size_t i, size_t size, struct ends *out)
{
    const __m128i newline = _mm_set1_epi8('\n');
    for (; size - i >= 16 && out->count < out->capacity; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(block + i));
        put_mask((uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, newline)), i, out);
    }
    scan_scalar(block, i, size, out);
}

__attribute__((target("avx2"))) static void scan_avx2(const uint8_t *block, size_t i, size_t size, struct ends *out)
{
    const __m256i newline = _mm256_set1_epi8('\n');
    for (; size - i >= 32 && out->count < out->capacity; i += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)(block + i));
        put_mask((uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, newline)), i, out);
    }
    scan_scalar(block, i, size, out);
}

#elif defined(__aarch64__)

static void scan_neon(const uint8_t *block, size_t i, size_t size, struct ends *out)
{
    const uint8x16_t newline = vdupq_n_u8('\n');
    for (; size - i >= 16 && out->count < out->capacity; i += 16) {
        uint16x8_t equal = vreinterpretq_u16_u8(vceqq_u8(vld1q_u8(block + i), newline));
        /* NEON has no movemask: narrowing by four bits leaves one nibble per byte. */
        uint64_t mask = vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(equal, 4)), 0);
        for (mask &= 0x8888888888888888u; mask && out->count < out->capacity; mask &= mask - 1)
            out->at[out->count++] = i + (size_t)__builtin_ctzll(mask) / 4;
    }
    scan_scalar(block, i, size, out);
}

#endif

size_t line_ends(int engine, const uint8_t *block, size_t start, size_t size, size_t *ends, size_t capacity)
{
    struct ends out = {ends, 0, capacity};
    if (start >= size)
        return 0;
    switch (engine) {
#if defined(__x86_64__) || defined(__i386__)
    case ENGINE_AVX512:
    case ENGINE_AVX2:
        scan_avx2(block, start, size, &out);
        break;
    case ENGINE_SSSE3:
        scan_sse2(block, start, size, &out);
        break;
#elif defined(__aarch64__)
    case ENGINE_NEON:
        scan_neon(block, start, size, &out);
        break;
#endif
    default:
        scan_scalar(block, start, size, &out);
    }
    return out.count;
}

static size_t start_scalar(const uint8_t *block, size_t from, size_t at)
{
    const uint8_t *lf = memrchr(block + from, '\n', at - from);
    return lf ? (size_t)(lf - block) + 1 : from;
}

static size_t end_scalar(const uint8_t *block, size_t at, size_t to)
{
    const uint8_t *lf = memchr(block + at, '\n', to - at);
    return lf ? (size_t)(lf - block) : to;
}

#if defined(__x86_64__) || defined(__i386__)

/* Most lines are short, but each has another length, and a loop over its vectors ends where no processor expects it: so
 * two or three vectors are looked at in any case, and a choice among them is no branch. */
#define AVX512 __attribute__((target("avx512f,avx512bw")))

AVX512 static inline uint64_t newlines(const uint8_t *text)
{
    return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(text), _mm512_set1_epi8('\n'));
}

AVX512 static size_t start_avx512(const uint8_t *block, size_t from, size_t at)
{
    if (at < from + 128)
        return start_scalar(block, from, at);
    uint64_t near = newlines(block + at - 64), far = newlines(block + at - 128);
    size_t base = near ? at - 64 : at - 128;
    uint64_t found = near ? near : far;
    return found ? base + 64 - (size_t)__builtin_clzll(found) : start_scalar(block, from, at - 128);
}

AVX512 static size_t end_avx512(const uint8_t *block, size_t at, size_t to)
{
    if (to < at + 192)
        return end_scalar(block, at, to);
    uint64_t first = newlines(block + at), second = newlines(block + at + 64), third = newlines(block + at + 128);
    size_t base = first ? at : second ? at + 64 : at + 128;
    uint64_t found = first ? first : second ? second : third;
    return found ? base + (size_t)__builtin_ctzll(found) : end_scalar(block, at + 192, to);
}

#endif

size_t line_start(int engine, const uint8_t *block, size_t from, size_t at)
{
#if defined(__x86_64__) || defined(__i386__)
    if (engine == ENGINE_AVX512)
        return start_avx512(block, from, at);
#endif
    (void)engine;
    return start_scalar(block, from, at);
}

size_t line_end(int engine, const uint8_t *block, size_t at, size_t to)
{
#if defined(__x86_64__) || defined(__i386__)
    if (engine == ENGINE_AVX512)
        return end_avx512(block, at, to);
#endif
    (void)engine;
    return end_scalar(block, at, to);
}
