#ifndef EMISSARY_NATIVE_H
#define EMISSARY_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/*
 * What agent._native offers to Python.
 *
 * No function keeps state of its own or touches a Python object, and all may run without the GIL (cffi releases it
 * around each call). What *_new, *_compile and *_load return the caller gives to *_free; a miner and a model hold what
 * they learn. All other memory is the caller's, who keeps it alive and lets nobody else write to it until the call
 * returns.
 * native/build.py gives this file to cffi without the lines that begin with '#'.
 */

/* Ways to compute the same result. The numbers are fixed: tests run each engine that the machine has. */
enum engine { ENGINE_SCALAR, ENGINE_SSSE3, ENGINE_AVX2, ENGINE_NEON, ENGINE_AVX512, ENGINE_COUNT };

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

/*
 * The line around block[at]: where it begins, at `from` at the earliest; and where it ends, which is its newline, or `to`.
 * Read only block[from..at) and block[at..to).
 */
size_t line_start(int engine, const uint8_t *block, size_t from, size_t at);
size_t line_end(int engine, const uint8_t *block, size_t at, size_t to);

/*
 * Regular expressions: PCRE2, JIT-compiled where the system allows it. A regex is immutable, and any number of threads
 * may match with it; each thread needs a scratch of its own.
 */

enum { REGEX_UTF = 1, REGEX_INTERPRET = 2 };        /* flags of regex_compile */
enum { MATCH_NOTBOL = 1, MATCH_NOTEOL = 2 };        /* the text does not begin, does not end where its line does */
enum { REGEX_PATTERN_MAX = 4096 };
enum { CAPTURE_UNSET = 0xFFFFFFFF };

/* Why a pattern was refused: what PCRE2 says, and the offset in the pattern, in bytes. */
struct regex_fault { size_t at; char text[200]; };

struct regex;
struct scratch;

/*
 * Compile a pattern of at most REGEX_PATTERN_MAX bytes. Without REGEX_UTF the pattern and what it is matched with are
 * bytes; with it both are UTF-8, and no match spans bytes that are none. REGEX_INTERPRET leaves the JIT out, as does a
 * system that refuses executable memory. NULL: refused, see `fault`.
 */
struct regex *regex_compile(const uint8_t *pattern, size_t size, int flags, struct regex_fault *fault);
void regex_free(struct regex *regex);

/* 1 when matches run as machine code, 0 when interpreted. */
int regex_jit(const struct regex *regex);

/* Which PCRE2 it is, to text[0..64): "10.42 2022-12-11". */
void regex_version(char *text);

/* How many named groups there are; the name of one of them, by the order of their numbers. The regex owns the name. */
size_t regex_groups(const struct regex *regex);
const char *regex_group(const struct regex *regex, size_t index);

/* What matching needs beside the regex: the JIT's stack (up to 1 MiB), offsets, limits. NULL: no memory. */
struct scratch *scratch_new(void);
void scratch_free(struct scratch *scratch);

/*
 * Search text[0..size), which holds no LF. `flags`: MATCH_*. Returns 1 and fills captures[2 * regex_groups()] with
 * (start, length) of each named group, start CAPTURE_UNSET for one that took no part; 0: no match; -1: given up at a
 * limit, so nobody knows.
 */
int regex_match(const struct regex *regex, struct scratch *scratch, const uint8_t *text, size_t size, int flags,
                uint32_t *captures);

/*
 * The prefilter: where in a block does any of some thousand literals stand? Immutable; any number of threads may search.
 */

/* A string of at least LITERAL_MIN bytes. With `caseless`, ASCII letters match either case. */
struct literal { const uint8_t *text; uint32_t size; uint32_t caseless; };
struct literal_hit { uint32_t at; uint32_t literal; };
enum { LITERAL_MIN = 2, LITERAL_MAX = 64 };

struct prefilter;

/*
 * Prepare a search for literals[0..count). `sample` is text like that to be searched; the windows of the literals are
 * chosen by how rarely they look like it. `engine` will search, and must be available. Nothing of the arguments is kept.
 * NULL: no memory, or a literal of a size that is not allowed.
 */
struct prefilter *prefilter_new(const struct literal *literals, size_t count, const uint8_t *sample,
                                size_t sample_size, int engine);
void prefilter_free(struct prefilter *prefilter);

/*
 * Search block[start..size), size below 2^32. Writes a hit for each occurrence of each literal: `at` is the offset of its
 * first byte; hits on a line come before those on later ones. Full hits end the search early: *next is where to go on,
 * else `size`. To get on at all, `capacity` must be at least `count` of prefilter_new. Returns how many were written.
 */
size_t prefilter_find(const struct prefilter *prefilter, const uint8_t *block, size_t start, size_t size,
                      struct literal_hit *hits, size_t capacity, size_t *next);

/*
 * How often each of literals[0..count) stands in text[0..size), letters of ASCII in either case: to counts[0..count).
 * Returns 1; 0: no memory, or a literal of less than LITERAL_MIN bytes.
 */
int literal_counts(const struct literal *literals, size_t count, const uint8_t *text, size_t size, uint32_t *counts);

/*
 * The scanner: all rules on every line of a block. A rule's regex runs only on lines that hold one of its literals.
 */

/*
 * A rule: on every line that `regex` matches stands one of literals[members[clause..clause + clause_size)]. With no
 * clause the regex runs on every line. It must live as long as the scanner.
 */
struct rule { const struct regex *regex; uint32_t clause, clause_size; };

/*
 * A match; the line's offset in the block and its length without LF and one CR, or those of the `window`-th window of it,
 * from 0. Captures begin at captures[2 * captures_at]: (start from line_at, length) for each named group of the regex,
 * see regex_match.
 */
struct match { uint32_t line_at, line_size, rule, captures_at; uint16_t captures, flags; uint32_t window; };

/* Flags of a match: the line was longer than LINE_MAX_SIZE and this is a window of it; it is not complete yet; the regex
 * gave up at a limit, so nobody knows whether it matches. */
enum { MATCH_WINDOW = 1, MATCH_PARTIAL = 2, MATCH_LIMIT = 4 };

/* Longer lines are matched by windows of this size; each begins WINDOW_STEP after the last. */
enum { LINE_MAX_SIZE = 65536, WINDOW_STEP = 61440 };

/* How the block's last line ends when it has no LF: as any line; it goes on beyond the block; not yet, match it as it is. */
enum { END_LINE, END_OPEN, END_PARTIAL };

struct scanner;
struct worker;

/*
 * Compile rules[0..rule_count) over literals[0..literal_count); `sample` and `engine` as in prefilter_new. Immutable;
 * keeps nothing of the arguments but the regexes. NULL: no memory, or a literal that is too short, too long, or holds a
 * LF.
 */
struct scanner *scanner_new(const struct rule *rules, size_t rule_count, const struct literal *literals,
                            size_t literal_count, const uint32_t *members, const uint8_t *sample, size_t sample_size,
                            int engine);
void scanner_free(struct scanner *scanner);

/* What a thread needs to scan with a scanner. NULL: no memory. */
struct worker *worker_new(const struct scanner *scanner);
void worker_free(struct worker *worker);

/*
 * What a scan found, and how far it came. The caller gives room for `capacity` matches and for `captures_capacity` pairs
 * of captures; to get on at all, that of one match of every rule.
 */
struct results {
    struct match *matches;
    uint32_t *captures;
    size_t capacity, captures_capacity;
    size_t count;
    uint32_t flags;          /* of any of the matches */
    size_t consumed, before; /* where to go on, with so many bytes of the line done: the start of a line or window */
    int is_full;             /* there was no room for more: go on at once. Else what is left is a line that is open */
};

/*
 * Match the lines of block[0..size), size below 2^31, the first of which began `before` bytes earlier: 0, or a multiple
 * of WINDOW_STEP. `end`: END_*. `suspended`: a byte a rule, not 0: leave it out; or NULL. Gives the matches by line and
 * then by rule; a long line gives a rule once per call.
 */
void scan(const struct scanner *scanner, struct worker *worker, const uint8_t *block, size_t size, size_t before,
          int end, const uint8_t *suspended, struct results *results);

/* Add to lines[rule] how many of matches[0..count) are of that rule. */
void count_by_rule(const struct match *matches, size_t count, uint64_t *lines);

/* How often a regex was tried since the worker was made. */
uint64_t worker_tries(const struct worker *worker);

/*
 * The identity of a match: equal for a line that is read again. `rule` is a hash of the rule's id.
 */
uint64_t match_seed(uint64_t device, uint64_t inode, uint64_t generation);
uint64_t match_id(uint64_t seed, uint64_t offset, uint64_t rule);

/*
 * What a match's JSON says of its rule and of its source, as JSON members without braces. `names` are the keys of the
 * captures with their colons, each ended by a NUL.
 */
struct rule_format { const uint8_t *text, *names; size_t text_size, names_size; uint64_t hash; };
struct line_format { const uint8_t *source; size_t source_size; uint64_t seed; const struct rule_format *rules; };

/*
 * Write matches of a block that stands at `offset` as JSON, one a line; those with MATCH_LIMIT are left out. `numbers`:
 * the line number of each match, or NULL. Sets *done to how many were handled: fewer than `count` when the next might
 * not fit `capacity`. Returns how many bytes were written.
 */
size_t format_matches(const struct line_format *format, const struct match *matches, size_t count,
                      const uint32_t *captures, const uint8_t *block, uint64_t offset, const uint64_t *numbers,
                      uint8_t *out, size_t capacity, size_t *done);

/*
 * Many paths, looked at again and again. `path` ends in a NUL; `seen` is what stat(2) said last, all 0 before that, and of
 * a path that it refuses `error` alone: an errno. `asked` is 1 while its disk is waited for, which others may read.
 */
struct status { uint64_t error, device, inode, mode, size, written_s, written_ns; };
struct look { const char *path; struct status seen; uint32_t asked; };

/*
 * Ask for looks[0..count) again. The numbers of those where anything differs from what was seen go to changed[0..count),
 * in rising order. Returns how many. Waits for the disks that the paths are on.
 */
size_t look_again(struct look *const *looks, size_t count, uint32_t *changed);

/* Is there no disk below an open file? tmpfs and ramfs refuse RWF_NOWAIT. */
int file_in_memory(int fd);

/* What stands in an open file from an offset to its end, and its first bytes. */
struct news {
    uint8_t *data, *head; size_t room, head_room; /* where it is read to */
    uint64_t size; double written;                /* of the file: bytes, and seconds since 1970 */
    size_t got, head_size;                        /* bytes that were read */
};

/* Read what is in memory, without waiting for a disk. 0: that is not all, or there is more than room for, or an error. */
int read_news(int fd, uint64_t at, struct news *news);

/*
 * The miner: which lines are alike but for their values? It learns templates from the lines that it sees; lines that
 * differ in one word are one template as soon as enough different words were seen there.
 */

enum { TEMPLATE_TEXT_MAX = 2048, TEMPLATES_MAX = 1 << 20, VALUES_MAX = 128 };
enum { TEMPLATE_NONE = 0xFFFFFFFF };

struct miner;

/* A miner of at most `limit` templates, 16 to TEMPLATES_MAX. It belongs to one thread at a time. NULL: no memory. */
struct miner *miner_new(size_t limit);
void miner_free(struct miner *miner);

/*
 * The template of the line at block[*at], and of each `every`-th behind it, up to `size`, which is below 2^31; the last line
 * may have no LF. ids[n] is that of the line at starts[n]; TEMPLATE_NONE: there was no memory, or no id any more. At most
 * `capacity` lines; *at is then where to go on. Returns how many.
 */
size_t miner_mine(struct miner *miner, const uint8_t *block, size_t size, size_t *at, size_t every, uint32_t *ids,
                  uint32_t *starts, size_t capacity);

/* The template of a line, without learning from it. TEMPLATE_NONE: it would be a new one. */
uint32_t miner_find(const struct miner *miner, const uint8_t *line, size_t size);

/* The id that the next new template gets. They rise from 1 and are never used again. */
uint32_t miner_next(const struct miner *miner);

/* The template that `id` has become: alike ones join the oldest of them. TEMPLATE_NONE: it is forgotten. */
uint32_t miner_resolve(const struct miner *miner, uint32_t id);

/* How many templates there are; their ids and how many lines each had, the one seen longest ago first. */
size_t miner_count(const struct miner *miner);
void miner_list(const struct miner *miner, uint32_t *ids, uint64_t *counts);

/*
 * The same with their texts: u64 count, u32 id, u32 size, the text, for each. NULL: only how many bytes that is.
 */
size_t miner_dump(const struct miner *miner, uint8_t *out);

/* The text of a template to text[0..TEMPLATE_TEXT_MAX). Returns its size, TEMPLATE_NONE: it is forgotten. */
size_t miner_text(const struct miner *miner, uint32_t id, uint8_t *text);

/*
 * The values that a line has where the template has <*>: (offset, length) of each word to spans[2 * n], at most
 * `capacity` words, of which there are never more than VALUES_MAX. Returns how many.
 */
size_t miner_values(const struct miner *miner, uint32_t id, const uint8_t *line, size_t size, uint32_t *spans,
                    size_t capacity);

/* How many templates have joined others since it was made; the last `count` of them, (id, what it became), to
 * pairs[2 * n]. Of so many as its limit it is known. Returns how many. */
uint64_t miner_joins(const struct miner *miner);
size_t miner_joined(const struct miner *miner, uint32_t *pairs, size_t count);

/*
 * Which words of like lines vary: for each kind of line its hash, a count and the sets of varying words.
 * NULL: only how many numbers that is.
 */
size_t miner_varying(const struct miner *miner, uint64_t *numbers);

/*
 * To have a miner as it was: each template, the one seen longest ago first; what joined; what varies; the next id.
 * 0: this cannot be, or there is no memory.
 */
int miner_restore(struct miner *miner, uint32_t id, uint64_t count, const uint8_t *text, size_t size);
int miner_restore_joined(struct miner *miner, const uint32_t *pairs, size_t count);
int miner_restore_varying(struct miner *miner, const uint64_t *numbers, size_t count);
int miner_restore_next(struct miner *miner, uint32_t next);

/*
 * The model: which class is a line of? What labels said of its template, else a linear model over its words. Class 0 is
 * that of normal lines; below, `classes` is how many there are with it, 1 to MODEL_CLASSES. A model may be asked by any
 * number of threads while none teaches it.
 */

enum { MODEL_CLASSES = 64, MODEL_LABELS = 65536 };
enum { GUESS_TEMPLATE, GUESS_MODEL }; /* who says it: labels of the template, the linear model */

/* The most probable class by its number, and how probable it is. */
struct guess { uint16_t best, by; float confidence; };

struct model;

/* A model that knows nothing. NULL: no memory. */
struct model *model_new(void);
void model_free(struct model *model);

/* Guess the class of line[0..size), with its end or without; the first 4096 bytes are looked at. */
struct guess model_guess(const struct model *model, const uint8_t *line, size_t size, uint32_t template,
                         size_t classes);

/* Guess the classes of lines block[starts[i]..starts[i + 1]), for i below `count`, into guesses[0..count). */
void model_guess_all(const struct model *model, const uint8_t *block, const uint32_t *starts,
                     const uint32_t *templates, size_t count, size_t classes, struct guess *guesses);

/* The line is of this class, which is below `classes`. At most MODEL_LABELS templates' labels are counted. */
void model_learn(struct model *model, const uint8_t *line, size_t size, uint32_t template, size_t classes,
                 size_t class);

/* The templates are one: what labels said of `from` counts for `into` too. */
void model_join(struct model *model, uint32_t from, uint32_t into);

/* What is known as bytes, at most `capacity` of them to out[]; returns how many there are. */
size_t model_dump(const struct model *model, size_t classes, uint8_t *out, size_t capacity);

/* The model of such bytes. NULL: they are none of a model with so many classes; or no memory. */
struct model *model_load(const uint8_t *data, size_t size, size_t classes);

/*
 * Start a program in a session of its own, with the signals, descriptors, limits and rights that a `struct spawn` says,
 * and no others. All of it is set before its first instruction. Numbers are those of the system; arrays of texts end
 * with NULL.
 */

/* Where it failed. */
enum { SPAWN_FORK, SPAWN_DESCRIPTORS, SPAWN_CWD, SPAWN_CGROUP, SPAWN_AFFINITY, SPAWN_USER, SPAWN_LIMITS, SPAWN_EXEC };
struct spawn_fault { int stage, number; };          /* `number` is an errno, 0: none */
struct ceiling { int which; uint64_t soft, hard; }; /* of setrlimit; all bits set: no limit */

struct spawn {
    char *const *paths;                   /* where it may lie: the first that can be run is taken */
    char *const *argv, *const *env;
    const char *cwd; int makes_cwd;       /* makes_cwd: it is not there yet, and made for it: 0700, its user's */
    int in, out, err;                     /* become its 0, 1 and 2; -1: at its end */
    const int *kept; int kept_count;      /* others that it gets, by their numbers, which are above 2 */
    int procs;                            /* a cgroup.procs to enter; -1: none */
    const char *oom_score_adj;            /* or NULL */
    int nice;                             /* added to ours */
    const uint8_t *cpus; size_t cpus_size; /* a bit for each that it may run on, a multiple of 8 bytes; or NULL */
    int is_other_user;                    /* then it becomes `uid`, with `gid` and these groups alone */
    uint32_t uid, gid; const uint32_t *groups; int group_count;
    const struct ceiling *ceilings; int ceiling_count;
};

/* Its pid once it runs, or -1: it does not, nothing is left of it, and `fault` says why. Waits for the exec. */
int spawn_program(const struct spawn *spawn, struct spawn_fault *fault);

#endif
