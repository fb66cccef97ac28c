/* Runs the prefilter of an engine over cases from stdin, beside a plain search for each literal at each offset.
 *
 * A case, all numbers u32: engine; literal count; per literal caseless, size and text; size and block, size and sample.
 * Answers a line a case: the number of hits. Ends with 1 where the hits differ. Needs no PCRE2, so that it can be built
 * for another machine.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { MAX_LITERALS = 1 << 12, MAX_HITS = 1 << 18 };

static uint32_t take(void)
{
    uint32_t number;
    if (fread(&number, sizeof number, 1, stdin) != 1)
        exit(feof(stdin) ? 0 : 2);
    return number;
}

static uint8_t *take_bytes(uint32_t *size)
{
    *size = take();
    uint8_t *bytes = malloc(*size + 1);
    if (*size && fread(bytes, 1, *size, stdin) != *size)
        exit(2);
    return bytes;
}

static uint8_t lower(uint8_t byte) { return byte >= 'A' && byte <= 'Z' ? byte | 32 : byte; }

static int stands_at(const struct literal *literal, const uint8_t *text)
{
    for (size_t i = 0; i < literal->size; i++)
        if (literal->caseless ? lower(text[i]) != lower(literal->text[i]) : text[i] != literal->text[i])
            return 0;
    return 1;
}

static int by_place(const void *left, const void *right)
{
    const struct literal_hit *a = left, *b = right;
    return a->at != b->at ? (a->at > b->at) - (a->at < b->at) : (a->literal > b->literal) - (a->literal < b->literal);
}

int main(void)
{
    static struct literal literals[MAX_LITERALS];
    static struct literal_hit hits[MAX_HITS], expected[MAX_HITS];
    for (;;) {
        int engine = (int)take();
        uint32_t count = take(), size, sample_size;
        for (uint32_t i = 0; i < count; i++) {
            literals[i].caseless = take();
            literals[i].text = take_bytes(&literals[i].size);
        }
        uint8_t *block = take_bytes(&size), *sample = take_bytes(&sample_size);
        if (!engine_available(engine))
            return 3;
        struct prefilter *prefilter = prefilter_new(literals, count, sample, sample_size, engine);
        size_t found = 0, right = 0;
        for (size_t at = 0; at < size;)
            found += prefilter_find(prefilter, block, at, size, hits + found, MAX_HITS - found, &at);
        for (uint32_t at = 0; at < size; at++)
            for (uint32_t i = 0; i < count; i++)
                if (literals[i].size <= size - at && stands_at(&literals[i], block + at))
                    expected[right++] = (struct literal_hit){at, i};
        qsort(hits, found, sizeof *hits, by_place);
        if (found != right || memcmp(hits, expected, found * sizeof *hits)) {
            fprintf(stderr, "engine %d: %zu hits, expected %zu\n", engine, found, right);
            return 1;
        }
        printf("%zu\n", found);
        prefilter_free(prefilter);
        for (uint32_t i = 0; i < count; i++)
            free((void *)literals[i].text);
        free(block);
        free(sample);
    }
}
