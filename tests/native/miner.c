/* Runs the miner over cases from stdin, under the sanitizers of tests/test_native.py.
 *
 * A case: u32 limit, every, capacity, blocks; for each block u32 size and its bytes. Blocks and answers are allocated to
 * the byte. After each block all that is known is taken into another miner, and must be the same there; the last block's
 * lines are asked for their values. Answers one line a case: how many lines, templates, and ids were given.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

static uint32_t number(void)
{
    uint32_t value = 0;
    if (fread(&value, sizeof value, 1, stdin) != 1)
        exit(0);
    return value;
}

static void check(int is_true, const char *what)
{
    if (is_true)
        return;
    fprintf(stderr, "not so: %s\n", what);
    exit(1);
}

/* The miner again, by what can be kept of it. */
static struct miner *copied(const struct miner *miner, size_t limit)
{
    size_t size = miner_dump(miner, NULL), numbers = miner_varying(miner, NULL);
    uint8_t *dump = malloc(size);
    uint64_t *varying = malloc(numbers * sizeof *varying);
    uint32_t *pairs = malloc(2 * limit * sizeof *pairs);
    check(miner_dump(miner, dump) == size && miner_varying(miner, varying) == numbers, "the sizes of a dump");
    size_t joined = miner_joined(miner, pairs, limit);
    struct miner *copy = miner_new(limit);
    for (size_t at = 0; at < size;) {
        uint64_t count;
        uint32_t id, length;
        memcpy(&count, dump + at, 8);
        memcpy(&id, dump + at + 8, 4);
        memcpy(&length, dump + at + 12, 4);
        uint8_t *text = malloc(length);
        memcpy(text, dump + at + 16, length);
        check(miner_restore(copy, id, count, text, length), "a template can be restored");
        free(text);
        at += 16 + length;
    }
    check(miner_restore_joined(copy, pairs, joined), "what joined can be restored");
    check(miner_restore_varying(copy, varying, numbers), "what varies can be restored");
    check(miner_restore_next(copy, miner_next(miner)), "the next id can be restored");
    uint8_t *again = malloc(size);
    check(miner_dump(copy, NULL) == size && miner_dump(copy, again) == size, "the size of a copy");
    check(!memcmp(dump, again, size), "a copy has the same templates");
    free(again);
    free(pairs);
    free(varying);
    free(dump);
    return copy;
}

static void ask_values(const struct miner *miner, const uint8_t *block, size_t size, const uint32_t *ids,
                       const uint32_t *starts, size_t count)
{
    uint32_t spans[2 * VALUES_MAX];
    uint8_t text[TEMPLATE_TEXT_MAX];
    for (size_t n = 0; n < count; n++) {
        size_t length = (n + 1 < count ? starts[n + 1] : size) - starts[n];
        size_t values = miner_values(miner, ids[n], block + starts[n], length, spans, VALUES_MAX);
        for (size_t i = 0; i < values; i++)
            check((size_t)spans[2 * i] + spans[2 * i + 1] <= length, "a value lies within its line");
        size_t told = miner_text(miner, ids[n], text);
        check(told == TEMPLATE_NONE || told <= sizeof text, "a text has its size");
        uint32_t found = miner_find(miner, block + starts[n], length);
        check(found == TEMPLATE_NONE || miner_resolve(miner, found) == found, "what is found is known");
        check((told == TEMPLATE_NONE) == (miner_resolve(miner, ids[n]) == TEMPLATE_NONE), "what has a text is known");
    }
}

int main(void)
{
    for (;;) {
        uint32_t limit = number(), every = number(), capacity = number(), blocks = number();
        struct miner *miner = miner_new(limit);
        size_t lines = 0;
        while (blocks--) {
            uint32_t size = number();
            uint8_t *block = malloc(size);
            uint32_t *ids = malloc(capacity * sizeof *ids), *starts = malloc(capacity * sizeof *starts);
            check(fread(block, 1, size, stdin) == size, "the case is whole");
            for (size_t at = 0, from = 0; at < size; from = at) {
                size_t count = miner_mine(miner, block, size, &at, every, ids, starts, capacity);
                check(count && at > from, "it gets on");
                ask_values(miner, block, at, ids, starts, count);
                lines += count;
            }
            check(miner_count(miner) <= limit, "templates are bounded");
            struct miner *copy = copied(miner, limit);
            miner_free(miner);
            miner = copy;
            free(starts);
            free(ids);
            free(block);
        }
        printf("%zu %zu %u\n", lines, miner_count(miner), miner_next(miner) - 1);
        miner_free(miner);
    }
}
