/* Runs the scanner over cases from stdin, under the sanitizers of tests/test_native.py, beside PCRE2 alone.
 *
 * A case, all numbers u32: engine, end (END_*), capacity; rule count; per rule flags, size and pattern, count and
 * indices of its literals; literal count; per literal caseless, size and text; size and block, size and sample. A rule
 * whose pattern PCRE2 refuses is left out. The block is allocated to the byte, so that one byte read too far is seen.
 * Answers a line a case: the number of matches. Ends with 1 and the first difference, if there is one.
 */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { MAX = 1 << 12 };

struct seen {
    uint32_t line_at, rule, flags;
};

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
    uint8_t *bytes = malloc(*size);
    if (*size && fread(bytes, 1, *size, stdin) != *size)
        exit(2);
    return bytes;
}

/* Writes the matches as JSON into memory that is just large enough for a few of them. */
static void format(struct regex **regexes, uint32_t rules, const struct match *matches, size_t count,
                   const uint32_t *captures, const uint8_t *block)
{
    enum { ROOM = 6000 };
    struct rule_format *formats = calloc(rules + 1, sizeof *formats);
    for (uint32_t i = 0; i < rules; i++) {
        size_t size = 0;
        uint8_t *names = malloc(64 * regex_groups(regexes[i]) + 1);
        for (size_t group = 0; group < regex_groups(regexes[i]); group++)
            size += (size_t)sprintf((char *)names + size, "\"%.40s\":", regex_group(regexes[i], group)) + 1;
        formats[i] = (struct rule_format){(const uint8_t *)"\"rule\":1", names, 8, size, i};
    }
    struct line_format lines = {(const uint8_t *)"\"path\":1", 8, match_seed(1, 2, 3), formats};
    uint8_t *out = malloc(ROOM);
    for (size_t at = 0, done = 1; at < count && done; at += done)
        format_matches(&lines, matches + at, count - at, captures, block, 0, NULL, out, ROOM, &done);
    free(out);
    for (uint32_t i = 0; i < rules; i++)
        free((void *)formats[i].names);
    free(formats);
}

/* Every regex on every line; lines are short here. */
static size_t oracle(struct regex **regexes, uint32_t rules, const uint8_t *block, uint32_t size, uint32_t end,
                     struct seen *seen)
{
    static uint32_t captures[2 * REGEX_PATTERN_MAX];
    struct scratch *scratch = scratch_new();
    size_t count = 0;
    for (uint32_t at = 0; at < size;) {
        const uint8_t *lf = memchr(block + at, '\n', size - at);
        uint32_t stop = lf ? (uint32_t)(lf - block) : size, next = lf ? stop + 1 : size;
        if (!lf && end == END_OPEN)
            break;
        if (stop > at && block[stop - 1] == '\r')
            stop--;
        int is_partial = !lf && end == END_PARTIAL;
        for (uint32_t rule = 0; rule < rules; rule++) {
            int found = regex_match(regexes[rule], scratch, block + at, stop - at, is_partial ? MATCH_NOTEOL : 0, captures);
            uint32_t flags = (found < 0 ? MATCH_LIMIT : 0) | (is_partial ? MATCH_PARTIAL : 0);
            if (found)
                seen[count++] = (struct seen){at, rule, flags};
        }
        at = next;
    }
    scratch_free(scratch);
    return count;
}

static uint8_t lower(uint8_t byte) { return byte >= 'A' && byte <= 'Z' ? byte | 32 : byte; }

/* Each literal at each offset. */
static void check_counts(const struct literal *literals, uint32_t count, const uint8_t *block, uint32_t size)
{
    uint32_t *counts = malloc(count * sizeof *counts);
    int is_done = literal_counts(literals, count, block, size, counts);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t right = 0;
        for (uint32_t at = 0; at + literals[i].size <= size; at++) {
            uint32_t same = 0;
            while (same < literals[i].size && lower(block[at + same]) == lower(literals[i].text[same]))
                same++;
            right += same == literals[i].size;
        }
        if (!is_done || counts[i] != right) {
            fprintf(stderr, "literal %u of %u counted %u times, stands there %u times\n", i, count, counts[i], right);
            exit(1);
        }
    }
    free(counts);
}

static void run_case(void)
{
    static struct regex *regexes[MAX];
    static struct rule rules[MAX];
    static struct literal literals[MAX];
    static uint32_t members[MAX];
    static struct seen seen[1 << 20], expected[1 << 20];
    uint32_t engine = take(), end = take(), capacity = take(), rule_count = take(), used = 0, kept = 0, groups = 0;
    for (uint32_t i = 0; i < rule_count; i++) {
        uint32_t flags = take(), size;
        uint8_t *pattern = take_bytes(&size);
        struct regex_fault fault;
        struct regex *regex = regex_compile(pattern, size, (int)flags, &fault);
        uint32_t clause_size = take();
        rules[kept] = (struct rule){regex, used, clause_size};
        for (uint32_t m = 0; m < clause_size; m++)
            members[used + m] = take();
        free(pattern);
        if (!regex)
            continue;
        used += clause_size;
        groups += (uint32_t)regex_groups(regex);
        regexes[kept++] = regex;
    }
    uint32_t literal_count = take(), size, sample_size;
    for (uint32_t i = 0; i < literal_count; i++) {
        literals[i].caseless = take();
        literals[i].text = take_bytes(&literals[i].size);
    }
    uint8_t *block = take_bytes(&size), *sample = take_bytes(&sample_size);
    check_counts(literals, literal_count, block, size);

    struct scanner *scanner = scanner_new(rules, kept, literals, literal_count, members, sample, sample_size,
                                          (int)engine);
    struct worker *worker = worker_new(scanner);
    capacity = capacity > kept ? capacity : kept;
    struct results results = {
        .matches = malloc(capacity * sizeof *results.matches),
        .capacity = capacity,
        .captures = malloc(2 * (capacity + groups) * sizeof *results.captures),
        .captures_capacity = capacity + groups,
    };
    size_t count = 0;
    for (uint32_t at = 0; at < size;) {
        scan(scanner, worker, block + at, size - at, 0, (int)end, NULL, &results);
        for (size_t i = 0; i < results.count; i++) {
            const struct match *match = &results.matches[i];
            seen[count++] = (struct seen){at + match->line_at, match->rule, match->flags};
        }
        format(regexes, kept, results.matches, results.count, results.captures, block + at);
        const uint8_t *rest = block + at + results.consumed;
        size_t left = size - at - results.consumed;
        if (results.is_full != (left && (end != END_OPEN || memchr(rest, '\n', left)))) {
            fprintf(stderr, "engine %u: is_full is %d with %zu bytes left\n", engine, results.is_full, left);
            exit(1);
        }
        if (!results.consumed)
            break;
        at += (uint32_t)results.consumed;
    }
    size_t right = oracle(regexes, kept, block, size, end, expected);
    printf("%zu\n", count);
    size_t i = 0, e = 0;
    for (; e < right; e++) {
        if (i < count && !memcmp(&seen[i], &expected[e], sizeof *seen))
            i++;
        else if (!(expected[e].flags & MATCH_LIMIT)) /* a line without the literal needs no regex to give up on it */
            break;
    }
    if (i < count || e < right) {
        fprintf(stderr, "engine %u: %zu of %zu found are right, %zu expected\n", engine, i, count, right);
        if (i < count)
            fprintf(stderr, "found line %u rule %u flags %u\n", seen[i].line_at, seen[i].rule, seen[i].flags);
        if (e < right)
            fprintf(stderr, "expected line %u rule %u flags %u\n", expected[e].line_at, expected[e].rule,
                    expected[e].flags);
        exit(1);
    }
    free(results.captures);
    free(results.matches);
    worker_free(worker);
    scanner_free(scanner);
    for (uint32_t i = 0; i < kept; i++)
        regex_free(regexes[i]);
    for (uint32_t i = 0; i < literal_count; i++)
        free((void *)literals[i].text);
    free(block);
    free(sample);
}

int main(void)
{
    for (;;)
        run_case();
}
