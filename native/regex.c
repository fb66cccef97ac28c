/* Regular expressions: PCRE2 with the JIT where executable memory can be had, and limits that end an exploding search. */

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* protocols/logs.md 3: hostile patterns end after 0.2-0.4 ms with JIT, 2-4 ms without. */
enum { LIMIT = 100000, HEAP_KIB = 16 * 1024, STACK_START = 32 * 1024, STACK_MAX = 1024 * 1024 };
/* More groups than this do not fit a pattern of REGEX_PATTERN_MAX: each takes two bytes, "()". */
enum { GROUPS_MAX = REGEX_PATTERN_MAX / 2 };

struct regex {
    pcre2_code *code;
    const char **names; /* in the order of the groups' numbers; the text is PCRE2's */
    uint32_t *numbers;
    size_t named;
    int jit;
};

struct scratch {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

/* Sort the name table, which is by name, by number. */
static int read_names(struct regex *regex)
{
    uint32_t count, entry_size;
    const uint8_t *table;
    pcre2_pattern_info(regex->code, PCRE2_INFO_NAMECOUNT, &count);
    pcre2_pattern_info(regex->code, PCRE2_INFO_NAMEENTRYSIZE, &entry_size);
    pcre2_pattern_info(regex->code, PCRE2_INFO_NAMETABLE, &table);
    regex->names = calloc(count + 1, sizeof *regex->names);
    regex->numbers = calloc(count + 1, sizeof *regex->numbers);
    if (!regex->names || !regex->numbers)
        return 0;
    for (uint32_t i = 0; i < count; i++, table += entry_size) {
        uint32_t number = (uint32_t)table[0] << 8 | table[1];
        size_t at = regex->named++;
        for (; at && regex->numbers[at - 1] > number; at--) {
            regex->numbers[at] = regex->numbers[at - 1];
            regex->names[at] = regex->names[at - 1];
        }
        regex->numbers[at] = number;
        regex->names[at] = (const char *)table + 2;
    }
    return 1;
}

struct regex *regex_compile(const uint8_t *pattern, size_t size, int flags, struct regex_fault *fault)
{
    *fault = (struct regex_fault){0, "out of memory"};
    if (size > REGEX_PATTERN_MAX) {
        snprintf(fault->text, sizeof fault->text, "longer than %d bytes", REGEX_PATTERN_MAX);
        return NULL;
    }
    struct regex *regex = calloc(1, sizeof *regex);
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!regex || !context) {
        free(regex);
        pcre2_compile_context_free(context);
        return NULL;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    /* (*UTF) in a pattern would match bytes unchecked; \C could cut a character in two. */
    uint32_t options = PCRE2_NEVER_BACKSLASH_C;
    /* In a text without LF the dot is the same, but need not look for one: a tenth of all confirmation. */
    options |= PCRE2_DOTALL;
    options |= flags & REGEX_UTF ? PCRE2_UTF | PCRE2_MATCH_INVALID_UTF : PCRE2_NEVER_UTF;
    int code;
    regex->code = pcre2_compile(pattern, size, options, &code, &fault->at, context);
    pcre2_compile_context_free(context);
    if (!regex->code) {
        pcre2_get_error_message(code, (PCRE2_UCHAR *)fault->text, sizeof fault->text);
    } else if (read_names(regex)) {
        /* -48 under MemoryDenyWriteExecute, -45 where PCRE2 has no JIT for the CPU: then interpret. */
        regex->jit = !(flags & REGEX_INTERPRET) && pcre2_jit_compile(regex->code, PCRE2_JIT_COMPLETE) == 0;
        return regex;
    }
    regex_free(regex);
    return NULL;
}

void regex_free(struct regex *regex)
{
    if (!regex)
        return;
    pcre2_code_free(regex->code);
    free(regex->names);
    free(regex->numbers);
    free(regex);
}

int regex_jit(const struct regex *regex) { return regex->jit; }

void regex_version(char *text) { pcre2_config(PCRE2_CONFIG_VERSION, text); }

size_t regex_groups(const struct regex *regex) { return regex->named; }

const char *regex_group(const struct regex *regex, size_t index) { return regex->names[index]; }

struct scratch *scratch_new(void)
{
    struct scratch *scratch = calloc(1, sizeof *scratch);
    if (!scratch)
        return NULL;
    scratch->data = pcre2_match_data_create(GROUPS_MAX + 1, NULL);
    scratch->context = pcre2_match_context_create(NULL);
    if (!scratch->data || !scratch->context) {
        scratch_free(scratch);
        return NULL;
    }
    pcre2_set_match_limit(scratch->context, LIMIT);
    pcre2_set_depth_limit(scratch->context, LIMIT);
    pcre2_set_heap_limit(scratch->context, HEAP_KIB);
    /* NULL where executable memory is refused too; PCRE2 then uses 32 KiB of the thread's own. */
    scratch->stack = pcre2_jit_stack_create(STACK_START, STACK_MAX, NULL);
    pcre2_jit_stack_assign(scratch->context, NULL, scratch->stack);
    return scratch;
}

void scratch_free(struct scratch *scratch)
{
    if (!scratch)
        return;
    pcre2_jit_stack_free(scratch->stack);
    pcre2_match_context_free(scratch->context);
    pcre2_match_data_free(scratch->data);
    free(scratch);
}

int regex_match(const struct regex *regex, struct scratch *scratch, const uint8_t *text, size_t size, int flags,
                uint32_t *captures)
{
    uint32_t options = (flags & MATCH_NOTBOL ? PCRE2_NOTBOL : 0) | (flags & MATCH_NOTEOL ? PCRE2_NOTEOL : 0);
    int found = PCRE2_ERROR_JIT_STACKLIMIT;
    if (regex->jit) /* pcre2_match would check all arguments again */
        found = pcre2_jit_match(regex->code, text, size, 0, options, scratch->data, scratch->context);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT)
        found = pcre2_match(regex->code, text, size, 0, options | PCRE2_NO_JIT, scratch->data, scratch->context);
    if (found == PCRE2_ERROR_NOMATCH)
        return 0;
    if (found < 0)
        return -1;
    const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(scratch->data);
    for (size_t i = 0; i < regex->named; i++) {
        size_t group = regex->numbers[i];
        int is_set = group < (size_t)found && offsets[2 * group] != PCRE2_UNSET;
        captures[2 * i] = is_set ? (uint32_t)offsets[2 * group] : CAPTURE_UNSET;
        captures[2 * i + 1] = is_set ? (uint32_t)(offsets[2 * group + 1] - offsets[2 * group]) : 0;
    }
    return 1;
}
