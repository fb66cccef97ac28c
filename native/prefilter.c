/*
 * The prefilter: find some thousand literals in a block at several bytes a cycle.
 *
 * Each literal is known by a window, `width` consecutive bytes of it, and put into one of eight buckets of one of up to
 * MAX_GROUPS groups. For each byte of the window a group has a table of 16 entries: which buckets have a literal whose
 * byte there has this low nibble? A byte shuffle looks up 16 or 32 text positions at once, with the text itself as index;
 * the AND over the window's bytes leaves the buckets that may match. What is left is looked up in the bucket's hash
 * table by the first bytes of the window, and compared.
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
enum { WORD = 8 };         /* bytes read at once where candidates are checked */
enum { CHUNK = 4096 };     /* searched before its candidates are checked */
enum { AHEAD = 2048 };     /* prefetched; the processor alone reads ahead too late and halves the speed */
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
    size_t groups, width;
    int shape; /* which of SHAPES */
    int fold; /* look up bytes above 127 by their low nibble too; a shuffle alone gives 0 for them */
    uint8_t tables[MAX_GROUPS][MAX_WIDTH][16];
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

/* One bucket while it is filled: the nibbles it accepts at each byte, and for each sample whether it would. */
struct filling {
    uint16_t nibbles[MAX_WIDTH];
    uint64_t accepts[MAX_WIDTH][PLANE];
    double expected; /* share of positions that hit, were the bytes of the text independent */
    uint32_t hits;   /* samples that hit */
};

struct choice {
    const struct literal *literals;
    size_t count, buckets, width, samples;
    int fold;
    uint64_t planes[MAX_WIDTH][16][PLANE]; /* for each byte of the window and nibble: the samples that have it there */
    double shares[MAX_WIDTH][2][256];      /* share of samples with a nibble of the set: low 8 nibbles, high 8 */
    struct filling fillings[MAX_BUCKETS];
    struct place *places;
};

/* Of each byte of a window the set of nibbles that fit: one, or beyond the literal's end all. */
struct wanted {
    uint16_t at[MAX_WIDTH];
};

static struct wanted look_at(const struct literal *literal, size_t window)
{
    struct wanted wanted;
    for (size_t byte = 0; byte < MAX_WIDTH; byte++)
        wanted.at[byte] =
            window + byte < literal->size ? (uint16_t)(1u << (literal->text[window + byte] & 15)) : 0xFFFF;
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
                choice->planes[byte][at[byte] & 15][i / 64] |= (uint64_t)1 << (i % 64);
    }
    for (size_t byte = 0; byte < choice->width; byte++) {
        double share[16];
        for (size_t nibble = 0; nibble < 16; nibble++) {
            size_t seen = 1; /* never 0: what the sample lacks may come */
            for (size_t i = 0; i < PLANE; i++)
                seen += (size_t)__builtin_popcountll(choice->planes[byte][nibble][i]);
            share[nibble] = (double)seen / (double)(choice->samples + 16);
        }
        for (size_t set = 0; set < 256; set++)
            for (size_t bit = 0; bit < 8; bit++)
                if (set >> bit & 1) {
                    choice->shares[byte][0][set] += share[bit];
                    choice->shares[byte][1][set] += share[bit + 8];
                }
    }
}

static double expected_with(const struct choice *choice, const struct filling *filling, struct wanted wanted)
{
    double share = 1;
    for (size_t byte = 0; byte < choice->width; byte++) {
        unsigned set = filling->nibbles[byte] | wanted.at[byte];
        share *= choice->shares[byte][0][set & 255] + choice->shares[byte][1][set >> 8];
    }
    return share;
}

static uint32_t hits_with(const struct choice *choice, const struct filling *filling, struct wanted wanted)
{
    uint64_t all[PLANE];
    memset(all, 0xFF, sizeof all);
    for (size_t byte = 0; byte < choice->width; byte++) {
        unsigned missing = wanted.at[byte] & ~filling->nibbles[byte] & 0xFFFFu;
        const uint64_t *had = filling->accepts[byte];
        if (missing && !(missing & (missing - 1))) {
            const uint64_t *added = choice->planes[byte][__builtin_ctz(missing)];
            for (size_t i = 0; i < PLANE; i++)
                all[i] &= had[i] | added[i];
        } else if (!missing) {
            for (size_t i = 0; i < PLANE; i++)
                all[i] &= had[i];
        } /* else the literal ends before this byte: any goes */
    }
    uint32_t hits = 0;
    for (size_t i = 0; i < PLANE; i++)
        hits += (uint32_t)__builtin_popcountll(all[i]);
    return hits;
}

static void put(struct choice *choice, size_t index, struct place place)
{
    struct filling *filling = &choice->fillings[place.bucket];
    struct wanted wanted = look_at(&choice->literals[index], place.window);
    for (size_t byte = 0; byte < choice->width; byte++)
        for (unsigned rest = wanted.at[byte] & ~filling->nibbles[byte] & 0xFFFFu; rest; rest &= rest - 1) {
            unsigned nibble = (unsigned)__builtin_ctz(rest);
            filling->nibbles[byte] |= (uint16_t)(1u << nibble);
            for (size_t i = 0; i < PLANE; i++)
                filling->accepts[byte][i] |= choice->planes[byte][nibble][i];
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
        struct wanted wanted = look_at(literal, window);
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
        struct wanted wanted = look_at(literal, shortlist[i].place.window);
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
    filling->hits = filling->nibbles[0] ? hits_with(choice, filling, nothing_more) : 0;
    filling->expected = filling->nibbles[0] ? expected_with(choice, filling, nothing_more) : 0;
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

static int is_letter(uint8_t byte) { return (uint8_t)((byte | 32) - 'a') < 26; }

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
        struct wanted wanted = look_at(&choice->literals[i], entry->window);
        uint32_t bucket = choice->places[i].bucket;
        for (size_t byte = 0; byte < MAX_WIDTH; byte++) {
            size_t at = (size_t)entry->window + byte;
            for (size_t nibble = 0; nibble < 16; nibble++)
                if (wanted.at[byte] >> nibble & 1)
                    prefilter->tables[bucket / BUCKETS][byte][nibble] |= (uint8_t)(1u << bucket % BUCKETS);
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

struct prefilter *prefilter_new(const struct literal *literals, size_t count, const uint8_t *sample, size_t sample_size)
{
    for (size_t i = 0; i < count; i++)
        if (literals[i].size < LITERAL_MIN || literals[i].size > LITERAL_MAX)
            return NULL;
    static const struct { size_t groups, width; } sizes[] = {{1, 5}, {1, 6}, {2, 6}, {2, 7}, {3, 6}};
    struct prefilter *prefilter = calloc(1, sizeof *prefilter);
    struct choice *choice = calloc(1, sizeof *choice);
    int done = 0;
    if (prefilter && choice) {
        /* More literals need more buckets to stay apart, and each group costs a shuffle a byte of the window. */
        size_t size = count <= 32 ? 0 : count <= 96 ? 1 : count <= 256 ? 2 : count <= 1000 ? 3 : 4;
        prefilter->groups = sizes[size].groups;
        prefilter->width = sizes[size].width;
        choice->literals = literals;
        choice->count = count;
        choice->buckets = prefilter->groups * BUCKETS;
        choice->width = prefilter->width;
        for (size_t i = 0; i < count && !choice->fold; i++) {
            size_t usable = 0;
            for (size_t window = 0; window < windows_of(choice, &literals[i]); window++)
                usable += (size_t)is_usable(choice, &literals[i], window);
            choice->fold = !usable;
        }
        prefilter->fold = choice->fold;
        prefilter->shape = 2 * (int)size + choice->fold;
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

/* What a vector loop found in one chunk: vectors with candidates, and a bit for each position in them. They are checked
 * after the chunk: a branch on each vector would be mispredicted for most candidates. */
struct chunk {
    size_t count;
    uint32_t at[CHUNK / 16], found[CHUNK / 16]; /* offsets in the chunk */
};

static inline void mark(struct chunk *chunk, size_t at, uint32_t found)
{
    chunk->at[chunk->count] = (uint32_t)at;
    chunk->found[chunk->count] = found;
    chunk->count += found != 0;
}

static size_t check_chunk(struct search *search, const struct chunk *chunk, size_t start, size_t end)
{
    for (size_t n = 0; n < chunk->count; n++)
        for (uint32_t found = chunk->found[n]; found; found &= found - 1) {
            size_t at = start + chunk->at[n] + (size_t)__builtin_ctz(found);
            if (!check(search, at, search->block + at))
                return at;
        }
    return end;
}

#if defined(__x86_64__) || defined(__i386__)

__attribute__((target("avx2"), always_inline)) static inline uint32_t
look_avx2(__m256i tables[MAX_GROUPS][MAX_WIDTH], const uint8_t *text, size_t groups, size_t width, int fold)
{
    __m256i left[MAX_GROUPS];
#pragma GCC unroll 8
    for (size_t byte = 0; byte < width; byte++) {
        __m256i bytes = _mm256_loadu_si256((const void *)(text + byte));
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
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(any, _mm256_setzero_si256()));
}

/* Marks the candidates of block[start..end), of which only whole vectors are seen. Returns where it stopped. */
__attribute__((target("avx2"), always_inline)) static inline size_t
mark_avx2(const struct prefilter *prefilter, const uint8_t *block, size_t start, size_t end, struct chunk *chunk,
          size_t groups, size_t width, int fold)
{
    __m256i tables[MAX_GROUPS][MAX_WIDTH];
#pragma GCC unroll 8
    for (size_t g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++)
            tables[g][byte] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)prefilter->tables[g][byte]));
    size_t i = start;
    for (; i + 64 <= end; i += 64) {
        _mm_prefetch((const char *)block + i + AHEAD, _MM_HINT_T0);
        mark(chunk, i - start, look_avx2(tables, block + i, groups, width, fold));
        mark(chunk, i + 32 - start, look_avx2(tables, block + i + 32, groups, width, fold));
    }
    for (; i + 32 <= end; i += 32)
        mark(chunk, i - start, look_avx2(tables, block + i, groups, width, fold));
    return i;
}

__attribute__((target("ssse3"), always_inline)) static inline size_t
mark_ssse3(const struct prefilter *prefilter, const uint8_t *block, size_t start, size_t end, struct chunk *chunk,
           size_t groups, size_t width, int fold)
{
    const __m128i low = _mm_set1_epi8(15), zero = _mm_setzero_si128();
    __m128i tables[MAX_GROUPS][MAX_WIDTH];
#pragma GCC unroll 8
    for (size_t g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++)
            tables[g][byte] = _mm_loadu_si128((const void *)prefilter->tables[g][byte]);
    size_t i = start;
    for (; i + 16 <= end; i += 16) {
        __m128i left[MAX_GROUPS];
        _mm_prefetch((const char *)block + i + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++) {
            __m128i text = _mm_loadu_si128((const void *)(block + i + byte));
            if (fold)
                text = _mm_and_si128(text, low);
#pragma GCC unroll 8
            for (size_t g = 0; g < groups; g++) {
                __m128i may = _mm_shuffle_epi8(tables[g][byte], text);
                left[g] = byte ? _mm_and_si128(left[g], may) : may;
            }
        }
        __m128i any = left[0];
#pragma GCC unroll 8
        for (size_t g = 1; g < groups; g++)
            any = _mm_or_si128(any, left[g]);
        uint32_t found = ~(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(any, zero)) & 0xFFFF;
        mark(chunk, i - start, found);
    }
    return i;
}

#elif defined(__aarch64__)

__attribute__((always_inline)) static inline size_t mark_neon(const struct prefilter *prefilter, const uint8_t *block,
                                                              size_t start, size_t end, struct chunk *chunk,
                                                              size_t groups, size_t width, int fold)
{
    /* A look-up gives 0 for an index above 15; without `fold` those of bytes above 127 must stay above. */
    const uint8x16_t low = vdupq_n_u8(fold ? 0x0F : 0x8F);
    /* NEON has no movemask: a bit for each byte of a half, and the halves added up. */
    static const uint8_t weights[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vld1q_u8(weights);
    uint8x16_t tables[MAX_GROUPS][MAX_WIDTH];
#pragma GCC unroll 8
    for (size_t g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++)
            tables[g][byte] = vld1q_u8(prefilter->tables[g][byte]);
    size_t i = start;
    for (; i + 16 <= end; i += 16) {
        uint8x16_t left[MAX_GROUPS];
        __builtin_prefetch(block + i + AHEAD);
#pragma GCC unroll 8
        for (size_t byte = 0; byte < width; byte++) {
            uint8x16_t text = vandq_u8(vld1q_u8(block + i + byte), low);
#pragma GCC unroll 8
            for (size_t g = 0; g < groups; g++) {
                uint8x16_t may = vqtbl1q_u8(tables[g][byte], text);
                left[g] = byte ? vandq_u8(left[g], may) : may;
            }
        }
        uint8x16_t any = left[0];
#pragma GCC unroll 8
        for (size_t g = 1; g < groups; g++)
            any = vorrq_u8(any, left[g]);
        if (!vmaxvq_u8(any))
            continue;
        uint8x16_t marked = vandq_u8(vtstq_u8(any, any), bits);
        mark(chunk, i - start,
             (uint32_t)vaddv_u8(vget_low_u8(marked)) | (uint32_t)vaddv_u8(vget_high_u8(marked)) << 8);
    }
    return i;
}

#endif

/* One loop for each shape that prefilter_new makes: with the numbers known, tables stay in registers. */
#define FIND_BY(ENGINE, ATTRIBUTE)                                                                                     \
    ATTRIBUTE static size_t find_##ENGINE(struct search *search, size_t i, size_t end)                                 \
    {                                                                                                                  \
        const struct prefilter *prefilter = search->prefilter;                                                         \
        struct chunk chunk;                                                                                            \
        for (size_t start = i; !search->is_full; start = i) {                                                          \
            size_t stop = end - i > CHUNK ? i + CHUNK : end;                                                           \
            chunk.count = 0;                                                                                           \
            switch (prefilter->shape) {                                                                                \
                SHAPES(ENGINE)                                                                                         \
            }                                                                                                          \
            if (i == start)                                                                                            \
                break;                                                                                                 \
            i = check_chunk(search, &chunk, start, i);                                                                 \
        }                                                                                                              \
        return i;                                                                                                      \
    }

#define SHAPE(NUMBER, ENGINE, GROUPS, WIDTH, FOLD)                                                                     \
    case NUMBER:                                                                                                       \
        i = mark_##ENGINE(prefilter, search->block, start, stop, &chunk, GROUPS, WIDTH, FOLD);                         \
        break;

#define SHAPES(ENGINE)                                                                                                 \
    SHAPE(0, ENGINE, 1, 5, 0)                                                                                           \
    SHAPE(1, ENGINE, 1, 5, 1)                                                                                           \
    SHAPE(2, ENGINE, 1, 6, 0)                                                                                           \
    SHAPE(3, ENGINE, 1, 6, 1)                                                                                           \
    SHAPE(4, ENGINE, 2, 6, 0)                                                                                           \
    SHAPE(5, ENGINE, 2, 6, 1)                                                                                           \
    SHAPE(6, ENGINE, 2, 7, 0)                                                                                           \
    SHAPE(7, ENGINE, 2, 7, 1)                                                                                           \
    SHAPE(8, ENGINE, 3, 6, 0)                                                                                           \
    SHAPE(9, ENGINE, 3, 6, 1)

#if defined(__x86_64__) || defined(__i386__)
FIND_BY(avx2, __attribute__((target("avx2"))))
FIND_BY(ssse3, __attribute__((target("ssse3"))))
#elif defined(__aarch64__)
FIND_BY(neon, )
#endif

size_t prefilter_find(const struct prefilter *prefilter, int engine, const uint8_t *block, size_t start, size_t size,
                      struct literal_hit *hits, size_t capacity, size_t *next)
{
    struct search search = {.prefilter = prefilter, .block = block, .size = size, .hits = hits, .capacity = capacity};
    /* Before it each position has WORD bytes, and a vector's windows, within the block. */
    size_t safe = size > start + WORD ? size - WORD : start;
    size_t i = start;
    switch (engine) {
#if defined(__x86_64__) || defined(__i386__)
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
