/*
 * A line of a log as words, and which of them vary.
 *
 * A word ends at a blank, at one of the signs =:,()[]{}"'|;<> and at a run of dots; each sign is a word of its own. It is
 * a value when it has a digit, is a path, an address, a host's name, 8 hexadecimal digits or more, or too long or too
 * broken to be language. Words beside a value may belong to it: months and days, units, pairs of hexadecimal digits.
 * Nothing here knows a kind of log.
 */

#include <string.h>

#include "words.h"

/* What a byte is: bits that are gathered over a word, and those that a word cannot go on behind. */
enum {
    DIGIT = 1,
    LETTER = 2, /* or a byte of another alphabet */
    NOT_HEX = 4,
    AT = 8,
    BACKSLASH = 16,
    HIGH = 32,
    STOP = 64, /* a blank or a sign */
    LOOK = 128 /* a dot or a slash */
};

#define BLANK (STOP | NOT_HEX)
#define SIGN (STOP | NOT_HEX | DIGIT) /* the digit's bit tells it from a blank */

#define HEX_LETTER LETTER
#define OTHER_LETTER (LETTER | NOT_HEX)
#define MARK NOT_HEX

#define B8(x) x, x, x, x, x, x, x, x
static const uint8_t classes[256] = {
    B8(BLANK), B8(BLANK), B8(BLANK), B8(BLANK),
    /*   ! " # $ % & ' */ BLANK, MARK, SIGN, MARK, MARK, MARK, MARK, SIGN,
    /* ( ) * + , - . / */ SIGN, SIGN, MARK, MARK, SIGN, MARK, MARK | LOOK, MARK | LOOK,
    /* 0 to 7 */ B8(DIGIT),
    /* 8 9 : ; < = > ? */ DIGIT, DIGIT, SIGN, SIGN, SIGN, SIGN, SIGN, MARK,
    /* @ A to G */ AT | NOT_HEX, HEX_LETTER, HEX_LETTER, HEX_LETTER, HEX_LETTER, HEX_LETTER, HEX_LETTER, OTHER_LETTER,
    B8(OTHER_LETTER), B8(OTHER_LETTER),
    /* X Y Z [ \ ] ^ _ */ OTHER_LETTER, OTHER_LETTER, OTHER_LETTER, SIGN, BACKSLASH | NOT_HEX, SIGN, MARK, MARK,
    /* ` a to g */ MARK, HEX_LETTER, HEX_LETTER, HEX_LETTER, HEX_LETTER, HEX_LETTER, HEX_LETTER, OTHER_LETTER,
    B8(OTHER_LETTER), B8(OTHER_LETTER),
    /* x y z { | } ~ DEL */ OTHER_LETTER, OTHER_LETTER, OTHER_LETTER, SIGN, SIGN, SIGN, MARK, BLANK,
    B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH),
    B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH),
    B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH),
    B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH), B8(OTHER_LETTER | HIGH),
};

enum { QUOTED_MAX = 256 }; /* bytes of a path in quotes */

static const uint64_t VALUE_HASH = 0x9E3779B97F4A7C15u, FACTOR = 0xD6E8FEB86659FD93u;

static inline uint64_t mixed(uint64_t hash, uint64_t with)
{
    hash = (hash ^ with) * FACTOR;
    return hash ^ (hash >> 32);
}

static inline uint64_t eight(const uint8_t *at)
{
    uint64_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return bytes;
}

static inline uint32_t four(const uint8_t *at)
{
    uint32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return bytes;
}

/* Up to 8 bytes as a number, without reading behind them. */
static inline uint64_t few(const uint8_t *at, size_t size)
{
    if (size >= 8)
        return eight(at);
    if (size >= 4)
        return four(at) | (uint64_t)four(at + size - 4) << 32;
    return at[0] | (uint64_t)at[size / 2] << 8 | (uint64_t)at[size - 1] << 16;
}

static inline uint64_t hash_of(const uint8_t *at, size_t size)
{
    uint64_t hash = mixed(size, few(at, size));
    for (size_t i = 8; i < size; i += 8)
        hash = mixed(hash, eight(at + (i + 8 <= size ? i : size - 8)));
    return hash;
}

/* ---- the lexicon ------------------------------------------------------------------------------------------------- */

static const struct {
    int means;
    const char *words;
} lexicon_words[] = {
    {MEANS_DATE, "Mon Tue Wed Thu Fri Sat Sun Monday Tuesday Wednesday Thursday Friday Saturday Sunday "
                 "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec January February March April June July August "
                 "September October November December AM PM UTC GMT EST EDT CST CDT MST MDT PST PDT CET CEST "},
    {MEANS_UNIT, "B KB MB GB TB kB KiB MiB GiB TiB kb mb gb ns us ms s sec secs min mins hrs am pm Hz kHz MHz GHz "
                 "% bps Kbps Mbps Gbps "},
    {MEANS_DOMAIN, "com net org edu gov mil int info biz io arpa local lan localdomain internal "},
    /* What follows these is often the name of one. */
    {MEANS_NAMED, "user username account host hostname client server node device interface name file class id session "
                  "service process thread task job module domain group owner by from for "},
};

/* Of words of at most 11 bytes, by their size and the first 8 of them. */
static inline uint64_t lexicon_key(const uint8_t *word, size_t size)
{
    return mixed(size, few(word, size)) | 1;
}

void lexicon_fill(struct lexicon *lexicon)
{
    memset(lexicon, 0, sizeof *lexicon);
    for (size_t i = 0; i < sizeof lexicon_words / sizeof *lexicon_words; i++)
        for (const char *at = lexicon_words[i].words, *end; *at; at = end + 1) {
            end = strchr(at, ' ');
            uint64_t key = lexicon_key((const uint8_t *)at, (size_t)(end - at));
            size_t n = key >> 32 & (LEXICON_SIZE - 1);
            while (lexicon->keys[n] && lexicon->keys[n] != key)
                n = (n + 1) & (LEXICON_SIZE - 1);
            lexicon->keys[n] = key;
            lexicon->means[n] |= (uint8_t)lexicon_words[i].means;
        }
}

int lexicon_means(const struct lexicon *lexicon, const uint8_t *word, size_t size)
{
    if (!size || size > 11)
        return 0;
    uint64_t key = lexicon_key(word, size);
    size_t n = key >> 32 & (LEXICON_SIZE - 1);
    while (lexicon->keys[n] && lexicon->keys[n] != key)
        n = (n + 1) & (LEXICON_SIZE - 1);
    return lexicon->keys[n] ? lexicon->means[n] : 0;
}

int lexicon_names(const struct lexicon *lexicon, const uint8_t *word, size_t size)
{
    uint8_t lower[11];
    if (size > sizeof lower)
        return 0;
    for (size_t i = 0; i < size; i++)
        lower[i] = word[i] | 0x20;
    return lexicon_means(lexicon, lower, size) & MEANS_NAMED;
}

/* ---- words ------------------------------------------------------------------------------------------------------- */

/* host.example.org, or three labels and a country. Its dots stand alone. */
static int is_host(const struct lexicon *lexicon, const uint8_t *word, size_t size)
{
    size_t dots = 0, last = 0;
    size -= word[size - 1] == '.';
    if (!size || word[0] == '.')
        return 0;
    for (size_t i = 0; i < size; i++)
        if (word[i] == '.')
            dots++, last = i + 1;
    if (!dots || last == size)
        return 0;
    if (dots >= 2 && size - last == 2)
        return word[last] >= 'a' && word[last] <= 'z' && word[last + 1] >= 'a' && word[last + 1] <= 'z';
    return lexicon_means(lexicon, word + last, size - last) & MEANS_DOMAIN;
}

static int is_utf8(const uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size;) {
        uint8_t first = at[i++];
        size_t more = first < 0x80 ? 0 : first >= 0xC2 && first < 0xE0 ? 1 : (first & 0xF0) == 0xE0 ? 2 : 3;
        if ((more == 3 && (first & 0xF8) != 0xF0) || more > size - i)
            return 0;
        for (; more; more--)
            if ((at[i++] & 0xC0) != 0x80)
                return 0;
    }
    return 1;
}

static inline int is_blank(uint8_t byte)
{
    return classes[byte] == BLANK;
}

/* Signs that no path goes on behind. */
static inline int ends_path(uint8_t byte)
{
    return (classes[byte] & STOP) && byte != ':' && byte != '=';
}

/* Where the path ends that begins here. */
static size_t path_end(const uint8_t *line, size_t at, size_t size)
{
    size_t end = at + 1;
    if (at && (line[at - 1] == '"' || line[at - 1] == '\'')) { /* there may be blanks in it */
        const uint8_t *quote = memchr(line + end, line[at - 1], size - end < QUOTED_MAX ? size - end : QUOTED_MAX);
        if (quote)
            return (size_t)(quote - line);
    }
    while (end < size && !ends_path(line[end]))
        end++;
    while (end > at + 1 && (line[end - 1] == ':' || line[end - 1] == '=' || line[end - 1] == '.'))
        end--;
    return end;
}

/* Is what begins with a slash, a tilde or a dot a path? */
static inline int begins_path(const uint8_t *line, size_t at, size_t size)
{
    const uint8_t *c = line + at;
    size_t left = size - at;
    if (*c == '/')
        return left > 1 && !(classes[c[1]] & STOP);
    if (*c == '~')
        return left > 1 && c[1] == '/';
    return *c == '.' && ((left > 1 && c[1] == '/') || (left > 2 && c[1] == '.' && c[2] == '/'));
}

static inline int is_hex_pair(const uint8_t *line, const struct word *word)
{
    if (word->kind == WORD_VALUE)
        return 1;
    if (word->size != 2 && word->size != 4)
        return 0;
    for (size_t i = 0; i < word->size; i++)
        if (classes[line[word->at + i]] & NOT_HEX)
            return 0;
    return 1;
}

/* node-[40-63] is one value. words[0..count + 3) may be read. */
static void join_ranges(const uint8_t *line, struct word *words, size_t count)
{
    for (struct word *word = words; word < words + count; word++)
        if (word->kind == WORD_LITERAL && word[1].kind == WORD_SIGN && line[word[1].at] == '[' && !word[1].blank &&
            word[2].kind == WORD_VALUE && word[3].kind == WORD_SIGN && line[word[3].at] == ']' &&
            (line[word[1].at - 1] == '-' || line[word[1].at - 1] == '_'))
            for (size_t n = 0; n < 4; n++)
                word[n].kind = WORD_VALUE, word[n].hash = VALUE_HASH;
}

/* Which words belong to the values beside them? words[0..count + 2) may be read. */
static void join_values(const struct lexicon *lexicon, const uint8_t *line, struct word *words, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct word *word = words + i;
        if (word->kind > WORD_SIGN || word->size > 9)
            continue;
        int behind = i && word[-1].kind == WORD_VALUE, before = word[1].kind == WORD_VALUE;
        int is_value = 0;
        if (word->kind == WORD_SIGN) {
            is_value = behind && (before || (word->size == 1 && line[word->at] == '%')) && !(classes[line[word->at]] & STOP);
        } else {
            int begins_date = word[1].kind == WORD_LITERAL && word[1].size <= 9 && word[2].kind == WORD_VALUE;
            if (behind || before || begins_date) {
                int means = lexicon_means(lexicon, line + word->at, word->size);
                is_value = (means & MEANS_UNIT && behind) ||
                           (means & MEANS_DATE &&
                            (behind || before ||
                             lexicon_means(lexicon, line + word[1].at, word[1].size) & MEANS_DATE));
            }
            if (!is_value && (word->size == 2 || word->size == 4))
                is_value = ((i > 1 && !word->blank && word[-1].kind == WORD_JOINER && word[-2].kind == WORD_VALUE) ||
                            (word[1].kind == WORD_JOINER && !word[1].blank && !word[2].blank &&
                             word[2].kind != WORD_JOINER && is_hex_pair(line, word + 2))) &&
                           is_hex_pair(line, word);
        }
        if (is_value)
            word->kind = WORD_VALUE, word->hash = VALUE_HASH;
    }
}

static inline void put(struct word *word, size_t at, size_t end, int kind, int blank, uint64_t hash)
{
    *word = (struct word){hash, (uint32_t)at, (uint32_t)(end - at), (uint8_t)kind, (uint8_t)blank};
}

/* A sign that stands for itself. */
static inline void put_sign(struct word *word, const uint8_t *line, size_t at, int blank)
{
    int is_joiner = line[at] == ':' || line[at] == ',';
    put(word, at, at + 1, is_joiner ? WORD_JOINER : WORD_SIGN, blank, mixed(line[at], VALUE_HASH));
}

size_t words_of_line(const struct lexicon *lexicon, const uint8_t *line, size_t size, struct word *words)
{
    size_t count = 0, i = 0, bytes = 0;
    int blank = 1, has_range = 0;
    for (;;) {
        while (i < size && is_blank(line[i]))
            i++, blank = 1;
        if (i == size)
            break;
        if (count >= WORDS_MAX - 2 || bytes >= WORDS_BYTES) {
            put(words + count++, i, size, WORD_VALUE, blank, VALUE_HASH);
            break;
        }
        size_t at = i;
        uint8_t first = line[i], flags = 0;
        if ((first == '<' || first == '>') && blank && i + 1 < size && line[i + 1] >= '0' && line[i + 1] <= '9')
            at = ++i; /* less than a number is a number */
        else if (first == '<' && size - i > 2 && line[i + 1] == '*' && line[i + 2] == '>') {
            put(words + count++, i, i + 3, WORD_VALUE, blank, VALUE_HASH);
            i += 3, blank = 0, bytes += 4;
            continue;
        } else if (classes[first] & STOP) {
            put_sign(words + count++, line, i, blank);
            bytes += 2;
            has_range |= first == '[' && !blank && (line[i - 1] == '-' || line[i - 1] == '_');
            if (first == '(' && blank && i + 1 < size && line[i + 1] == ')')
                put(words + count++, i + 1, i + 1, WORD_VALUE, 0, VALUE_HASH); /* there might be one */
            i++, blank = 0;
            continue;
        }
        size_t slashes = 0;
        int is_value = 0;
        if ((first == '/' || first == '~' || first == '.') && begins_path(line, i, size)) {
            i = path_end(line, i, size);
            is_value = 1;
        } else {
            for (; i < size; i++) {
                uint8_t class = classes[line[i]];
                if (class & (STOP | LOOK)) {
                    if (class & STOP)
                        break;
                    if (line[i] == '/')
                        slashes++;
                    else if (i + 1 < size && line[i + 1] == '.')
                        break;
                }
                flags |= class;
            }
            if (i == at) { /* dots */
                while (i < size && line[i] == '.')
                    i++;
                put(words + count++, at, i, WORD_SIGN, blank, mixed('.', VALUE_HASH));
                blank = 0, bytes += (i - at < LONG_WORD ? i - at : LONG_WORD) + 1;
                continue;
            }
            if (i + 1 < size && line[i] == ':' && flags & LETTER &&
                ((i + 2 < size && line[i + 1] == '/' && line[i + 2] == '/') || (line[i + 1] == '\\' && i == at + 1))) {
                i = path_end(line, i, size);
                is_value = 1;
            }
        }
        size_t length = i - at;
        is_value = is_value || flags & (DIGIT | BACKSLASH) || slashes > 1 || length > LONG_WORD ||
                   (flags & AT && length > 2) || (length >= 8 && !(flags & NOT_HEX)) ||
                   (flags & LOOK && is_host(lexicon, line + at, length)) ||
                   (flags & HIGH && !is_utf8(line + at, length));
        if (is_value)
            put(words + count++, at, i, WORD_VALUE, blank, VALUE_HASH);
        else
            put(words + count++, at, i, flags & LETTER ? WORD_LITERAL : WORD_SIGN, blank, hash_of(line + at, length));
        bytes += (is_value ? 3 : length) + 1;
        blank = 0;
    }
    words[count] = words[count + 1] = words[count + 2] = (struct word){.kind = WORD_JOINER};
    if (has_range)
        join_ranges(line, words, count);
    join_values(lexicon, line, words, count);
    return count;
}

size_t words_of_template(const uint8_t *text, size_t size, struct word *words)
{
    size_t count = 0;
    int blank = 1;
    for (size_t i = 0; i < size && count < WORDS_MAX;) {
        size_t at = i;
        if (is_blank(text[i])) {
            i++, blank = 1;
            continue;
        }
        if (size - i > 2 && memcmp(text + i, "<*>", 3) == 0) {
            i += 3;
            put(words + count++, at, i, WORD_VALUE, blank, VALUE_HASH);
        } else if (classes[text[i]] & STOP) {
            put_sign(words + count++, text, i++, blank);
        } else {
            uint8_t flags = 0;
            for (; i < size && !(classes[text[i]] & STOP); i++) {
                if (text[i] == '.' && i + 1 < size && text[i + 1] == '.')
                    break;
                flags |= classes[text[i]];
            }
            if (i > at) {
                put(words + count++, at, i, flags & LETTER ? WORD_LITERAL : WORD_SIGN, blank, hash_of(text + at, i - at));
            } else {
                while (i < size && text[i] == '.')
                    i++;
                put(words + count++, at, i, WORD_SIGN, blank, mixed('.', VALUE_HASH));
            }
        }
        blank = 0;
    }
    return count;
}

size_t words_fold(const struct word *in, size_t count, const uint64_t *wild, struct word *out, uint64_t *hash)
{
    size_t left = 0;
    for (size_t i = 0; i < count; i++) {
        struct word word = in[i];
        if (wild && wild[i / 64] >> i % 64 & 1)
            word.kind = WORD_VALUE, word.hash = VALUE_HASH;
        if (word.kind == WORD_VALUE && left) {
            if (out[left - 1].kind == WORD_VALUE)
                continue;
            if (left > 1 && out[left - 1].kind == WORD_JOINER && out[left - 2].kind == WORD_VALUE) {
                left--;
                continue;
            }
        }
        out[left++] = word;
    }
    uint64_t sum = left;
    for (size_t i = 0; i < left; i++)
        sum = mixed(sum, out[i].hash);
    *hash = sum;
    return left;
}
