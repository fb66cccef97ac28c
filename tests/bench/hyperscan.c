/*
 * What the scanner is measured beside: Hyperscan finds the literals, PCRE2 (JIT) confirms on their lines.
 *
 * hyperscan RULES FILE ROUNDS. RULES: u32 rule count; per rule u32 size and regex; u32 literal count; per literal u32
 * caseless, u32 size and text, u32 rule count and the rules. All in the machine's byte order. Reads FILE into a buffer
 * of 256 KiB, used again and again, and scans what ends at a line's end. Prints the seconds that compiling took; then
 * a line a round: matches (line, rule), and seconds of CPU without those of reading.
 */

#define _GNU_SOURCE
#define PCRE2_CODE_UNIT_WIDTH 8
#include <fcntl.h>
#include <hs/hs.h>
#include <pcre2.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 1 << 18 };

struct job {
    pcre2_code **regexes;
    pcre2_match_data *data;
    pcre2_match_context *context;
    uint32_t **rules_of, *rule_counts;
    const uint8_t *block;
    size_t size, line_start, line_end; /* of the line last looked at; none when end is 0 */
    uint64_t line, *tried, matches;
};

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint8_t *read_all(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        exit(2);
    *size = (size_t)ftell(file);
    rewind(file);
    uint8_t *data = malloc(*size + 64);
    if (fread(data, 1, *size, file) != *size)
        exit(2);
    fclose(file);
    return data;
}

static uint32_t take(const uint8_t **at)
{
    uint32_t number;
    memcpy(&number, *at, sizeof number);
    *at += sizeof number;
    return number;
}

static int on_literal(unsigned id, unsigned long long from, unsigned long long to, unsigned flags, void *context)
{
    struct job *job = context;
    size_t at = (size_t)to - 1;
    (void)from, (void)flags;
    if (at >= job->line_end || at < job->line_start) {
        const uint8_t *lf = memrchr(job->block, '\n', at);
        job->line_start = lf ? (size_t)(lf - job->block) + 1 : 0;
        lf = memchr(job->block + at, '\n', job->size - at);
        job->line_end = lf ? (size_t)(lf - job->block) : job->size;
        job->line++;
    }
    size_t size = job->line_end - job->line_start;
    if (size && job->block[job->line_end - 1] == '\r')
        size--;
    for (uint32_t i = 0; i < job->rule_counts[id]; i++) {
        uint32_t rule = job->rules_of[id][i];
        if (job->tried[rule] == job->line)
            continue;
        job->tried[rule] = job->line;
        job->matches += pcre2_jit_match(job->regexes[rule], job->block + job->line_start, size, 0, 0, job->data,
                                        job->context) > 0;
    }
    return 0;
}

int main(int argc, char **argv)
{
    size_t rules_size;
    if (argc != 4)
        return 2;
    const uint8_t *at = read_all(argv[1], &rules_size);
    static uint8_t buffer[BLOCK];
    struct job job = {0};
    double started = cpu_s();
    uint32_t rules = take(&at);
    job.regexes = calloc(rules, sizeof *job.regexes);
    job.tried = calloc(rules, sizeof *job.tried);
    for (uint32_t i = 0; i < rules; i++) {
        uint32_t length = take(&at);
        int code;
        size_t where;
        job.regexes[i] = pcre2_compile(at, length, 0, &code, &where, NULL);
        if (!job.regexes[i] || pcre2_jit_compile(job.regexes[i], PCRE2_JIT_COMPLETE))
            return 3;
        at += length;
    }
    uint32_t count = take(&at);
    const char **literals = calloc(count, sizeof *literals);
    unsigned *flags = calloc(count, sizeof *flags), *ids = calloc(count, sizeof *ids);
    size_t *sizes = calloc(count, sizeof *sizes);
    job.rules_of = calloc(count, sizeof *job.rules_of);
    job.rule_counts = calloc(count, sizeof *job.rule_counts);
    for (uint32_t i = 0; i < count; i++) {
        ids[i] = i;
        flags[i] = take(&at) ? HS_FLAG_CASELESS : 0;
        sizes[i] = take(&at);
        literals[i] = (const char *)at;
        at += sizes[i];
        job.rule_counts[i] = take(&at);
        job.rules_of[i] = malloc(job.rule_counts[i] * sizeof(uint32_t));
        for (uint32_t r = 0; r < job.rule_counts[i]; r++)
            job.rules_of[i][r] = take(&at);
    }
    hs_database_t *database;
    hs_compile_error_t *error;
    hs_scratch_t *scratch = NULL;
    if (hs_compile_lit_multi(literals, flags, ids, sizes, count, HS_MODE_BLOCK, NULL, &database, &error) != HS_SUCCESS) {
        fprintf(stderr, "%s\n", error->message);
        return 3;
    }
    if (hs_alloc_scratch(database, &scratch) != HS_SUCCESS)
        return 3;
    job.data = pcre2_match_data_create(64, NULL);
    job.context = pcre2_match_context_create(NULL);
    pcre2_jit_stack_assign(job.context, NULL, pcre2_jit_stack_create(32 * 1024, 1024 * 1024, NULL));
    printf("%f\n", cpu_s() - started);
    for (int round = 0; round < atoi(argv[3]); round++) {
        double seconds = 0;
        int file = open(argv[2], O_RDONLY);
        job.matches = 0;
        job.block = buffer;
        for (size_t held = 0;;) {
            ssize_t got = read(file, buffer + held, BLOCK - held);
            if (got < 0 || (held += (size_t)got) == 0)
                break;
            started = cpu_s();
            const uint8_t *lf = got ? memrchr(buffer, '\n', held) : NULL;
            job.size = lf ? (size_t)(lf - buffer) + 1 : held;
            job.line_start = job.line_end = 0;
            if (hs_scan(database, (const char *)buffer, (unsigned)job.size, 0, scratch, on_literal, &job) != HS_SUCCESS)
                return 4;
            seconds += cpu_s() - started;
            memmove(buffer, buffer + job.size, held -= job.size);
        }
        close(file);
        printf("%llu %f\n", (unsigned long long)job.matches, seconds);
        fflush(stdout);
    }
    return 0;
}
