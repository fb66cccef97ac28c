/*
 * The scanner: the prefilter says where literals stand, PCRE2 decides on their lines, matches go to the caller's buffer.
 */

#define _GNU_SOURCE /* memrchr */
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { HITS = 4096 };

struct scanner {
    int engine;
    struct prefilter *prefilter;
    const struct regex **regexes;
    size_t *groups; /* of each regex */
    size_t rules, literals;
    uint32_t *rules_at; /* of literal i: its rules are rules_of[rules_at[i]..rules_at[i + 1]) */
    uint32_t *rules_of;
    uint32_t *always; /* rules without a clause */
    size_t always_count;
};

struct worker {
    struct scratch *scratch;
    struct literal_hit *hits;
    size_t hits_capacity;
    uint64_t *tried, *found; /* of each rule: the last unit it was tried on, the last line it was found on */
    uint64_t units, lines, tries;
};

static int fill_rules(struct scanner *scanner, const struct rule *rules, const uint32_t *members)
{
    size_t uses = 0;
    for (size_t i = 0; i < scanner->rules; i++)
        uses += rules[i].clause_size;
    scanner->regexes = calloc(scanner->rules + 1, sizeof *scanner->regexes);
    scanner->groups = calloc(scanner->rules + 1, sizeof *scanner->groups);
    scanner->always = calloc(scanner->rules + 1, sizeof *scanner->always);
    scanner->rules_at = calloc(scanner->literals + 2, sizeof *scanner->rules_at);
    scanner->rules_of = calloc(uses + 1, sizeof *scanner->rules_of);
    if (!scanner->regexes || !scanner->groups || !scanner->always || !scanner->rules_at || !scanner->rules_of)
        return 0;
    for (uint32_t i = 0; i < scanner->rules; i++) {
        scanner->regexes[i] = rules[i].regex;
        scanner->groups[i] = regex_groups(rules[i].regex);
        if (!rules[i].clause_size)
            scanner->always[scanner->always_count++] = i;
        for (uint32_t m = 0; m < rules[i].clause_size; m++)
            scanner->rules_at[members[rules[i].clause + m] + 2]++;
    }
    for (size_t i = 2; i < scanner->literals + 2; i++)
        scanner->rules_at[i] += scanner->rules_at[i - 1];
    /* Shifted by one while it is filled, so that each ends up where the next begins. */
    for (uint32_t i = 0; i < scanner->rules; i++)
        for (uint32_t m = 0; m < rules[i].clause_size; m++)
            scanner->rules_of[scanner->rules_at[members[rules[i].clause + m] + 1]++] = i;
    return 1;
}

struct scanner *scanner_new(const struct rule *rules, size_t rule_count, const struct literal *literals,
                            size_t literal_count, const uint32_t *members, const uint8_t *sample, size_t sample_size,
                            int engine)
{
    for (size_t i = 0; i < literal_count; i++)
        if (memchr(literals[i].text, '\n', literals[i].size))
            return NULL;
    struct scanner *scanner = calloc(1, sizeof *scanner);
    if (!scanner)
        return NULL;
    scanner->engine = engine;
    scanner->rules = rule_count;
    scanner->literals = literal_count;
    scanner->prefilter = prefilter_new(literals, literal_count, sample, sample_size, engine);
    if (!scanner->prefilter || !fill_rules(scanner, rules, members)) {
        scanner_free(scanner);
        return NULL;
    }
    return scanner;
}

void scanner_free(struct scanner *scanner)
{
    if (!scanner)
        return;
    prefilter_free(scanner->prefilter);
    free(scanner->regexes);
    free(scanner->groups);
    free(scanner->always);
    free(scanner->rules_at);
    free(scanner->rules_of);
    free(scanner);
}

struct worker *worker_new(const struct scanner *scanner)
{
    struct worker *worker = calloc(1, sizeof *worker);
    if (!worker)
        return NULL;
    worker->hits_capacity = scanner->literals > HITS ? scanner->literals : HITS;
    worker->scratch = scratch_new();
    worker->hits = calloc(worker->hits_capacity, sizeof *worker->hits);
    worker->tried = calloc(scanner->rules + 1, sizeof *worker->tried);
    worker->found = calloc(scanner->rules + 1, sizeof *worker->found);
    if (!worker->scratch || !worker->hits || !worker->tried || !worker->found) {
        worker_free(worker);
        return NULL;
    }
    return worker;
}

void worker_free(struct worker *worker)
{
    if (!worker)
        return;
    scratch_free(worker->scratch);
    free(worker->hits);
    free(worker->tried);
    free(worker->found);
    free(worker);
}

uint64_t worker_tries(const struct worker *worker) { return worker->tries; }

/* ------------------------------------------------------------------------------------------------------- one scan */

/* The text that regexes run on: a line, or a window of one. */
struct unit {
    size_t start, end; /* without LF and one CR; start > end: there is none yet */
    size_t next;       /* where the next line begins */
    int flags;         /* MATCH_NOTBOL, MATCH_NOTEOL */
    size_t first_match, first_pair;
};

struct job {
    const struct scanner *scanner;
    struct worker *worker;
    const uint8_t *block, *suspended;
    uint16_t mark; /* MATCH_WINDOW, MATCH_PARTIAL: of all matches now */
    uint32_t window; /* of a long line */
    struct results *out;
    size_t pairs; /* of captures */
    struct unit unit;
};

/* Run a rule's regex on the unit, once. When the output is full, the unit's matches are taken back. */
static void try_rule(struct job *job, uint32_t rule)
{
    struct worker *worker = job->worker;
    struct results *out = job->out;
    const struct regex *regex = job->scanner->regexes[rule];
    if (worker->tried[rule] == worker->units)
        return;
    worker->tried[rule] = worker->units;
    if ((job->suspended && job->suspended[rule]) || worker->found[rule] == worker->lines)
        return;
    size_t pairs = job->scanner->groups[rule];
    if (out->count == out->capacity || job->pairs + pairs > out->captures_capacity) {
        out->count = job->unit.first_match;
        job->pairs = job->unit.first_pair;
        out->is_full = 1;
        return;
    }
    worker->tries++;
    int found = regex_match(regex, worker->scratch, job->block + job->unit.start, job->unit.end - job->unit.start,
                            job->unit.flags, out->captures + 2 * job->pairs);
    if (!found)
        return;
    uint16_t flags = job->mark;
    if (found < 0) {
        flags |= MATCH_LIMIT;
        pairs = 0;
    }
    worker->found[rule] = worker->lines;
    out->flags |= flags;
    out->matches[out->count++] = (struct match){
        .line_at = (uint32_t)job->unit.start,
        .line_size = (uint32_t)(job->unit.end - job->unit.start),
        .rule = rule,
        .captures_at = (uint32_t)job->pairs,
        .captures = (uint16_t)pairs,
        .flags = flags,
        .window = job->window,
    };
    job->pairs += pairs;
}

static void sort_by_rule(struct match *matches, size_t count)
{
    for (size_t i = 1; i < count; i++) {
        struct match match = matches[i];
        size_t at = i;
        for (; at && matches[at - 1].rule > match.rule; at--)
            matches[at] = matches[at - 1];
        matches[at] = match;
    }
}

static void end_unit(struct job *job)
{
    sort_by_rule(job->out->matches + job->unit.first_match, job->out->count - job->unit.first_match);
}

static void begin_unit(struct job *job, size_t start, size_t end, size_t next)
{
    job->worker->units++;
    job->unit.start = start;
    job->unit.end = end;
    job->unit.next = next;
    job->unit.first_match = job->out->count;
    job->unit.first_pair = job->pairs;
    for (size_t i = 0; i < job->scanner->always_count && !job->out->is_full; i++)
        try_rule(job, job->scanner->always[i]);
}

/* The line that begins at `start`; it ends at the first LF from `from` on, at `to` at the latest. */
static void begin_line(struct job *job, size_t start, size_t from, size_t to)
{
    size_t end = line_end(job->scanner->engine, job->block, from, to);
    size_t next = end < to ? end + 1 : to;
    job->worker->lines++;
    begin_unit(job, start, end > start && job->block[end - 1] == '\r' ? end - 1 : end, next);
}

/* Match block[from..to): lines, or with `is_window` one text. Returns where it got to: `to`, or when the output is full
 * the start of the unit that did not fit. */
static size_t scan_span(struct job *job, size_t from, size_t to, int is_window)
{
    const struct scanner *scanner = job->scanner;
    struct worker *worker = job->worker;
    const uint8_t *block = job->block;
    job->unit.next = from;
    job->unit.start = from;
    job->unit.first_match = job->out->count;
    int began = 0;
    if (is_window) {
        begin_unit(job, from, to, to);
        began = 1;
    }
    size_t at = from;
    while (at < to && !job->out->is_full) {
        size_t hits = prefilter_find(scanner->prefilter, block, at, to, worker->hits, worker->hits_capacity, &at);
        for (size_t i = 0; i < hits && !job->out->is_full; i++) {
            struct literal_hit hit = worker->hits[i];
            if (hit.at < from)
                continue; /* it began before the window */
            if (!began || hit.at >= job->unit.next) {
                if (began)
                    end_unit(job);
                while (scanner->always_count && !job->out->is_full) {
                    const uint8_t *lf = memchr(block + job->unit.next, '\n', hit.at - job->unit.next);
                    if (!lf)
                        break;
                    began = 1;
                    begin_line(job, job->unit.next, job->unit.next, to);
                    end_unit(job);
                }
                if (job->out->is_full)
                    break;
                began = 1;
                begin_line(job, line_start(scanner->engine, block, job->unit.next, hit.at), hit.at, to);
            }
            for (uint32_t r = scanner->rules_at[hit.literal]; r < scanner->rules_at[hit.literal + 1]; r++) {
                if (job->out->is_full)
                    break;
                try_rule(job, scanner->rules_of[r]);
            }
        }
    }
    if (began && !job->out->is_full)
        end_unit(job);
    while (scanner->always_count && !job->out->is_full && job->unit.next < to) {
        begin_line(job, job->unit.next, job->unit.next, to);
        if (!job->out->is_full)
            end_unit(job);
    }
    return job->out->is_full ? job->unit.start : to;
}

/* The first line of more than LINE_MAX_SIZE bytes that begins at `at` or later: its start, or `size`. */
static size_t find_long_line(const uint8_t *block, size_t at, size_t size)
{
    while (size - at > LINE_MAX_SIZE) {
        /* A long line from here on covers these bytes whole; else the last LF in them begins the next candidate. */
        const uint8_t *lf = memrchr(block + at, '\n', LINE_MAX_SIZE + 1);
        if (!lf)
            return at;
        at = (size_t)(lf - block) + 1;
    }
    return size;
}

void scan(const struct scanner *scanner, struct worker *worker, const uint8_t *block, size_t size, size_t before,
          int end, const uint8_t *suspended, struct results *results)
{
    struct job job = {
        .scanner = scanner,
        .worker = worker,
        .block = block,
        .suspended = suspended,
        .out = results,
    };
    size_t at = 0;
    results->count = 0;
    results->flags = 0;
    results->is_full = 0;
    while (at < size && !results->is_full) {
        size_t long_line = before ? at : find_long_line(block, at, size);
        if (long_line > at) {
            const uint8_t *lf = memrchr(block + at, '\n', long_line - at);
            size_t whole = lf ? (size_t)(lf - block) + 1 : at;
            at = scan_span(&job, at, whole, 0);
            if (at == whole && whole < long_line) {
                /* The last line, without LF. */
                if (end == END_OPEN)
                    break;
                job.unit.flags = end == END_PARTIAL ? MATCH_NOTEOL : 0;
                job.mark = end == END_PARTIAL ? MATCH_PARTIAL : 0;
                at = scan_span(&job, at, long_line, 0);
            }
            continue;
        }
        /* In a long line: its windows, the last of which ends with it. */
        const uint8_t *lf = memchr(block + at, '\n', size - at);
        size_t line_end = lf ? (size_t)(lf - block) : size;
        worker->lines++;
        for (int is_last = 0; !is_last && !results->is_full;) {
            size_t stop = at + LINE_MAX_SIZE;
            int is_cut = stop < line_end || (!lf && end != END_LINE);
            is_last = stop >= line_end;
            if (is_last && !lf && end == END_OPEN) { /* one byte more would tell a cut window from the last */
                results->consumed = at;
                results->before = before;
                return;
            }
            stop = is_last ? line_end : stop;
            job.unit.flags = (before ? MATCH_NOTBOL : 0) | (is_cut ? MATCH_NOTEOL : 0);
            job.mark = MATCH_WINDOW | (is_last && !lf && end == END_PARTIAL ? MATCH_PARTIAL : 0);
            job.window = (uint32_t)(before / WINDOW_STEP);
            size_t text_end = stop;
            if (is_last && lf && text_end > at && block[text_end - 1] == '\r')
                text_end--;
            scan_span(&job, at, text_end, 1);
            if (results->is_full)
                break;
            if (is_last) {
                at = lf ? line_end + 1 : size;
                before = 0;
            } else {
                at += WINDOW_STEP;
                before += WINDOW_STEP;
            }
        }
        job.unit.flags = 0;
        job.mark = 0;
        job.window = 0;
    }
    results->consumed = at;
    results->before = before;
}

void count_by_rule(const struct match *matches, size_t count, uint64_t *lines)
{
    for (size_t i = 0; i < count; i++)
        lines[matches[i].rule]++;
}
