/*
 * The prefilter: find some thousand literals in a block at several bytes a cycle.
 *
 * Each literal is known by a window, `width` consecutive bytes of it, and put into one of eight buckets of one of up to
 * MAX_GROUPS groups. For each byte of the window a group has a table: which buckets have a literal whose byte there has
 * this key, its low nibble? A byte shuffle looks up 16 or 32 text positions at once, with the text itself as index; the
 * AND over the window's bytes leaves the buckets that may match. AVX-512 looks up 64 positions by the low six bits:
 * then fewer bytes tell as much. What is left is looked up in the bucket's hash table by the first bytes of the window,
 * and compared.
 *
 * Which window and which bucket decides how often that happens in vain. They are chosen greedily by the false hits on
 * positions sampled from text like that to be searched, then chosen again one by one. (protocols/logs.md 3: low nibbles
 * alone beat the classic low and high nibbles of four bytes by 1.3 to 1.9 times.)
 */

#include <stdlib.h>
#include <string.h>

#include "native.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { MAX_GROUPS = 3, BUCKETS = 8, MAX_WIDTH = 7, MAX_BUCKETS = MAX_GROUPS * BUCKETS };
enum { NIBBLES = 16, MAX_KEYS = 64 };
enum { WORD = 8 };         /* bytes read at once where candidates are checked */
enum { CHUNK = 4096 };     /* searched before its candidates are checked */
enum { AHEAD = 1024 };     /* prefetched; the processor alone reads ahead too late and halves the speed */
enum { SAMPLES = 16384, PLANE = SAMPLES / 64 };
enum { PASSES = 2, SHORTLIST = 12 };
enum { PASSES_MAX = 1500 }; /* literals; with more, a pass takes seconds */

/* A literal in its bucket's table. `value` and `mask` are the WORD bytes from the window on: a case-blind letter has
 * no case bit in its mask, a byte beyond the literal's end no bit at all. */
struct entry {
    uint64_t value, mask;
    uint32_t next; /* index + 1 of the next entry in the slot */
    uint8_t size, window;
};

/* All of a literal, in the same way. */
struct whole {
    uint8_t values[LITERAL_MAX], masks[LITERAL_MAX];
};

struct bucket {
    uint64_t mask; /* the bytes that all its entries have, without case bits */
    uint32_t shift;
    uint32_t slots; /* where its slots begin */
};

struct prefilter {
    int engine;
    int shape; /* which of SHAPES or WIDE_SHAPES */
    uint8_t tables[MAX_GROUPS][MAX_WIDTH][MAX_KEYS];
    uint32_t exact[MAX_WIDTH][256]; /* the same for whole bytes and all buckets: a bit a bucket */
    struct bucket buckets[MAX_BUCKETS];
    uint32_t *slots; /* index + 1 of the first entry; 0: none */
    struct entry *entries; /* of each literal */
    struct whole *wholes;
};

/* ------------------------------------------------------------------------------------------------ choosing windows */

struct place {
    uint32_t bucket, window;
};

/* One bucket while it is filled: the keys it accepts at each byte (bit k is key k), what share of the text has one, and
 * for each sample whether it has. */
struct filling {
    uint64_t keys[MAX_WIDTH];
    double shares[MAX_WIDTH];
    uint64_t accepts[MAX_WIDTH][PLANE];
    double expected; /* share of positions that hit, were the bytes of the text independent */
    uint32_t hits;   /* samples that hit */
};

struct choice {
    const struct literal *literals;
    size_t count, buckets, width, samples;
    size_t keys; /* NIBBLES or MAX_KEYS */
    int fold; /* look up bytes above 127 by their low nibble too; a shuffle alone gives 0 for them */
    /* For each byte of the window and key: the samples that have it there, and what share of all that is. */
    uint64_t planes[MAX_WIDTH][MAX_KEYS][PLANE];
    double shares[MAX_WIDTH][MAX_KEYS];
    struct filling fillings[MAX_BUCKETS];
    struct place *places;
};

static uint64_t all_keys(const struct choice *choice) { return ~(uint64_t)0 >> (MAX_KEYS - choice->keys); }

static int is_letter(uint8_t byte) { return (uint8_t)((byte | 32) - 'a') < 26; }

/* Of each byte of a window the set of keys that fit: one, those of a letter in both cases, or beyond the literal's end
 * all. */
struct wanted {
    uint64_t at[MAX_WIDTH];
};

static struct wanted look_at(const struct choice *choice, const struct literal *literal, size_t window)
{
    struct wanted wanted;
    for (size_t byte = 0; byte < MAX_WIDTH; byte++) {
        wanted.at[byte] = all_keys(choice);
        if (window + byte < literal->size) {
            uint8_t text = literal->text[window + byte];
            wanted.at[byte] = (uint64_t)1 << (text & (choice->keys - 1));
            if (literal->caseless && is_letter(text))
                wanted.at[byte] |= (uint64_t)1 << ((text ^ 32) & (choice->keys - 1));
        }
    }
    return wanted;
}

static int is_ascii(const uint8_t *text, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (text[i] > 127)
            return 0;
    return 1;
}

static size_t windows_of(const struct choice *choice, const struct literal *literal)
{
    return literal->size > choice->width ? literal->size - choice->width + 1 : 1;
}

/* Without `fold` a window must be whole and ASCII, since a byte above 127 looks up 0. */
static int is_usable(const struct choice *choice, const struct literal *literal, size_t window)
{
    return choice->fold ||
           (window + choice->width <= literal->size && is_ascii(literal->text + window, choice->width));
}

static void sample_text(struct choice *choice, const uint8_t *sample, size_t size)
{
    size_t positions = size >= choice->width ? size - choice->width + 1 : 0;
    choice->samples = positions < SAMPLES ? positions : SAMPLES;
    for (size_t i = 0; i < choice->samples; i++) {
        const uint8_t *at = sample + (size_t)((uint64_t)i * positions / choice->samples);
        for (size_t byte = 0; byte < choice->width; byte++)
            if (choice->fold || at[byte] < 128)
                choice->planes[byte][at[byte] & (choice->keys - 1)][i / 64] |= (uint64_t)1 << (i % 64);
    }
    for (size_t byte = 0; byte < choice->width; byte++)
        for (size_t key = 0; key < choice->keys; key++) {
            size_t seen = 1; /* never 0: what the sample lacks may come */
            for (size_t i = 0; i < PLANE; i++)
                seen += (size_t)__builtin_popcountll(choice->planes[byte][key][i]);
            choice->shares[byte][key] = (double)seen / (double)(choice->samples + choice->keys);
        }
}

static double share_with(const struct choice *choice, const struct filling *filling, size_t byte, uint64_t wanted)
{
    double share = filling->shares[byte];
    for (uint64_t missing = wanted & ~filling->keys[byte]; missing; missing &= missing - 1)
        share += choice->shares[byte][__builtin_ctzll(missing)];
    return share;
}

static double expected_with(const struct choice *choice, const struct filling *filling, struct wanted wanted)
{
    double share = 1;
    for (size_t byte = 0; byte < choice->width; byte++)
        share *= share_with(choice, filling, byte, wanted.at[byte]);
    return share;
}

static uint32_t hits_with(const struct choice *choice, const struct filling *filling, struct wanted wanted)
{
    uint64_t all[PLANE];
    memset(all, 0xFF, sizeof all);
    for (size_t byte = 0; byte < choice->width; byte++) {
        if (wanted.at[byte] == all_keys(choice))
            continue; /* the literal ends before this byte: any goes */
        uint64_t missing = wanted.at[byte] & ~filling->keys[byte], second = missing & (missing - 1);
        const uint64_t *had = filling->accepts[byte];
        if (second) {
            const uint64_t *one = choice->planes[byte][__builtin_ctzll(missing)];
            const uint64_t *other = choice->planes[byte][__builtin_ctzll(second)];
            for (size_t i = 0; i < PLANE; i++)
                all[i] &= had[i] | one[i] | other[i];
        } else if (missing) {
            const uint64_t *added = choice->planes[byte][__builtin_ctzll(missing)];
            for (size_t i = 0; i < PLANE; i++)
                all[i] &= had[i] | added[i];
        } else {
            for (size_t i = 0; i < PLANE; i++)
                all[i] &= had[i];
        }
    }
    uint32_t hits = 0;
    for (size_t i = 0; i < PLANE; i++)
        hits += (uint32_t)__builtin_popcountll(all[i]);
    return hits;
}

static void put(struct choice *choice, size_t index, struct place place)
{
    struct filling *filling = &choice->fillings[place.bucket];
    struct wanted wanted = look_at(choice, &choice->literals[index], place.window);
    for (size_t byte = 0; byte < choice->width; byte++) {
        filling->shares[byte] = share_with(choice, filling, byte, wanted.at[byte]);
        for (uint64_t rest = wanted.at[byte] & ~filling->keys[byte]; rest; rest &= rest - 1)
            for (size_t i = 0; i < PLANE; i++)
                filling->accepts[byte][i] |= choice->planes[byte][__builtin_ctzll(rest)][i];
        filling->keys[byte] |= wanted.at[byte];
    }
    choice->places[index] = place;
}

/* The place that adds least. A shortlist by independent bytes, which is quick, decided by the samples. */
static struct place best_place(const struct choice *choice, const struct literal *literal)
{
    struct { double added; struct place place; } shortlist[SHORTLIST];
    size_t listed = 0;
    for (uint32_t window = 0; window < windows_of(choice, literal); window++) {
        if (!is_usable(choice, literal, window))
            continue;
        struct wanted wanted = look_at(choice, literal, window);
        for (uint32_t bucket = 0; bucket < choice->buckets; bucket++) {
            const struct filling *filling = &choice->fillings[bucket];
            double added = expected_with(choice, filling, wanted) - filling->expected;
            if (listed == SHORTLIST && added >= shortlist[listed - 1].added)
                continue;
            size_t at = listed < SHORTLIST ? listed++ : listed - 1;
            for (; at && shortlist[at - 1].added > added; at--)
                shortlist[at] = shortlist[at - 1];
            shortlist[at].added = added;
            shortlist[at].place = (struct place){bucket, window};
        }
    }
    size_t best = 0;
    double least = 0;
    for (size_t i = 0; i < listed; i++) {
        const struct filling *filling = &choice->fillings[shortlist[i].place.bucket];
        struct wanted wanted = look_at(choice, literal, shortlist[i].place.window);
        double cost = (double)hits_with(choice, filling, wanted) - filling->hits +
                      shortlist[i].added * (double)choice->samples / 4; /* tells apart what no sample hits */
        if (i == 0 || cost < least) {
            least = cost;
            best = i;
        }
    }
    return shortlist[best].place;
}

static void count_hits(struct choice *choice, uint32_t bucket)
{
    struct filling *filling = &choice->fillings[bucket];
    static const struct wanted nothing_more;
    filling->hits = filling->keys[0] ? hits_with(choice, filling, nothing_more) : 0;
    filling->expected = filling->keys[0] ? expected_with(choice, filling, nothing_more) : 0;
}

static void place_best(struct choice *choice, size_t index)
{
    struct place place = best_place(choice, &choice->literals[index]);
    put(choice, index, place);
    count_hits(choice, place.bucket);
}

static void take_out(struct choice *choice, size_t index)
{
    uint32_t bucket = choice->places[index].bucket;
    memset(&choice->fillings[bucket], 0, sizeof choice->fillings[bucket]);
    choice->places[index].bucket = MAX_BUCKETS;
    for (size_t i = 0; i < choice->count; i++)
        if (choice->places[i].bucket == bucket)
            put(choice, i, choice->places[i]);
    count_hits(choice, bucket);
}

static void choose_places(struct choice *choice)
{
    for (size_t i = 0; i < choice->count; i++)
        choice->places[i].bucket = MAX_BUCKETS;
    for (size_t i = 0; i < choice->count; i++)
        place_best(choice, i);
    for (int pass = 0; pass < PASSES && choice->count <= PASSES_MAX; pass++)
        for (size_t i = 0; i < choice->count; i++) {
            take_out(choice, i);
            place_best(choice, i);
        }
}

/* ------------------------------------------------------------------------------------------------------- building */

static uint64_t load(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static uint32_t hash(uint64_t word, uint32_t shift) { return (uint32_t)(word * 0x9E3779B97F4A7C15u >> shift); }

static void fill_entry(struct entry *entry, struct whole *whole, const struct literal *literal, uint32_t window)
{
    entry->size = (uint8_t)literal->size;
    entry->window = (uint8_t)window;
    for (size_t i = 0; i < literal->size; i++) {
        whole->masks[i] = literal->caseless && is_letter(literal->text[i]) ? 0xDF : 0xFF;
        whole->values[i] = literal->text[i] & whole->masks[i];
    }
    uint8_t value[WORD] = {0}, mask[WORD] = {0};
    for (size_t i = 0; i < WORD && window + i < literal->size; i++) {
        value[i] = whole->values[window + i];
        mask[i] = whole->masks[window + i];
    }
    entry->value = load(value);
    entry->mask = load(mask);
}

static void fill_tables(struct prefilter *prefilter, const struct choice *choice)
{
    for (size_t i = 0; i < choice->count; i++) {
        const struct entry *entry = &prefilter->entries[i];
        const struct whole *whole = &prefilter->wholes[i];
        struct wanted wanted = look_at(choice, &choice->literals[i], entry->window);
        uint32_t bucket = choice->places[i].bucket;
        for (size_t byte = 0; byte < MAX_WIDTH; byte++) {
            size_t at = (size_t)entry->window + byte;
            for (size_t key = 0; key < choice->keys; key++)
                if (wanted.at[byte] >> key & 1)
                    prefilter->tables[bucket / BUCKETS][byte][key] |= (uint8_t)(1u << bucket % BUCKETS);
            for (size_t value = 0; value < 256; value++)
                if (at >= entry->size || (value & whole->masks[at]) == whole->values[at])
                    prefilter->exact[byte][value] |= (uint32_t)1 << bucket;
        }
    }
}

static int fill_buckets(struct prefilter *prefilter, const struct choice *choice)
{
    size_t sizes[MAX_BUCKETS] = {0}, total = 0;
    for (size_t i = 0; i < choice->count; i++)
        sizes[choice->places[i].bucket]++;
    for (size_t b = 0; b < choice->buckets; b++) {
        uint32_t bits = 4;
        while ((size_t)1 << bits < 4 * sizes[b])
            bits++;
        memset(&prefilter->buckets[b].mask, 0xDF, sizeof prefilter->buckets[b].mask);
        prefilter->buckets[b].shift = 64 - bits;
        prefilter->buckets[b].slots = (uint32_t)total;
        total += (size_t)1 << bits;
    }
    prefilter->slots = calloc(total, sizeof *prefilter->slots);
    if (!prefilter->slots)
        return 0;
    for (size_t i = 0; i < choice->count; i++) {
        struct entry *entry = &prefilter->entries[i];
        prefilter->buckets[choice->places[i].bucket].mask &= entry->mask;
    }
    for (size_t i = choice->count; i-- > 0;) {
        struct entry *entry = &prefilter->entries[i];
        const struct bucket *bucket = &prefilter->buckets[choice->places[i].bucket];
        uint32_t *slot = &prefilter->slots[bucket->slots + hash(entry->value & bucket->mask, bucket->shift)];
        entry->next = *slot;
        *slot = (uint32_t)i + 1;
    }
    return 1;
}

struct prefilter *prefilter_new(const struct literal *literals, size_t count, const uint8_t *sample,
                                size_t sample_size, int engine)
{
    for (size_t i = 0; i < count; i++)
        if (literals[i].size < LITERAL_MIN || literals[i].size > LITERAL_MAX)
            return NULL;
    /* More literals need more buckets to stay apart, and each group costs a look-up a byte of the window. */
    static const struct { size_t most, groups, width; } sizes[] = {
        {32, 1, 5}, {96, 1, 6}, {256, 2, 6}, {1000, 2, 7}, {SIZE_MAX, 3, 6},
    }, wide_sizes[] = {
        {80, 1, 4}, {200, 1, 5}, {1000, 2, 5}, {SIZE_MAX, 3, 5},
    };
    struct prefilter *prefilter = calloc(1, sizeof *prefilter);
    struct choice *choice = calloc(1, sizeof *choice);
    int done = 0;
    if (prefilter && choice) {
        int is_wide = engine == ENGINE_AVX512, size = 0;
        while (count > (is_wide ? wide_sizes : sizes)[size].most)
            size++;
        choice->literals = literals;
        choice->count = count;
        choice->buckets = (is_wide ? wide_sizes : sizes)[size].groups * BUCKETS;
        choice->width = (is_wide ? wide_sizes : sizes)[size].width;
        choice->keys = is_wide ? MAX_KEYS : NIBBLES;
        choice->fold = is_wide;
        for (size_t i = 0; i < count && !choice->fold; i++) {
            size_t usable = 0;
            for (size_t window = 0; window < windows_of(choice, &literals[i]); window++)
                usable += (size_t)is_usable(choice, &literals[i], window);
            choice->fold = !usable;
        }
        prefilter->engine = engine;
        prefilter->shape = is_wide ? size : 2 * size + choice->fold;
        prefilter->entries = calloc(count + 1, sizeof *prefilter->entries);
        prefilter->wholes = calloc(count + 1, sizeof *prefilter->wholes);
        choice->places = calloc(count + 1, sizeof *choice->places);
        if (prefilter->entries && prefilter->wholes && choice->places) {
            sample_text(choice, sample, sample_size);
            choose_places(choice);
            for (size_t i = 0; i < count; i++)
                fill_entry(&prefilter->entries[i], &prefilter->wholes[i], &literals[i], choice->places[i].window);
            fill_tables(prefilter, choice);
            done = fill_buckets(prefilter, choice);
        }
        free(choice->places);
    }
    free(choice);
    if (!done) {
        prefilter_free(prefilter);
        return NULL;
    }
    return prefilter;
}

void prefilter_free(struct prefilter *prefilter)
{
    if (!prefilter)
        return;
    free(prefilter->slots);
    free(prefilter->entries);
    free(prefilter->wholes);
    free(prefilter);
}

/* ------------------------------------------------------------------------------------------------------ searching */

struct search {
    const struct prefilter *prefilter;
    const uint8_t *block;
    size_t size;
    struct literal_hit *hits;
    size_t count, capacity;
    int is_full;
};

static int is_literal_at(const struct whole *whole, size_t size, const uint8_t *text)
{
    size_t i = 0;
    for (; i + WORD <= size; i += WORD)
        if ((load(text + i) & load(whole->masks + i)) != load(whole->values + i))
            return 0;
    for (; i < size; i++)
        if ((text[i] & whole->masks[i]) != whole->values[i])
            return 0;
    return 1;
}

/* The literals whose window stands at `at`; text is the block from there, or its last bytes and zeros. 0: the hits are
 * full, and those at this position taken back. */
static inline int check(struct search *search, size_t at, const uint8_t *text)
{
    const struct prefilter *prefilter = search->prefilter;
    uint32_t buckets = prefilter->exact[0][text[0]] & prefilter->exact[1][text[1]] & prefilter->exact[2][text[2]] &
                       prefilter->exact[3][text[3]] & prefilter->exact[4][text[4]] & prefilter->exact[5][text[5]] &
                       prefilter->exact[6][text[6]];
    size_t before = search->count;
    for (; buckets; buckets &= buckets - 1) {
        const struct bucket *bucket = &prefilter->buckets[__builtin_ctz(buckets)];
        uint64_t word = load(text);
        uint32_t next = prefilter->slots[bucket->slots + hash(word & bucket->mask, bucket->shift)];
        for (const struct entry *entry; next; next = entry->next) {
            entry = &prefilter->entries[next - 1];
            if ((word & entry->mask) != entry->value || at < entry->window)
                continue;
            size_t start = at - entry->window;
            if (start + entry->size > search->size ||
                !is_literal_at(&prefilter->wholes[next - 1], entry->size, search->block + start))
                continue;
            if (search->count == search->capacity) {
                search->count = before;
                search->is_full = 1;
                return 0;
            }
            search->hits[search->count++] = (struct literal_hit){(uint32_t)start, next - 1};
        }
    }
    return 1;
}

/* Each of text[i..end), which is the block from `offset` on; WORD bytes at `end` can be read too. */
static size_t find_scalar(struct search *search, const uint8_t *text, size_t offset, size_t i, size_t end)
{
    const struct prefilter *prefilter = search->prefilter;
    for (; i < end; i++) {
        uint32_t buckets = prefilter->exact[0][text[i]] & prefilter->exact[1][text[i + 1]] &
                           prefilter->exact[2][text[i + 2]];
        if (buckets && !check(search, offset + i, text + i))
            return i;
    }
    return end;
}

/* What a vector loop found in one chunk: bit k of found[n] is a candidate at base + 64 n + k. They are checked after
 * the chunk: a branch on each vector would be mispredicted for most candidates. */
struct chunk {
    size_t base, count;
    uint64_t found[CHUNK / 64];
};

/* Bit n: there is a candidate in found[n]. `count` is not 0. */
static inline uint64_t marked(const struct chunk *chunk)
{
    uint64_t words = 0;
    for (size_t n = 0; n < chunk->count; n++)
        words |= (uint64_t)(chunk->found[n] != 0) << n;
    return words;
}

/* Returns `end`, or where the hits were full. */
static size_t check_chunk(struct search *search, const struct chunk *chunk, uint64_t words, size_t end)
{
    for (; words; words &= words - 1) {
        size_t n = (size_t)__builtin_ctzll(words);
        for (uint64_t found = chunk->found[n]; found; found &= found - 1) {
            size_t at = chunk->base + 64 * n + (size_t)__builtin_ctzll(found);
            if (!check(search, at, search->block + at))
                return at;
        }
    }
    return end;
}

/* The look_* functions: which of the 64 positions from `text` on are candidates? */

#if defined(__x86_64__) || defined(__i386__)

#define SSSE3 __attribute__((target("ssse3")))
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi")))

SSSE3 static inline __m128i table_ssse3(const uint8_t *table) { return _mm_loadu_si128((const void *)table); }

SSSE3 __attribute__((always_inline)) static inline uint64_t
look_ssse3(__m128i tables[MAX_GROUPS][MAX_WIDTH], const uint8_t *text, size_t groups, size_t width, int fold)
{
    uint64_t found = 0;
#pragma GCC unroll 8
    for (int part = 0; part < 4; part++) {
        __m128i left[MAX_GROUPS];
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++) {
            __m128i bytes = _mm_loadu_si128((const void *)(text + 16 * part + byte));
            if (fold)
                bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
#pragma GCC unroll 8
            for (size_t g = 0; g < groups; g++) {
                __m128i may = _mm_shuffle_epi8(tables[g][byte], bytes);
                left[g] = byte ? _mm_and_si128(left[g], may) : may;
            }
        }
        __m128i any = left[0];
#pragma GCC unroll 8
        for (size_t g = 1; g < groups; g++)
            any = _mm_or_si128(any, left[g]);
        uint32_t none = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128()));
        found |= (uint64_t)(none ^ 0xFFFF) << 16 * part;
    }
    return found;
}

AVX2 static inline __m256i table_avx2(const uint8_t *table)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
}

AVX2 __attribute__((always_inline)) static inline uint64_t
look_avx2(__m256i tables[MAX_GROUPS][MAX_WIDTH], const uint8_t *text, size_t groups, size_t width, int fold)
{
    uint64_t none = 0;
#pragma GCC unroll 8
    for (int part = 0; part < 2; part++) {
        __m256i left[MAX_GROUPS];
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++) {
            __m256i bytes = _mm256_loadu_si256((const void *)(text + 32 * part + byte));
            if (fold)
                bytes = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
#pragma GCC unroll 8
            for (size_t g = 0; g < groups; g++) {
                __m256i may = _mm256_shuffle_epi8(tables[g][byte], bytes);
                left[g] = byte ? _mm256_and_si256(left[g], may) : may;
            }
        }
        __m256i any = left[0];
#pragma GCC unroll 8
        for (size_t g = 1; g < groups; g++)
            any = _mm256_or_si256(any, left[g]);
        none |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(any, _mm256_setzero_si256())) << 32 * part;
    }
    return ~none;
}

AVX2 static inline uint64_t marked_avx2(const struct chunk *chunk)
{
    uint64_t none = 0;
#pragma GCC unroll 16
    for (int part = 0; part < 16; part++) {
        __m256i found = _mm256_loadu_si256((const void *)(chunk->found + 4 * part));
        __m256i equal = _mm256_cmpeq_epi64(found, _mm256_setzero_si256());
        none |= (uint64_t)(uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(equal)) << 4 * part;
    }
    return ~none & ~(uint64_t)0 >> (64 - chunk->count);
}

AVX512 static inline __m512i table_avx512(const uint8_t *table) { return _mm512_loadu_si512(table); }

/* By the low six bits of a byte, so there is nothing to fold. */
AVX512 __attribute__((always_inline)) static inline uint64_t
look_avx512(__m512i tables[MAX_GROUPS][MAX_WIDTH], const uint8_t *text, size_t groups, size_t width, int fold)
{
    (void)fold;
    __m512i left[MAX_GROUPS], last[MAX_GROUPS];
#pragma GCC unroll 8
    for (size_t byte = 0; byte < width; byte++) {
        __m512i bytes = _mm512_loadu_si512(text + byte);
#pragma GCC unroll 8
        for (size_t g = 0; g < groups; g++) {
            last[g] = _mm512_permutexvar_epi8(bytes, tables[g][byte]);
            if (byte == 0)
                left[g] = last[g];
            else if (byte < width - 1)
                left[g] = _mm512_and_si512(left[g], last[g]);
        }
    }
    if (groups == 1)
        return _mm512_test_epi8_mask(left[0], last[0]);
    __m512i any = _mm512_and_si512(left[0], last[0]);
#pragma GCC unroll 8
    for (size_t g = 1; g < groups; g++)
        any = _mm512_or_si512(any, _mm512_and_si512(left[g], last[g]));
    return _mm512_test_epi8_mask(any, any);
}

AVX512 static inline uint64_t marked_avx512(const struct chunk *chunk)
{
    uint64_t words = 0;
#pragma GCC unroll 8
    for (int eighth = 0; eighth < 8; eighth++) {
        __m512i found = _mm512_loadu_si512(chunk->found + 8 * eighth);
        words |= (uint64_t)_mm512_test_epi64_mask(found, found) << 8 * eighth;
    }
    return words & ~(uint64_t)0 >> (64 - chunk->count);
}

#elif defined(__aarch64__)

static inline uint8x16_t table_neon(const uint8_t *table) { return vld1q_u8(table); }

__attribute__((always_inline)) static inline uint64_t
look_neon(uint8x16_t tables[MAX_GROUPS][MAX_WIDTH], const uint8_t *text, size_t groups, size_t width, int fold)
{
    /* A look-up gives 0 for an index above 15; without `fold` those of bytes above 127 must stay above. */
    const uint8x16_t low = vdupq_n_u8(fold ? 0x0F : 0x8F);
    uint8x16_t any[4];
#pragma GCC unroll 8
    for (int part = 0; part < 4; part++) {
        uint8x16_t left[MAX_GROUPS];
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++) {
            uint8x16_t bytes = vandq_u8(vld1q_u8(text + 16 * part + byte), low);
#pragma GCC unroll 8
            for (size_t g = 0; g < groups; g++) {
                uint8x16_t may = vqtbl1q_u8(tables[g][byte], bytes);
                left[g] = byte ? vandq_u8(left[g], may) : may;
            }
        }
        any[part] = left[0];
#pragma GCC unroll 8
        for (size_t g = 1; g < groups; g++)
            any[part] = vorrq_u8(any[part], left[g]);
    }
    /* NEON has no movemask: a bit for each byte, and neighbours added up three times. */
    static const uint8_t weights[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vld1q_u8(weights);
#pragma GCC unroll 8
    for (int part = 0; part < 4; part++)
        any[part] = vandq_u8(vtstq_u8(any[part], any[part]), bits);
    uint8x16_t sums = vpaddq_u8(vpaddq_u8(any[0], any[1]), vpaddq_u8(any[2], any[3]));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)), 0);
}

#endif

/* The loop of an engine. From the second word on one load of each window is aligned: 5 % faster in all. */
#define FIND_BY(ENGINE, ATTRIBUTE, VECTOR, SHAPES, MARKED)                                                             \
    ATTRIBUTE __attribute__((always_inline)) static inline size_t mark_##ENGINE(                                       \
        const struct prefilter *prefilter, const uint8_t *block, size_t start, size_t end, struct chunk *chunk,        \
        size_t groups, size_t width, int fold)                                                                         \
    {                                                                                                                  \
        VECTOR tables[MAX_GROUPS][MAX_WIDTH];                                                                          \
        _Pragma("GCC unroll 8") for (size_t g = 0; g < groups; g++)                                                    \
            _Pragma("GCC unroll 8") for (size_t byte = 0; byte < width; byte++)                                        \
                tables[g][byte] = table_##ENGINE(prefilter->tables[g][byte]);                                          \
        size_t past = (uintptr_t)(block + start) % 64, n = 0;                                                          \
        chunk->base = start - past;                                                                                    \
        chunk->found[n++] = look_##ENGINE(tables, block + start, groups, width, fold) << past;                         \
        size_t i = start + 64 - past;                                                                                  \
        for (; n < CHUNK / 64 && i + 64 <= end; i += 64) {                                                             \
            __builtin_prefetch(block + i + AHEAD);                                                                     \
            chunk->found[n++] = look_##ENGINE(tables, block + i, groups, width, fold);                                 \
        }                                                                                                              \
        chunk->count = n;                                                                                              \
        return i;                                                                                                      \
    }                                                                                                                  \
    ATTRIBUTE static size_t find_##ENGINE(struct search *search, size_t i, size_t end)                                 \
    {                                                                                                                  \
        const struct prefilter *prefilter = search->prefilter;                                                         \
        struct chunk chunk = {0};                                                                                      \
        while (!search->is_full && i + 64 <= end) {                                                                    \
            size_t start = i;                                                                                          \
            switch (prefilter->shape) {                                                                                \
                SHAPES(ENGINE)                                                                                         \
            }                                                                                                          \
            i = check_chunk(search, &chunk, MARKED(&chunk), i);                                                        \
        }                                                                                                              \
        return i;                                                                                                      \
    }

/* One loop for each shape that prefilter_new makes: with the numbers known, tables stay in registers. */
#define SHAPE(NUMBER, ENGINE, GROUPS, WIDTH, FOLD)                                                                     \
    case NUMBER:                                                                                                       \
        i = mark_##ENGINE(prefilter, search->block, start, end, &chunk, GROUPS, WIDTH, FOLD);                          \
        break;

#define SHAPES(ENGINE)                                                                                                 \
    SHAPE(0, ENGINE, 1, 5, 0)                                                                                          \
    SHAPE(1, ENGINE, 1, 5, 1)                                                                                          \
    SHAPE(2, ENGINE, 1, 6, 0)                                                                                          \
    SHAPE(3, ENGINE, 1, 6, 1)                                                                                          \
    SHAPE(4, ENGINE, 2, 6, 0)                                                                                          \
    SHAPE(5, ENGINE, 2, 6, 1)                                                                                          \
    SHAPE(6, ENGINE, 2, 7, 0)                                                                                          \
    SHAPE(7, ENGINE, 2, 7, 1)                                                                                          \
    SHAPE(8, ENGINE, 3, 6, 0)                                                                                          \
    SHAPE(9, ENGINE, 3, 6, 1)

#define WIDE_SHAPES(ENGINE)                                                                                            \
    SHAPE(0, ENGINE, 1, 4, 1)                                                                                          \
    SHAPE(1, ENGINE, 1, 5, 1)                                                                                          \
    SHAPE(2, ENGINE, 2, 5, 1)                                                                                          \
    SHAPE(3, ENGINE, 3, 5, 1)

#if defined(__x86_64__) || defined(__i386__)
FIND_BY(ssse3, SSSE3, __m128i, SHAPES, marked)
FIND_BY(avx2, AVX2, __m256i, SHAPES, marked_avx2)
FIND_BY(avx512, AVX512, __m512i, WIDE_SHAPES, marked_avx512)
#elif defined(__aarch64__)
FIND_BY(neon, , uint8x16_t, SHAPES, marked)
#endif

size_t prefilter_find(const struct prefilter *prefilter, const uint8_t *block, size_t start, size_t size,
                      struct literal_hit *hits, size_t capacity, size_t *next)
{
    struct search search = {.prefilter = prefilter, .block = block, .size = size, .hits = hits, .capacity = capacity};
    /* Before it each position has WORD bytes, and a vector's windows, within the block. */
    size_t safe = size > start + WORD ? size - WORD : start;
    size_t i = start;
    switch (prefilter->engine) {
#if defined(__x86_64__) || defined(__i386__)
    case ENGINE_AVX512:
        i = find_avx512(&search, i, safe);
        break;
    case ENGINE_AVX2:
        i = find_avx2(&search, i, safe);
        break;
    case ENGINE_SSSE3:
        i = find_ssse3(&search, i, safe);
        break;
#elif defined(__aarch64__)
    case ENGINE_NEON:
        i = find_neon(&search, i, safe);
        break;
#endif
    }
    if (!search.is_full)
        i = find_scalar(&search, block, 0, i, safe);
    if (!search.is_full && i < size) {
        uint8_t tail[3 * WORD] = {0};
        memcpy(tail, block + i, size - i);
        i += find_scalar(&search, tail, i, 0, size - i);
    }
    *next = i;
    return search.count;
}
