/* Matches as JSON lines: what `agent logs scan` writes, without a Python object for each match. */

#include <string.h>

#include "native.h"

/* What one byte of text takes at most: \u001f. */
enum { WIDEST = 6 };

/* The finalizer of splitmix64: every bit of the input changes half of the output's. */
static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
    value = (value ^ value >> 27) * 0x94D049BB133111EBu;
    return value ^ value >> 31;
}

uint64_t match_seed(uint64_t device, uint64_t inode, uint64_t generation)
{
    return mix(mix(mix(device + 1) ^ inode) ^ generation);
}

uint64_t match_id(uint64_t seed, uint64_t offset, uint64_t rule) { return mix(mix(seed ^ offset) ^ rule); }

/* Where the next bytes go. Whoever writes has made sure that there is room. */
struct writer {
    uint8_t *at;
    int has_nul, has_invalid;
};

static void put(struct writer *out, const void *bytes, size_t size)
{
    memcpy(out->at, bytes, size);
    out->at += size;
}

static void put_text(struct writer *out, const char *text) { put(out, text, strlen(text)); }

static void put_number(struct writer *out, uint64_t number)
{
    uint8_t digits[20];
    size_t first = sizeof digits;
    do
        digits[--first] = (uint8_t)('0' + number % 10);
    while (number /= 10);
    put(out, digits + first, sizeof digits - first);
}

static void put_hex(struct writer *out, uint64_t number, int digits)
{
    for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4)
        *out->at++ = (uint8_t)"0123456789abcdef"[number >> shift & 15];
}

static int is_more(const uint8_t *at, uint8_t low, uint8_t high) { return *at >= low && *at <= high; }

/* The size of the UTF-8 sequence of more than one byte that begins here; 0: none does. */
static size_t sequence(const uint8_t *at, size_t left)
{
    uint8_t first = *at;
    if (first >= 0xC2 && first <= 0xDF)
        return left > 1 && is_more(at + 1, 0x80, 0xBF) ? 2 : 0;
    if ((first & 0xF0) == 0xE0)
        return left > 2 && is_more(at + 1, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF) &&
                       is_more(at + 2, 0x80, 0xBF)
                   ? 3
                   : 0;
    if (first >= 0xF0 && first <= 0xF4)
        return left > 3 && is_more(at + 1, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF) &&
                       is_more(at + 2, 0x80, 0xBF) && is_more(at + 3, 0x80, 0xBF)
                   ? 4
                   : 0;
    return 0;
}

/* Has none of a word's bytes the high bit, and is none below 32, a quote or a backslash? */
static int is_plain_word(uint64_t word)
{
    const uint64_t ones = 0x0101010101010101u, highs = 0x8080808080808080u;
    uint64_t quotes = word ^ ones * '"', backslashes = word ^ ones * '\\';
    return !((word | (word - ones * 32) | (quotes - ones) | (backslashes - ones)) & highs);
}

/* Where the run of bytes that need no escape ends. */
static size_t plain_end(const uint8_t *text, size_t i, size_t size)
{
    for (uint64_t word; i + sizeof word <= size; i += sizeof word) {
        memcpy(&word, text + i, sizeof word);
        if (!is_plain_word(word))
            break;
    }
    while (i < size && text[i] >= 32 && text[i] < 128 && text[i] != '"' && text[i] != '\\')
        i++;
    return i;
}

/* A string with its quotes. A byte that is not UTF-8 shows as \xff, as Python's "backslashreplace" has it. */
static void put_string(struct writer *out, const uint8_t *text, size_t size)
{
    static const char letters[] = "btn\0fr"; /* of 8 to 13 */
    *out->at++ = '"';
    for (size_t i = 0; i < size;) {
        uint8_t byte = text[i];
        size_t plain = plain_end(text, i, size);
        if (plain > i) {
            put(out, text + i, plain - i);
            i = plain;
            continue;
        }
        size_t wide = byte > 127 ? sequence(text + i, size - i) : 0;
        if (wide) {
            put(out, text + i, wide);
            i += wide;
            continue;
        }
        *out->at++ = '\\';
        if (byte > 127) {
            out->has_invalid = 1;
            put_text(out, "\\x");
            put_hex(out, byte, 2);
        } else if (byte == '"' || byte == '\\') {
            *out->at++ = byte;
        } else if (byte >= 8 && byte <= 13 && byte != 11) {
            *out->at++ = (uint8_t)letters[byte - 8];
        } else {
            out->has_nul |= byte == 0;
            put_text(out, "u00");
            put_hex(out, byte, 2);
        }
        i++;
    }
    *out->at++ = '"';
}

static void put_flag(struct writer *out, int *count, int is_set, const char *name)
{
    if (!is_set)
        return;
    put_text(out, *count ? ",\"" : "\"");
    put_text(out, name);
    *out->at++ = '"';
    ++*count;
}

static void put_match(struct writer *out, const struct line_format *format, const struct match *match,
                      const uint32_t *captures, const uint8_t *block, uint64_t offset, const uint64_t *number)
{
    const struct rule_format *rule = &format->rules[match->rule];
    const uint8_t *line = block + match->line_at;
    uint64_t begin = offset + match->line_at - (uint64_t)match->window * WINDOW_STEP;
    out->has_nul = out->has_invalid = 0;
    put_text(out, "{\"id\":\"lm-");
    put_hex(out, match_id(format->seed, begin, rule->hash), 16);
    put_text(out, "\",");
    put(out, format->source, format->source_size);
    put_text(out, ",\"offset\":");
    put_number(out, begin);
    put_text(out, ",\"length\":");
    put_number(out, match->line_size);
    put_text(out, ",\"line\":");
    if (number)
        put_number(out, *number);
    else
        put_text(out, "null");
    *out->at++ = ',';
    put(out, rule->text, rule->text_size);
    put_text(out, ",\"text\":");
    put_string(out, line, match->line_size);
    int has_nul = out->has_nul, has_invalid = out->has_invalid; /* a capture may cut a character in two */
    put_text(out, ",\"captures\":{");
    const uint8_t *name = rule->names;
    for (uint32_t i = 0; i < match->captures; i++) {
        size_t size = strlen((const char *)name);
        uint32_t start = captures[2 * (match->captures_at + i)];
        if (i)
            *out->at++ = ',';
        put(out, name, size);
        name += size + 1;
        if (start == CAPTURE_UNSET)
            put_text(out, "null");
        else
            put_string(out, line + start, captures[2 * (match->captures_at + i) + 1]);
    }
    put_text(out, "},\"count\":1,\"suppressed\":0,\"flags\":[");
    int flags = 0;
    put_flag(out, &flags, match->flags & MATCH_PARTIAL, "partial");
    put_flag(out, &flags, match->flags & MATCH_WINDOW, "window");
    put_flag(out, &flags, has_nul, "nul");
    put_flag(out, &flags, has_invalid, "invalid_utf8");
    put_text(out, "]}\n");
}

size_t format_matches(const struct line_format *format, const struct match *matches, size_t count,
                      const uint32_t *captures, const uint8_t *block, uint64_t offset, const uint64_t *numbers,
                      uint8_t *out, size_t capacity, size_t *done)
{
    struct writer writer = {out, 0, 0};
    for (*done = 0; *done < count; ++*done) {
        const struct match *match = &matches[*done];
        if (match->flags & MATCH_LIMIT)
            continue; /* nobody knows whether it is one */
        const struct rule_format *rule = &format->rules[match->rule];
        size_t need = 512 + format->source_size + rule->text_size + rule->names_size + WIDEST * (size_t)match->line_size;
        for (uint32_t i = 0; i < match->captures; i++)
            need += 8 + WIDEST * (size_t)captures[2 * (match->captures_at + i) + 1];
        if (need > capacity - (size_t)(writer.at - out))
            break;
        put_match(&writer, format, match, captures, block, offset, numbers ? &numbers[*done] : NULL);
    }
    return (size_t)(writer.at - out);
}
