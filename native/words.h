#ifndef EMISSARY_WORDS_H
#define EMISSARY_WORDS_H

#include <stddef.h>
#include <stdint.h>

/*
 * A line of a log as words, and which of them vary: the one preprocessing for all logs. Used by the miner alone.
 */

/* A word of letters, one without, one that may stand between values as in 10:31,5, and one that varies. */
enum word_kind { WORD_LITERAL, WORD_SIGN, WORD_JOINER, WORD_VALUE };

/* `hash` is equal for equal words, and the same for all values. `blank`: there is a blank before it. */
struct word {
    uint64_t hash;
    uint32_t at, size;
    uint8_t kind, blank;
};

/* What follows so many words of a line, or so many bytes of them, is taken as one value. Of a run of dots LONG_WORD
 * count, and so many are kept. */
enum { WORDS_MAX = 128, WORDS_BYTES = 1024, LONG_WORD = 64 };

/* Words that mean something beside a value; see words.c. */
enum { MEANS_DATE = 1, MEANS_UNIT = 2, MEANS_DOMAIN = 4, MEANS_NAMED = 8 };
enum { LEXICON_SIZE = 512 };
struct lexicon {
    uint64_t keys[LEXICON_SIZE];
    uint8_t means[LEXICON_SIZE];
};

void lexicon_fill(struct lexicon *lexicon);

/* What a word means, MEANS_*; 0 for most. */
int lexicon_means(const struct lexicon *lexicon, const uint8_t *word, size_t size);

/* Is what follows the word often the name of one, as behind "user"? */
int lexicon_names(const struct lexicon *lexicon, const uint8_t *word, size_t size);

/* The words of line[0..size), which has no LF, to words[0..WORDS_MAX + 3). Returns how many there are, WORDS_MAX at most. */
size_t words_of_line(const struct lexicon *lexicon, const uint8_t *line, size_t size, struct word *words);

/* The same of a template's text: there only <*> is a value. */
size_t words_of_template(const uint8_t *text, size_t size, struct word *words);

/*
 * Leave one value of each run of values: in[0..count) to out, which may be `in`. The words of the set `wild` (bit n is
 * word n; NULL: none) are values too. Returns how many are left, and their hash to *hash.
 */
size_t words_fold(const struct word *in, size_t count, const uint64_t *wild, struct word *out, uint64_t *hash);

#endif
