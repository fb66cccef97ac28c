/*
 * The template miner.
 *
 * A line's words (words.c), runs of values folded into one, have a hash. Lines of equal hash are one template at once;
 * this is the fast path, and nearly all lines take it. A line of a new hash may be one of a template in which more words
 * vary than the preprocessing knows: for lines of the same length and first word it is known which sets of words vary,
 * and with these taken out its hash is that of the template. If there is none it is a new one, and each of its words is
 * noted beside the hash of the line without it. When enough different words were noted there (how many, depends on what
 * stands before), the word is taken to vary: all templates that differ only there join the oldest of them. So is a word
 * where another template, otherwise the same, has a value.
 *
 * Everything is bounded. Templates: the least recently seen is forgotten. The notes and the cache of hashes: buckets, in
 * which the new displaces the old.
 */

#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "words.h"

enum {
    WAYS = 4,           /* entries of a bucket */
    COLUMNS = 32,       /* words of a line that are noted */
    HEAD_MAX = 16,      /* words of what stands before a message */
    COLUMNS_EACH = 8,   /* notes for each template, on the average */
    MEMBERS = 8,        /* different words, at which any word is taken to vary */
    ENOUGH = 5,         /* the same where at least two others stay */
    ENOUGH_NAMED = 3,   /* behind words as "user" */
    SETS = 6,           /* of varying words, for each kind of line */
    LAST = 8,           /* templates of a kind that are compared */
    MANY = 16,          /* templates of a kind, from which on they are */
    SWEPT = 256,        /* of the last templates are looked at when words turn out to vary together */
    ALIKE = 4,          /* of the last that must be alike to join */
    TEXT_EACH = 192     /* bytes of text for each template, on the average */
};

#define NONE TEMPLATE_NONE
#define WILD_SIZE (WORDS_MAX / 64)
_Static_assert((int)WORDS_MAX == (int)VALUES_MAX, "each word may be a value");
_Static_assert((int)WORDS_BYTES + LONG_WORD + 1 + 4 * WORDS_MAX <= (int)TEMPLATE_TEXT_MAX,
               "a line's words have room, also where each is \" <*>\"");

struct template {
    uint64_t hash, count;
    uint8_t *text;
    uint32_t size, id;
    uint32_t newer, older; /* by when it was seen; NONE at the ends */
};

/* A hash that was seen, and its template; of another id it is forgotten. */
struct known {
    uint64_t hash;
    uint32_t slot, id;
};

/* The hash of a line without one of its words, and what stood there: one word of one template, or a group. */
struct column {
    uint64_t key;
    uint32_t word, id; /* word NONE: `id` is a group */
};

struct group {
    uint64_t key;
    uint32_t count, words[MEMBERS], ids[MEMBERS];
};

/* Lines of one length and first word: the sets of their words that vary, and the last templates that began as such. */
struct kind {
    uint64_t key, count;
    uint64_t sets[SETS][WILD_SIZE];
    uint32_t made, last[LAST];
};

struct joined {
    uint32_t id, to;
};

struct miner {
    struct lexicon lexicon;
    size_t limit, count, text_size;
    uint32_t next, newest, oldest;
    uint32_t unused, fresh; /* a list of slots that are free again; from `fresh` on none was used, nor its memory */
    struct template *templates;
    uint32_t *by_hash, *by_id; /* open addressing: slot + 1, 0 is free */
    size_t mask;               /* of both */
    struct known *known;
    size_t known_mask;
    struct column *columns;
    size_t columns_mask;
    struct group *groups;
    size_t group_count, next_group;
    struct kind *kinds;
    size_t kinds_mask;
    struct joined *joined; /* a ring */
    uint32_t *by_joined;   /* open addressing: place in the ring + 1 */
    size_t joined_count, joined_at;
    uint64_t joins; /* since it was made */
};

static inline uint64_t spread(uint64_t hash)
{
    hash *= 0xD6E8FEB86659FD93u;
    return hash ^ (hash >> 32);
}

static size_t power_of_two(size_t least)
{
    size_t size = 16;
    while (size < least)
        size *= 2;
    return size;
}

struct miner *miner_new(size_t limit)
{
    if (limit < 16 || limit > TEMPLATES_MAX)
        return NULL;
    struct miner *miner = calloc(1, sizeof *miner);
    if (!miner)
        return NULL;
    lexicon_fill(&miner->lexicon);
    size_t size = power_of_two(2 * limit);
    miner->limit = limit;
    miner->next = 1;
    miner->newest = miner->oldest = miner->unused = NONE;
    miner->mask = size - 1;
    miner->known_mask = size / WAYS - 1;
    miner->columns_mask = power_of_two(limit * COLUMNS_EACH) / WAYS - 1;
    miner->group_count = limit / 4 + 16;
    miner->kinds_mask = power_of_two(limit / 16 + 16) - 1;
    miner->templates = calloc(limit, sizeof *miner->templates);
    miner->by_hash = calloc(size, sizeof *miner->by_hash);
    miner->by_id = calloc(size, sizeof *miner->by_id);
    miner->known = calloc(size, sizeof *miner->known);
    miner->columns = calloc((miner->columns_mask + 1) * WAYS, sizeof *miner->columns);
    miner->groups = calloc(miner->group_count, sizeof *miner->groups);
    miner->kinds = calloc(miner->kinds_mask + 1, sizeof *miner->kinds);
    miner->joined = calloc(limit, sizeof *miner->joined);
    miner->by_joined = calloc(size, sizeof *miner->by_joined);
    if (!miner->templates || !miner->by_hash || !miner->by_id || !miner->known || !miner->columns || !miner->groups ||
        !miner->kinds || !miner->joined || !miner->by_joined) {
        miner_free(miner);
        return NULL;
    }
    return miner;
}

void miner_free(struct miner *miner)
{
    if (!miner)
        return;
    if (miner->templates)
        for (size_t slot = 0; slot < miner->fresh; slot++)
            free(miner->templates[slot].text);
    free(miner->templates);
    free(miner->by_hash);
    free(miner->by_id);
    free(miner->known);
    free(miner->columns);
    free(miner->groups);
    free(miner->kinds);
    free(miner->joined);
    free(miner->by_joined);
    free(miner);
}

/* ---- tables of templates ----------------------------------------------------------------------------------------- */

/* One of the two tables, and what a slot is looked up by in it. */
struct table {
    uint32_t *slots;
    int is_by_id;
};

static inline uint64_t key_of(const struct miner *miner, struct table table, uint32_t slot)
{
    return table.is_by_id ? miner->templates[slot].id : miner->templates[slot].hash;
}

static inline uint32_t table_find(const struct miner *miner, struct table table, uint64_t key)
{
    for (size_t n = spread(key) & miner->mask; table.slots[n]; n = (n + 1) & miner->mask)
        if (key_of(miner, table, table.slots[n] - 1) == key)
            return table.slots[n] - 1;
    return NONE;
}

static void table_put(struct miner *miner, struct table table, uint32_t slot)
{
    size_t n = spread(key_of(miner, table, slot)) & miner->mask;
    while (table.slots[n])
        n = (n + 1) & miner->mask;
    table.slots[n] = slot + 1;
}

/* Take a slot out; those behind it that could not stand where they belong move up. */
static void table_drop(struct miner *miner, struct table table, uint32_t slot)
{
    size_t n = spread(key_of(miner, table, slot)) & miner->mask;
    while (table.slots[n] != slot + 1)
        n = (n + 1) & miner->mask;
    for (size_t next = (n + 1) & miner->mask; table.slots[next]; next = (next + 1) & miner->mask) {
        size_t home = spread(key_of(miner, table, table.slots[next] - 1)) & miner->mask;
        if (((next - home) & miner->mask) >= ((next - n) & miner->mask)) {
            table.slots[n] = table.slots[next];
            n = next;
        }
    }
    table.slots[n] = 0;
}

static inline struct table by_hash(const struct miner *miner)
{
    return (struct table){miner->by_hash, 0};
}

static inline struct table by_id(const struct miner *miner)
{
    return (struct table){miner->by_id, 1};
}

static inline void take_out(struct miner *miner, uint32_t slot)
{
    struct template *template = miner->templates + slot;
    *(template->newer == NONE ? &miner->newest : &miner->templates[template->newer].older) = template->older;
    *(template->older == NONE ? &miner->oldest : &miner->templates[template->older].newer) = template->newer;
}

static inline void put_newest(struct miner *miner, uint32_t slot)
{
    struct template *template = miner->templates + slot;
    template->newer = NONE;
    template->older = miner->newest;
    *(miner->newest == NONE ? &miner->oldest : &miner->templates[miner->newest].newer) = slot;
    miner->newest = slot;
}

static inline void make_newest(struct miner *miner, uint32_t slot)
{
    if (miner->newest == slot)
        return;
    take_out(miner, slot);
    put_newest(miner, slot);
}

static inline uint32_t seen(struct miner *miner, uint32_t slot)
{
    miner->templates[slot].count++;
    make_newest(miner, slot);
    return miner->templates[slot].id;
}

static void forget(struct miner *miner, uint32_t slot)
{
    struct template *template = miner->templates + slot;
    table_drop(miner, by_hash(miner), slot);
    table_drop(miner, by_id(miner), slot);
    take_out(miner, slot);
    free(template->text);
    miner->text_size -= template->size;
    miner->count--;
    *template = (struct template){.newer = miner->unused};
    miner->unused = slot;
}

/* Keep a copy of the text; templates seen long ago go for it. 0: no memory. */
static int set_text(struct miner *miner, uint32_t slot, const uint8_t *text, size_t size)
{
    struct template *template = miner->templates + slot;
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy)
        return 0;
    memcpy(copy, text, size);
    free(template->text);
    miner->text_size += size - template->size;
    template->text = copy;
    template->size = (uint32_t)size;
    return 1;
}

static void make_room(struct miner *miner, size_t size, uint32_t but)
{
    while (miner->oldest != NONE && miner->oldest != but &&
           (miner->count >= miner->limit || miner->text_size + size > miner->limit * TEXT_EACH))
        forget(miner, miner->oldest);
}

static uint32_t add_template(struct miner *miner, uint32_t id, uint64_t hash, const uint8_t *text, size_t size)
{
    make_room(miner, size, NONE);
    int is_fresh = miner->unused == NONE;
    uint32_t slot = is_fresh ? miner->fresh : miner->unused;
    uint32_t next = miner->templates[slot].newer;
    if (!set_text(miner, slot, text, size))
        return NONE;
    if (is_fresh)
        miner->fresh++;
    else
        miner->unused = next;
    miner->templates[slot].hash = hash;
    miner->templates[slot].id = id;
    miner->count++;
    table_put(miner, by_hash(miner), slot);
    table_put(miner, by_id(miner), slot);
    put_newest(miner, slot);
    return slot;
}

/* ---- what joined ------------------------------------------------------------------------------------------------- */

static uint32_t joined_find(const struct miner *miner, uint32_t id)
{
    for (size_t n = spread(id) & miner->mask; miner->by_joined[n]; n = (n + 1) & miner->mask)
        if (miner->joined[miner->by_joined[n] - 1].id == id)
            return miner->by_joined[n] - 1;
    return NONE;
}

static void joined_drop(struct miner *miner, uint32_t at)
{
    size_t n = spread(miner->joined[at].id) & miner->mask;
    while (miner->by_joined[n] != at + 1)
        n = (n + 1) & miner->mask;
    for (size_t next = (n + 1) & miner->mask; miner->by_joined[next]; next = (next + 1) & miner->mask) {
        size_t home = spread(miner->joined[miner->by_joined[next] - 1].id) & miner->mask;
        if (((next - home) & miner->mask) >= ((next - n) & miner->mask)) {
            miner->by_joined[n] = miner->by_joined[next];
            n = next;
        }
    }
    miner->by_joined[n] = 0;
}

static void joined_put(struct miner *miner, uint32_t id, uint32_t to)
{
    uint32_t at = (uint32_t)miner->joined_at;
    miner->joins++;
    if (miner->joined_count == miner->limit)
        joined_drop(miner, at);
    else
        miner->joined_count++;
    miner->joined[at] = (struct joined){id, to};
    size_t n = spread(id) & miner->mask;
    while (miner->by_joined[n])
        n = (n + 1) & miner->mask;
    miner->by_joined[n] = at + 1;
    miner->joined_at = (at + 1) % miner->limit;
}

/* The slot of what `id` has become. It always became an older one, so this ends. */
static uint32_t slot_of(const struct miner *miner, uint32_t id)
{
    for (uint32_t at; (at = joined_find(miner, id)) != NONE;)
        id = miner->joined[at].to;
    return table_find(miner, by_id(miner), id);
}

/* ---- buckets ----------------------------------------------------------------------------------------------------- */

static inline uint32_t known_find(const struct miner *miner, uint64_t hash)
{
    const struct known *bucket = miner->known + (spread(hash) & miner->known_mask) * WAYS;
    for (size_t way = 0; way < WAYS; way++)
        if (bucket[way].hash == hash && bucket[way].id && miner->templates[bucket[way].slot].id == bucket[way].id)
            return bucket[way].slot;
    return NONE;
}

static void known_put(struct miner *miner, uint64_t hash, uint32_t slot)
{
    struct known *bucket = miner->known + (spread(hash) & miner->known_mask) * WAYS;
    memmove(bucket + 1, bucket, (WAYS - 1) * sizeof *bucket);
    bucket[0] = (struct known){hash, slot, miner->templates[slot].id};
}

/* What is known of lines of a kind, or NULL. */
static struct kind *kind_known(const struct miner *miner, uint64_t key)
{
    for (size_t way = 0; way < WAYS; way++) {
        struct kind *kind = miner->kinds + ((spread(key) + way) & miner->kinds_mask);
        if (kind->key == key && (kind->count || kind->made))
            return kind;
    }
    return NULL;
}

/* The same; where nothing is known, that of which least is known makes room. */
static struct kind *kind_of(struct miner *miner, uint64_t key)
{
    struct kind *known = kind_known(miner, key), *least = NULL;
    if (known)
        return known;
    for (size_t way = 0; way < WAYS; way++) {
        struct kind *kind = miner->kinds + ((spread(key) + way) & miner->kinds_mask);
        if (!least || kind->count + kind->made < least->count + least->made)
            least = kind;
    }
    *least = (struct kind){.key = key};
    memset(least->last, 0xFF, sizeof least->last);
    return least;
}

/* Note that `word` stands in the column of a template. Returns the group when it has enough words, else NULL. */
static struct group *note(struct miner *miner, uint64_t key, uint32_t word, uint32_t id, uint32_t enough)
{
    struct column *bucket = miner->columns + (spread(key) & miner->columns_mask) * WAYS, found;
    size_t way = 0;
    while (way < WAYS && !(bucket[way].key == key && (bucket[way].id || bucket[way].word == NONE)))
        way++;
    found = way < WAYS ? bucket[way] : (struct column){key, word, id};
    if (way < WAYS && found.word == NONE && miner->groups[found.id].key != key)
        found = (struct column){key, word, id}; /* another took its group */
    memmove(bucket + 1, bucket, (way < WAYS ? way : WAYS - 1) * sizeof *bucket);
    bucket[0] = found;
    if (found.word == word)
        return NULL;
    struct group *group;
    if (found.word == NONE) {
        group = miner->groups + found.id;
    } else {
        uint32_t at = (uint32_t)miner->next_group;
        miner->next_group = (at + 1) % miner->group_count;
        group = miner->groups + at;
        *group = (struct group){.key = key, .count = 1, .words = {found.word}, .ids = {found.id}};
        bucket[0] = (struct column){key, NONE, at};
    }
    for (uint32_t n = 0; n < group->count; n++)
        if (group->words[n] == word)
            return NULL;
    if (group->count < MEMBERS) {
        group->words[group->count] = word;
        group->ids[group->count++] = id;
    }
    return group->count >= enough ? group : NULL;
}

/* The templates that were noted there, to ids[0..MEMBERS). Returns how many. */
static uint32_t noted_at(const struct miner *miner, uint64_t key, uint32_t *ids)
{
    const struct column *bucket = miner->columns + (spread(key) & miner->columns_mask) * WAYS;
    for (size_t way = 0; way < WAYS; way++) {
        const struct column *column = bucket + way;
        if (column->key != key || !(column->id || column->word == NONE))
            continue;
        if (column->word != NONE) {
            ids[0] = column->id;
            return 1;
        }
        const struct group *group = miner->groups + column->id;
        if (group->key != key)
            return 0;
        memcpy(ids, group->ids, group->count * sizeof *ids);
        return group->count;
    }
    return 0;
}

/* ---- mining ------------------------------------------------------------------------------------------------------ */

/* A line or a template as words without runs of values. */
struct pattern {
    struct word words[WORDS_MAX + 3];
    size_t count;
    uint64_t hash;
    const uint8_t *text;
};

static uint64_t kind_key(const struct pattern *pattern)
{
    uint64_t first = 0;
    for (size_t i = 0; i < pattern->count; i++)
        if (pattern->words[i].kind == WORD_LITERAL) {
            first = pattern->words[i].hash;
            break;
        }
    return spread(first ^ pattern->count);
}

/* The text of a pattern. Its size is at most TEMPLATE_TEXT_MAX. */
static size_t render(const struct pattern *pattern, uint8_t *text)
{
    size_t size = 0;
    for (size_t i = 0; i < pattern->count; i++) {
        const struct word *word = pattern->words + i;
        const uint8_t *from = word->kind == WORD_VALUE ? (const uint8_t *)"<*>" : pattern->text + word->at;
        size_t length = word->kind == WORD_VALUE ? 3 : word->size;
        if (word->blank && i)
            text[size++] = ' ';
        if (length > LONG_WORD) /* dots */
            length = LONG_WORD;
        memcpy(text + size, from, length);
        size += length;
    }
    return size;
}

/* a.qualified.name, or the/path of.one */
static int is_qualified(const struct pattern *pattern, const struct word *word)
{
    size_t dots = 0, slashes = 0;
    if (word->kind != WORD_LITERAL)
        return 0;
    for (size_t i = 0; i + 1 < word->size; i++) {
        dots += pattern->text[word->at + i] == '.';
        slashes += pattern->text[word->at + i] == '/';
    }
    return dots + slashes >= 2;
}

/* How many different words there must be, until this one is taken to vary. */
static uint32_t enough_at(const struct miner *miner, const struct pattern *pattern, size_t at, size_t literals)
{
    const struct word *before = at ? pattern->words + at - 1 : NULL;
    if (is_qualified(pattern, pattern->words + at))
        return ENOUGH_NAMED;
    if (before && before->kind == WORD_LITERAL &&
        lexicon_names(&miner->lexicon, pattern->text + before->at, before->size))
        return ENOUGH_NAMED;
    return literals > 2 ? ENOUGH : MEMBERS;
}

/* The other template is this one from now on. */
static void absorb(struct miner *miner, uint32_t slot, uint32_t other)
{
    uint64_t hash = miner->templates[other].hash;
    miner->templates[slot].count += miner->templates[other].count;
    joined_put(miner, miner->templates[other].id, miner->templates[slot].id);
    forget(miner, other);
    known_put(miner, hash, slot);
}

/* The templates of the group are one: the pattern. Returns its slot. */
static uint32_t join(struct miner *miner, const struct pattern *pattern, struct group *group, uint32_t slot)
{
    uint32_t members[MEMBERS + 2], count = 0, same = table_find(miner, by_hash(miner), pattern->hash);
    members[count++] = slot;
    if (same != NONE && same != slot)
        members[count++] = same;
    for (uint32_t n = 0; n < group->count; n++) {
        uint32_t member = slot_of(miner, group->ids[n]), is_new = member != NONE;
        for (uint32_t i = 0; i < count; i++)
            is_new = is_new && members[i] != member;
        if (is_new)
            members[count++] = member;
    }
    group->count = 0;
    for (uint32_t n = 0; n < count; n++)
        if (miner->templates[members[n]].id < miner->templates[slot].id)
            slot = members[n];
    uint8_t text[TEMPLATE_TEXT_MAX];
    struct template *oldest = miner->templates + slot;
    size_t size = render(pattern, text);
    if (!set_text(miner, slot, text, size))
        return slot; /* it joins when memory is back */
    for (uint32_t n = 0; n < count; n++)
        if (members[n] != slot)
            absorb(miner, slot, members[n]);
    table_drop(miner, by_hash(miner), slot);
    known_put(miner, oldest->hash, slot);
    oldest->hash = pattern->hash;
    table_put(miner, by_hash(miner), slot);
    make_room(miner, 0, slot);
    return slot;
}

/* Remember that these words vary in lines of its kind. */
static void remember_varying(struct miner *miner, const struct pattern *pattern, const uint64_t *wild)
{
    struct kind *kind = kind_of(miner, kind_key(pattern));
    for (size_t n = 0; n < SETS && n < kind->count; n++)
        if (!memcmp(kind->sets[n], wild, sizeof kind->sets[n]))
            return;
    memcpy(kind->sets[kind->count++ % SETS], wild, sizeof kind->sets[0]);
}

/* A line's fixed words: the first one, and the first of its message behind the stamp, host and program of a log. */
struct head {
    size_t first, message;
};

static struct head head_of(const struct pattern *pattern)
{
    const struct word *words = pattern->words;
    size_t count = pattern->count, at = 0;
    struct head head = {count, count};
    int is_stamped = (count && words[0].kind == WORD_VALUE) || (count > 1 && words[1].kind == WORD_VALUE);
    while (at < count && words[at].kind != WORD_LITERAL)
        at++;
    head.first = head.message = at;
    if (is_stamped)
        for (size_t i = 1; i + 1 < count && i < HEAD_MAX; i++) {
            if (words[i].kind == WORD_VALUE || words[i].size != 1 || !words[i + 1].blank)
                continue;
            uint8_t sign = pattern->text[words[i].at];
            if (sign != ':' && !(sign == '-' && words[i].blank))
                continue;
            for (at = i + 1; at < count && words[at].kind != WORD_LITERAL; at++)
                ;
            if (at < count)
                head.message = at;
            break;
        }
    return head;
}

/* The set of all words of a kind, where there are two or more; its words as one, else 0. */
static uint32_t together(const struct pattern *pattern, struct head head, int is_assigned, uint64_t *wild)
{
    uint64_t sum = 0;
    size_t count = 0;
    for (size_t i = 0; i < pattern->count; i++) {
        const struct word *word = pattern->words + i;
        if (word->kind != WORD_LITERAL || i == head.first || i == head.message)
            continue;
        if (is_assigned) {
            size_t before = i - (i > 1 && !word->blank && pattern->text[word[-1].at] == '"');
            if (!before || word->blank || pattern->words[before].blank || pattern->text[pattern->words[before - 1].at] != '=')
                continue;
        } else if (!is_qualified(pattern, word)) {
            continue;
        }
        wild[i / 64] |= UINT64_C(1) << i % 64;
        sum = spread(sum ^ word->hash);
        count++;
    }
    return count > 1 ? (uint32_t)(sum >> 32) | 1 : 0;
}

/* What of a template is noted: a word of it, or several together, and how many different ones are enough. */
struct noted {
    uint64_t wild[WILD_SIZE];
    uint32_t word, enough;
};

static size_t to_note(const struct miner *miner, const struct pattern *pattern, struct noted *noted)
{
    struct head head = head_of(pattern);
    size_t count = 0, literals = 0;
    for (size_t i = head.message; i < pattern->count; i++)
        literals += pattern->words[i].kind == WORD_LITERAL;
    if (literals < 2)
        return 0;
    for (size_t i = head.first + 1; i < pattern->count && count < COLUMNS; i++) {
        if (pattern->words[i].kind != WORD_LITERAL || i == head.message)
            continue;
        struct noted *one = noted + count++;
        *one = (struct noted){.word = (uint32_t)(pattern->words[i].hash >> 32),
                              .enough = enough_at(miner, pattern, i, literals)};
        one->wild[i / 64] |= UINT64_C(1) << i % 64;
    }
    for (int is_assigned = 0; is_assigned < 2; is_assigned++) {
        struct noted *one = noted + count;
        *one = (struct noted){.enough = is_assigned ? ENOUGH : ENOUGH_NAMED};
        one->word = together(pattern, head, is_assigned, one->wild);
        count += one->word != 0;
    }
    return count;
}

/*
 * Where several words vary at once, no two lines may differ in one alone. Are many templates made of this kind of line,
 * of which the last are alike in most of their words? Then to *group, and the words in which they differ to `wild`.
 */
static int find_alike(const struct miner *miner, const struct pattern *pattern, const struct kind *kind, uint32_t slot,
                      struct group *group, uint64_t *wild)
{
    struct head head = head_of(pattern);
    size_t literals = 0, differing = 0;
    group->count = 0;
    memset(wild, 0, WILD_SIZE * sizeof *wild);
    for (size_t i = 0; i < pattern->count; i++)
        literals += pattern->words[i].kind == WORD_LITERAL;
    for (size_t n = 0; n < LAST; n++) {
        struct word words[WORDS_MAX + 3];
        uint64_t differs[WILD_SIZE] = {0};
        uint32_t other = slot_of(miner, kind->last[n]);
        if (other == NONE || other == slot)
            continue;
        size_t count = words_of_template(miner->templates[other].text, miner->templates[other].size, words), i = 0, same = 0;
        for (; count == pattern->count && i < count; i++) {
            if (words[i].hash == pattern->words[i].hash)
                same += words[i].kind == WORD_LITERAL;
            else if (i == head.first || i == head.message || pattern->words[i].kind != WORD_LITERAL ||
                     (words[i].kind != WORD_LITERAL && words[i].kind != WORD_VALUE))
                break;
            else
                differs[i / 64] |= UINT64_C(1) << i % 64;
        }
        if (count != pattern->count || i < count || 5 * same < 3 * literals)
            continue;
        for (size_t w = 0; w < WILD_SIZE; w++)
            wild[w] |= differs[w];
        group->ids[group->count++] = kind->last[n];
    }
    for (size_t w = 0; w < WILD_SIZE; w++)
        differing += (size_t)__builtin_popcountll(wild[w]);
    return group->count >= ALIKE && 2 * differing <= literals;
}

/*
 * Those among the last templates that have that hash, now that these words vary: returns the oldest of them and of
 * `slot`; with `is_joining` they are `slot` from now on.
 */
static uint32_t sweep(struct miner *miner, size_t count, const uint64_t *wild, uint64_t hash, uint32_t slot,
                      int is_joining)
{
    uint32_t at = miner->newest, next, oldest = slot;
    for (size_t n = 0; n < SWEPT && at != NONE; n++, at = next) {
        struct word words[WORDS_MAX + 3];
        uint64_t its;
        next = miner->templates[at].older;
        if (at == slot || words_of_template(miner->templates[at].text, miner->templates[at].size, words) != count)
            continue;
        words_fold(words, count, wild, words, &its);
        if (its != hash)
            continue;
        if (is_joining)
            absorb(miner, slot, at);
        else if (miner->templates[at].id < miner->templates[oldest].id)
            oldest = at;
    }
    return oldest;
}

/* Is the template that of `hash` with one of its words taken to vary, which needs no more proof than a value there? */
static int may_be(const struct miner *miner, uint32_t slot, uint64_t hash)
{
    struct pattern pattern;
    struct noted noted[COLUMNS + 2];
    const struct template *template = miner->templates + slot;
    uint64_t its;
    pattern.text = template->text;
    pattern.count = words_of_template(template->text, template->size, pattern.words);
    for (size_t n = to_note(miner, &pattern, noted); n--;) {
        struct word folded[WORDS_MAX];
        words_fold(pattern.words, pattern.count, noted[n].wild, folded, &its);
        if (its == hash && noted[n].enough < MEMBERS)
            return 1;
    }
    return 0;
}

/* Templates that have a word where this one has a value join it. Returns its slot then. */
static uint32_t take_in(struct miner *miner, const struct pattern *pattern, uint32_t slot)
{
    struct group group;
    uint32_t count = noted_at(miner, pattern->hash, group.ids);
    group.count = 0;
    for (uint32_t n = 0; n < count; n++) {
        uint32_t other = slot_of(miner, group.ids[n]);
        if (other != NONE && other != slot && may_be(miner, other, pattern->hash))
            group.ids[group.count++] = group.ids[n];
    }
    return group.count ? join(miner, pattern, &group, slot) : slot;
}

/* Note the words of a template; as long as some turn out to vary, it joins others. Returns its slot then. */
static uint32_t learn(struct miner *miner, struct pattern *pattern, uint32_t slot, int may_join)
{
    struct kind *kind = kind_of(miner, kind_key(pattern));
    struct group alike, beside = {.count = 0}, *best; /* beside: one that has a value there */
    if (may_join)
        slot = take_in(miner, pattern, slot);
    do {
        struct noted noted[COLUMNS + 2];
        uint64_t *wild = NULL, together_wild[WILD_SIZE];
        size_t count = to_note(miner, pattern, noted);
        best = NULL;
        for (size_t n = 0; n < count; n++) {
            struct word folded[WORDS_MAX];
            uint64_t hash;
            words_fold(pattern->words, pattern->count, noted[n].wild, folded, &hash);
            uint32_t word = noted[n].word == NONE ? 0 : noted[n].word;
            struct group *group = note(miner, hash, word, miner->templates[slot].id, noted[n].enough);
            uint32_t other = table_find(miner, by_hash(miner), hash);
            if (group && (!best || group->count > best->count))
                best = group, wild = noted[n].wild;
            else if (!best && other != NONE && other != slot && noted[n].enough < MEMBERS)
                best = &beside, wild = noted[n].wild;
        }
        if (!may_join)
            break;
        if (kind) {
            if (!best && kind->made >= MANY && find_alike(miner, pattern, kind, slot, &alike, together_wild))
                best = &alike, wild = together_wild;
            kind->last[kind->made++ % LAST] = miner->templates[slot].id;
            kind = NULL; /* what it became is another matter */
        }
        if (best) {
            struct pattern joint = {.text = pattern->text};
            remember_varying(miner, pattern, wild);
            joint.count = words_fold(pattern->words, pattern->count, wild, joint.words, &joint.hash);
            if (best == &alike) {
                make_newest(miner, slot); /* what it joined just now may not have been seen for long */
                slot = join(miner, &joint, best, sweep(miner, pattern->count, wild, joint.hash, slot, 0));
                sweep(miner, pattern->count, wild, joint.hash, slot, 1);
            } else {
                slot = join(miner, &joint, best, slot);
            }
            *pattern = joint;
        }
    } while (best);
    return slot;
}

/* The template with whose varying words taken out the pattern is that template. */
static uint32_t match(const struct miner *miner, const struct pattern *pattern)
{
    struct word folded[WORDS_MAX];
    uint64_t hash;
    uint32_t slot;
    const struct kind *kind = kind_known(miner, kind_key(pattern));
    if (kind)
        for (size_t n = 0; n < SETS && n < kind->count; n++) {
            words_fold(pattern->words, pattern->count, kind->sets[n], folded, &hash);
            if ((slot = table_find(miner, by_hash(miner), hash)) != NONE)
                return slot;
        }
    return NONE;
}

static uint32_t mine_line(struct miner *miner, const uint8_t *line, size_t size)
{
    struct pattern pattern;
    pattern.count = words_of_line(&miner->lexicon, line, size, pattern.words);
    pattern.count = words_fold(pattern.words, pattern.count, NULL, pattern.words, &pattern.hash);
    uint32_t slot = known_find(miner, pattern.hash);
    if (slot != NONE)
        return seen(miner, slot);
    slot = table_find(miner, by_hash(miner), pattern.hash);
    if (slot == NONE) {
        slot = match(miner, &pattern);
        if (slot == NONE) {
            uint8_t text[TEMPLATE_TEXT_MAX];
            pattern.text = line;
            size_t length = render(&pattern, text);
            if (miner->next == NONE)
                return NONE;
            slot = add_template(miner, miner->next, pattern.hash, text, length);
            if (slot == NONE)
                return NONE;
            miner->next++;
            uint64_t hash = pattern.hash;
            slot = learn(miner, &pattern, slot, 1);
            known_put(miner, hash, slot);
            return seen(miner, slot);
        }
    }
    known_put(miner, pattern.hash, slot);
    return seen(miner, slot);
}

uint32_t miner_find(const struct miner *miner, const uint8_t *line, size_t size)
{
    struct pattern pattern;
    pattern.count = words_of_line(&miner->lexicon, line, size, pattern.words);
    pattern.count = words_fold(pattern.words, pattern.count, NULL, pattern.words, &pattern.hash);
    uint32_t slot = table_find(miner, by_hash(miner), pattern.hash);
    if (slot == NONE)
        slot = match(miner, &pattern);
    return slot == NONE ? NONE : miner->templates[slot].id;
}

size_t miner_mine(struct miner *miner, const uint8_t *block, size_t size, size_t *at, size_t every, uint32_t *ids,
                  uint32_t *starts, size_t capacity)
{
    size_t begin = *at, count = 0, skipped = 0;
    while (begin < size && (skipped || count < capacity)) {
        const uint8_t *end = memchr(block + begin, '\n', size - begin);
        size_t length = end ? (size_t)(end - block) - begin : size - begin;
        if (!skipped) {
            starts[count] = (uint32_t)begin;
            ids[count++] = mine_line(miner, block + begin, length);
        }
        skipped = skipped + 1 < every ? skipped + 1 : 0;
        begin += length + (end != NULL);
    }
    *at = begin;
    return count;
}

/* ---- what is known ----------------------------------------------------------------------------------------------- */

uint32_t miner_next(const struct miner *miner)
{
    return miner->next;
}

uint32_t miner_resolve(const struct miner *miner, uint32_t id)
{
    uint32_t slot = slot_of(miner, id);
    return slot == NONE ? NONE : miner->templates[slot].id;
}

size_t miner_count(const struct miner *miner)
{
    return miner->count;
}

void miner_list(const struct miner *miner, uint32_t *ids, uint64_t *counts)
{
    size_t n = 0;
    for (uint32_t slot = miner->oldest; slot != NONE; slot = miner->templates[slot].newer) {
        ids[n] = miner->templates[slot].id;
        counts[n++] = miner->templates[slot].count;
    }
}

size_t miner_dump(const struct miner *miner, uint8_t *out)
{
    size_t size = 0;
    for (uint32_t slot = miner->oldest; slot != NONE; slot = miner->templates[slot].newer) {
        const struct template *template = miner->templates + slot;
        if (out) {
            memcpy(out + size, &template->count, sizeof template->count);
            memcpy(out + size + 8, &template->id, sizeof template->id);
            memcpy(out + size + 12, &template->size, sizeof template->size);
            memcpy(out + size + 16, template->text, template->size);
        }
        size += 16 + template->size;
    }
    return size;
}

size_t miner_text(const struct miner *miner, uint32_t id, uint8_t *text)
{
    uint32_t slot = slot_of(miner, id);
    if (slot == NONE)
        return NONE;
    memcpy(text, miner->templates[slot].text, miner->templates[slot].size);
    return miner->templates[slot].size;
}

size_t miner_values(const struct miner *miner, uint32_t id, const uint8_t *line, size_t size, uint32_t *spans,
                    size_t capacity)
{
    struct word words[WORDS_MAX + 3], folded[WORDS_MAX + 3];
    size_t count = words_of_line(&miner->lexicon, line, size, words), known = 0, at = 0, found = 0;
    uint32_t slot = slot_of(miner, id);
    if (slot != NONE)
        known = words_of_template(miner->templates[slot].text, miner->templates[slot].size, folded);
    int is_in_run = 0; /* the value at `at` has begun */
    for (size_t i = 0; i < count && found < capacity; i++) {
        int is_value = words[i].kind == WORD_VALUE;
        if (is_value) {
            is_in_run = at < known && folded[at].kind == WORD_VALUE;
        } else if (at + is_in_run < known && folded[at + is_in_run].kind != WORD_VALUE &&
                   folded[at + is_in_run].hash == words[i].hash) {
            at += is_in_run + 1;
            is_in_run = 0;
        } else if (words[i].kind == WORD_LITERAL && at < known && folded[at].kind == WORD_VALUE) {
            is_value = is_in_run = 1;
        }
        if (is_value) {
            spans[2 * found] = words[i].at;
            spans[2 * found++ + 1] = words[i].size;
        }
    }
    return found;
}

/* ---- as it was --------------------------------------------------------------------------------------------------- */

uint64_t miner_joins(const struct miner *miner)
{
    return miner->joins;
}

size_t miner_joined(const struct miner *miner, uint32_t *pairs, size_t count)
{
    if (count > miner->joined_count)
        count = miner->joined_count;
    for (size_t n = 0; n < count; n++) {
        const struct joined *joined = miner->joined + (miner->joined_at + miner->limit - count + n) % miner->limit;
        pairs[2 * n] = joined->id;
        pairs[2 * n + 1] = joined->to;
    }
    return count;
}

enum { KIND_NUMBERS = 2 + SETS * WILD_SIZE };

size_t miner_varying(const struct miner *miner, uint64_t *numbers)
{
    size_t count = 0;
    for (size_t n = 0; n <= miner->kinds_mask; n++) {
        if (!miner->kinds[n].count)
            continue; /* nothing varies */
        if (numbers)
            memcpy(numbers + count, miner->kinds + n, KIND_NUMBERS * sizeof *numbers);
        count += KIND_NUMBERS;
    }
    return count;
}

int miner_restore(struct miner *miner, uint32_t id, uint64_t count, const uint8_t *text, size_t size)
{
    struct pattern pattern;
    if (size > TEMPLATE_TEXT_MAX || !id || id == NONE || table_find(miner, by_id(miner), id) != NONE)
        return 0;
    pattern.text = text;
    pattern.count = words_of_template(text, size, pattern.words);
    pattern.count = words_fold(pattern.words, pattern.count, NULL, pattern.words, &pattern.hash);
    if (table_find(miner, by_hash(miner), pattern.hash) != NONE)
        return 0;
    uint32_t slot = add_template(miner, id, pattern.hash, text, size);
    if (slot == NONE)
        return 0;
    miner->templates[slot].count = count;
    if (miner->next <= id)
        miner->next = id + 1;
    learn(miner, &pattern, slot, 0);
    return 1;
}

int miner_restore_joined(struct miner *miner, const uint32_t *pairs, size_t count)
{
    for (size_t n = 0; n < count; n++) {
        uint32_t id = pairs[2 * n], to = pairs[2 * n + 1];
        if (id == NONE || id <= to || !to || joined_find(miner, id) != NONE)
            return 0;
        joined_put(miner, id, to);
        if (miner->next <= id)
            miner->next = id + 1;
    }
    return 1;
}

int miner_restore_varying(struct miner *miner, const uint64_t *numbers, size_t count)
{
    if (count % KIND_NUMBERS)
        return 0;
    for (size_t n = 0; n < count; n += KIND_NUMBERS) {
        if (!numbers[n + 1])
            return 0;
        memcpy(kind_of(miner, numbers[n]), numbers + n, KIND_NUMBERS * sizeof *numbers);
    }
    return 1;
}

int miner_restore_next(struct miner *miner, uint32_t next)
{
    if (next < miner->next)
        return 0;
    miner->next = next;
    return 1;
}
