/* Counts literals in a text: each position of it is looked up by its first bytes among the literals that begin so. */

#include <stdlib.h>
#include <string.h>

#include "native.h"

/* The bytes that a literal is known by: SHORT ones are too few to tell text from it, but not all have LONG ones. */
enum { SHORT = 2, LONG = 4 };

struct table {
    uint32_t *slots; /* index + 1 of the first literal, 0: none */
    uint32_t *next;  /* of each literal: that of the next one in its slot */
    uint32_t shift;
};

static uint8_t lower(uint8_t byte) { return (uint8_t)(byte - 'A') < 26 ? byte | 32 : byte; }

static inline uint32_t *slot_of(const struct table *table, const uint8_t *folded, size_t known_by)
{
    uint32_t word = 0;
    memcpy(&word, folded, known_by == LONG ? LONG : SHORT); /* numbers that the compiler knows: no call */
    return &table->slots[(word * 0x9E3779B1u >> table->shift << 1) + (known_by == LONG)];
}

/* Of the text, letters are in lower case already. */
static int is_at(const struct literal *literal, const uint8_t *folded)
{
    for (size_t i = 0; i < literal->size; i++)
        if (folded[i] != lower(literal->text[i]))
            return 0;
    return 1;
}

static void put(struct table *table, const struct literal *literals, uint32_t index)
{
    uint8_t folded[LONG];
    size_t known_by = literals[index].size < LONG ? SHORT : LONG;
    for (size_t i = 0; i < known_by; i++)
        folded[i] = lower(literals[index].text[i]);
    uint32_t *slot = slot_of(table, folded, known_by);
    table->next[index] = *slot;
    *slot = index + 1;
}

static inline void count_at(const struct table *table, const struct literal *literals, const uint8_t *folded, size_t left,
                     size_t known_by, uint32_t *counts)
{
    for (uint32_t entry = *slot_of(table, folded, known_by); entry; entry = table->next[entry - 1])
        counts[entry - 1] += literals[entry - 1].size <= left && is_at(&literals[entry - 1], folded);
}

int literal_counts(const struct literal *literals, size_t count, const uint8_t *text, size_t size, uint32_t *counts)
{
    for (size_t i = 0; i < count; i++)
        if (literals[i].size < LITERAL_MIN)
            return 0;
    uint32_t bits = 8;
    while (bits < 24 && (size_t)1 << bits < 4 * count)
        bits++;
    struct table table = {
        .slots = calloc((size_t)2 << bits, sizeof *table.slots),
        .next = calloc(count + 1, sizeof *table.next),
        .shift = 32 - bits,
    };
    uint8_t *folded = calloc(size + LONG, 1); /* what is read beyond the text is 0 */
    int is_done = table.slots && table.next && folded;
    if (is_done) {
        for (size_t i = 0; i < size; i++)
            folded[i] = lower(text[i]);
        for (uint32_t i = 0; i < count; i++)
            put(&table, literals, i);
        memset(counts, 0, count * sizeof *counts);
        for (size_t at = 0; at < size; at++) {
            count_at(&table, literals, folded + at, size - at, SHORT, counts);
            count_at(&table, literals, folded + at, size - at, LONG, counts);
        }
    }
    free(table.slots);
    free(table.next);
    free(folded);
    return is_done;
}
