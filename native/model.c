/*
 * What is known of classes of lines: labels of templates, and an online linear model over hashed words.
 *
 * A line is the set of its words, of its pairs of neighbouring words, and its template, each a token of TOKENS by its
 * hash; words with a digit are one and the same word. The model is a softmax over classes: a token has a weight for
 * each, AdaGrad sets the steps. There is no weight that every line has: what nobody labelled anything like is as
 * likely of one class as of any other.
 */

#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 4096 };
enum { SEEN_BYTES = 4096, SEEN_WORDS = 160, WORD_BYTES = 64 }; /* of a line; of a word */
enum { PARTS = 2 * SEEN_WORDS + 1 };
enum { LABELS = MODEL_LABELS * 2 }; /* slots: never more than half full */
enum { ENOUGH = 5, COUNT_MAX = 1 << 20 }; /* labels that settle a template; counts are halved beyond */

/* How much the template weighs beside a word; the size of a step; what the first gradients are divided by. Seen to be
 * flat around these values on the logs of tests/bench, with events of other sets than the one that is scored. */
static const float TEMPLATE_VALUE = 4, STEP = 1, FIRST_SQUARE = 1e-3f;
static const float SMALL = 1e-4f; /* errors below it teach nothing */

/* `count` of `total` labels of a template are `class` for sure. */
struct label { uint32_t template, total, count, class; };

struct model {
    float weights[TOKENS][MODEL_CLASSES], squares[TOKENS][MODEL_CLASSES];
    size_t labelled;
    struct label labels[LABELS]; /* by hash of the template, total 0: free */
};

struct tokens { uint16_t at[PARTS]; size_t count; float word, template; size_t has_template; };

typedef float four __attribute__((vector_size(16)));
typedef int32_t whole_four __attribute__((vector_size(16)));

static const float EXP_TERMS[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1, 1};

struct model *model_new(void)
{
    return calloc(1, sizeof(struct model));
}

void model_free(struct model *model)
{
    free(model);
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
}

/* The bytes of integers are those of little-endian machines everywhere: a model may be copied to another machine. */
static uint64_t load(const uint8_t *at, size_t size)
{
    uint64_t value = 0;
    for (size_t i = 0; i < size; i++)
        value |= (uint64_t)at[i] << 8 * i;
    return value;
}

static uint64_t hash_word(const uint8_t *word, size_t size)
{
    uint64_t hash = size;
    if (size > WORD_BYTES)
        size = WORD_BYTES;
    for (; size >= 8; word += 8, size -= 8)
        hash = mix(hash, load(word, 8));
    return mix(hash, load(word, size));
}

enum { PLAIN, DIGIT, BETWEEN };

static int kind_of(uint8_t byte)
{
    static const uint8_t kinds[256] = {
        [0] = BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN,
        BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN,
        BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN, BETWEEN,
        [','] = BETWEEN, [';'] = BETWEEN, [':'] = BETWEEN, ['='] = BETWEEN, ['('] = BETWEEN, [')'] = BETWEEN,
        ['['] = BETWEEN, [']'] = BETWEEN, ['{'] = BETWEEN, ['}'] = BETWEEN, ['"'] = BETWEEN, ['\''] = BETWEEN,
        ['<'] = BETWEEN, ['>'] = BETWEEN, ['|'] = BETWEEN, ['/'] = BETWEEN,
        ['0'] = DIGIT, DIGIT, DIGIT, DIGIT, DIGIT, DIGIT, DIGIT, DIGIT, DIGIT, DIGIT,
    };
    return kinds[byte];
}

struct bag { struct tokens *to; uint64_t seen[TOKENS / 64]; };

static void put(struct bag *bag, uint64_t hash)
{
    uint32_t token = (uint32_t)(hash >> 32) % TOKENS;
    uint64_t bit = (uint64_t)1 << token % 64;
    if (bag->seen[token / 64] & bit)
        return;
    bag->seen[token / 64] |= bit;
    bag->to->at[bag->to->count++] = (uint16_t)token;
}

/* The tokens of a line; the template's, if it has one, comes first. */
static void tokens_of(const uint8_t *line, size_t size, uint32_t template, struct tokens *to)
{
    static const uint64_t BEGIN = 1, NUMBER = 2, TEMPLATE = 3;
    struct bag bag = {.to = to};
    to->count = 0;
    to->has_template = template != TEMPLATE_NONE;
    if (to->has_template)
        put(&bag, mix(TEMPLATE, template));
    if (size > SEEN_BYTES)
        size = SEEN_BYTES;
    uint64_t before = BEGIN;
    for (size_t at = 0, words = 0; at < size && words < SEEN_WORDS;) {
        size_t start = at;
        int is_number = 0, kind;
        while (at < size && (kind = kind_of(line[at])) != BETWEEN) {
            is_number |= kind;
            at++;
        }
        size_t end = at++;
        while (start < end && line[start] == '.')
            start++;
        while (start < end && line[end - 1] == '.')
            end--;
        if (start == end)
            continue;
        words++;
        uint64_t word = is_number ? NUMBER : hash_word(line + start, end - start);
        if (!is_number)
            put(&bag, word);
        if (!is_number || before != NUMBER)
            put(&bag, mix(before, word));
        before = word;
    }
    float square = (float)(to->count - to->has_template);
    if (to->has_template)
        square += TEMPLATE_VALUE * TEMPLATE_VALUE;
    to->word = square > 0 ? 1 / sqrtf(square) : 0;
    to->template = to->word * TEMPLATE_VALUE;
}

static float value_of(const struct tokens *tokens, size_t index)
{
    return index < tokens->has_template ? tokens->template : tokens->word;
}

/* e^x for -80 <= x <= 0, the same on every machine. */
static four exp_of(four x)
{
    four turns = x * 1.44269504f - 0.5f;
    whole_four whole = __builtin_convertvector(turns, whole_four); /* towards zero: the nearest, or one above it */
    four rest = (turns + 0.5f - __builtin_convertvector(whole, four)) * 0.693147181f, power = {0};
    for (size_t k = 0; k < sizeof EXP_TERMS / sizeof *EXP_TERMS; k++)
        power = power * rest + EXP_TERMS[k];
    union { whole_four bits; four value; } scale = {(whole + 127) * (1 << 23)};
    return power * scale.value;
}

/*
 * What labels of the template alone say for their class, as a logarithm of odds, by how many more there are of it than of
 * others: 3 log(1 + n). Words that lines of other classes have too learn more slowly than that.
 */
static float lead_of(const struct label *label)
{
    static const float leads[] = {0, 2.07944f, 3.29584f, 4.15888f, 4.82831f};
    uint32_t others = label->total - label->count;
    uint32_t more = label->count > others ? label->count - others : 0;
    return leads[more < 4 ? more : 4];
}

/* The probability of each class; shares[] has room for whole groups of four. `label` is the template's, or NULL. */
static void weigh(const struct model *model, const struct tokens *tokens, size_t classes, const struct label *label,
                  float *shares)
{
    size_t groups = (classes + 3) / 4;
    four sums[MODEL_CLASSES / 4] = {{0}};
    for (size_t i = 0; i < tokens->count; i++) {
        const float *row = model->weights[tokens->at[i]];
        float value = value_of(tokens, i);
        for (size_t group = 0; group < groups; group++) {
            four weights;
            memcpy(&weights, row + 4 * group, sizeof weights);
            sums[group] += weights * value;
        }
    }
    memcpy(shares, sums, groups * sizeof *sums);
    if (label)
        shares[label->class] += lead_of(label);
    float top = shares[0], total = 0;
    for (size_t class = 1; class < classes; class++)
        top = shares[class] > top ? shares[class] : top;
    for (size_t class = 0; class < 4 * groups; class++) {
        float below = shares[class] - top;
        shares[class] = below > 0 ? 0 : below < -80 ? -80 : below; /* above 0: what fills the last group */
    }
    memcpy(sums, shares, groups * sizeof *sums);
    for (size_t group = 0; group < groups; group++)
        sums[group] = exp_of(sums[group]);
    memcpy(shares, sums, groups * sizeof *sums);
    for (size_t class = 0; class < classes; class++)
        total += shares[class];
    for (size_t class = 0; class < classes; class++)
        shares[class] /= total;
}

/* The slot of a template's label, or the free one where it belongs. */
static struct label *find_label(struct label *labels, uint32_t template)
{
    size_t at = (size_t)(mix(0, template) >> 32) % LABELS;
    while (labels[at].total && labels[at].template != template)
        at = (at + 1) % LABELS;
    return &labels[at];
}

static int is_settled(const struct label *label)
{
    return label->total >= ENOUGH && (uint64_t)label->count * 20 >= (uint64_t)label->total * 19;
}

struct guess model_guess(const struct model *model, const uint8_t *line, size_t size, uint32_t template, size_t classes)
{
    const struct label *label = NULL;
    if (template != TEMPLATE_NONE) {
        label = find_label((struct label *)model->labels, template);
        if (is_settled(label))
            return (struct guess){label->class, GUESS_TEMPLATE, (float)(label->count + 1) / (float)(label->total + 2)};
    }
    struct tokens tokens;
    float shares[MODEL_CLASSES];
    tokens_of(line, size, template, &tokens);
    weigh(model, &tokens, classes, label, shares);
    struct guess guess = {0, GUESS_MODEL, shares[0]};
    for (size_t class = 1; class < classes; class++)
        if (shares[class] > guess.confidence)
            guess.best = (uint16_t)class, guess.confidence = shares[class];
    return guess;
}

void model_guess_all(const struct model *model, const uint8_t *block, const uint32_t *starts, const uint32_t *templates,
                     size_t count, size_t classes, struct guess *guesses)
{
    for (size_t i = 0; i < count; i++)
        guesses[i] = model_guess(model, block + starts[i], starts[i + 1] - starts[i], templates[i], classes);
}

/* Make room for labels: halve all counts, and so forget templates that were labelled once, until a quarter is free. */
static int age_labels(struct model *model)
{
    struct label *old = malloc(sizeof model->labels);
    if (!old)
        return 0;
    while (model->labelled > MODEL_LABELS / 4 * 3) {
        memcpy(old, model->labels, sizeof model->labels);
        memset(model->labels, 0, sizeof model->labels);
        model->labelled = 0;
        for (size_t i = 0; i < LABELS; i++)
            if (old[i].total / 2) {
                struct label *label = find_label(model->labels, old[i].template);
                *label = (struct label){old[i].template, old[i].total / 2, old[i].count / 2, old[i].class};
                model->labelled++;
            }
    }
    free(old);
    return 1;
}

/* What is counted for a template is a lower bound: of the class that leads, from when it began to. */
static void count_label(struct model *model, uint32_t template, uint32_t class)
{
    struct label *label = find_label(model->labels, template);
    if (!label->total) {
        if (model->labelled >= MODEL_LABELS) {
            if (!age_labels(model))
                return;
            label = find_label(model->labels, template);
        }
        model->labelled++;
        *label = (struct label){template, 0, 0, class};
    }
    if (label->total >= COUNT_MAX)
        label->total /= 2, label->count /= 2;
    label->total++;
    if (label->class == class)
        label->count++;
    else if (label->total > 2 * label->count)
        label->class = class, label->count = 1;
}

void model_join(struct model *model, uint32_t from, uint32_t into)
{
    struct label *young = find_label(model->labels, from), *old = find_label(model->labels, into);
    if (!young->total || from == into)
        return;
    if (!old->total) {
        if (model->labelled >= MODEL_LABELS)
            return;
        model->labelled++;
        *old = (struct label){into, 0, 0, young->class};
    }
    old->total = old->total + young->total > COUNT_MAX ? COUNT_MAX : old->total + young->total;
    if (old->class == young->class)
        old->count = old->count + young->count > old->total ? old->total : old->count + young->count;
    else if (young->count > old->count)
        old->class = young->class, old->count = young->count;
}

void model_learn(struct model *model, const uint8_t *line, size_t size, uint32_t template, size_t classes, size_t class)
{
    if (template != TEMPLATE_NONE)
        count_label(model, template, (uint32_t)class);
    struct tokens tokens;
    float errors[MODEL_CLASSES];
    tokens_of(line, size, template, &tokens);
    weigh(model, &tokens, classes, NULL, errors);
    errors[class] -= 1;
    for (size_t each = 0; each < classes; each++) {
        if (errors[each] < SMALL && errors[each] > -SMALL)
            continue;
        for (size_t i = 0; i < tokens.count; i++) {
            float slope = errors[each] * value_of(&tokens, i);
            float *square = &model->squares[tokens.at[i]][each];
            *square += slope * slope;
            model->weights[tokens.at[i]][each] -= STEP * slope / sqrtf(FIRST_SQUARE + *square);
        }
    }
}

/*
 * On disk, integers and floats little-endian: the number of rows, u32; for each, in rising order, its token u16, a u64
 * with a bit for each class that was taught, and for each of these weight and square, f32. The number of labels, u32;
 * for each its template, total and count, u32, and its class, u8.
 */

enum { LABEL_BYTES = 13 };
static const float LIMIT = 1e6f; /* of weights and squares: no sum of them is infinite */

struct writer { uint8_t *out; size_t size, capacity; };
struct reader { const uint8_t *data; size_t left; int is_good; };

static void write_number(struct writer *writer, uint64_t value, size_t size)
{
    for (size_t i = 0; i < size && writer->size + size <= writer->capacity; i++)
        writer->out[writer->size + i] = (uint8_t)(value >> 8 * i);
    writer->size += size;
}

static void write_float(struct writer *writer, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    write_number(writer, bits, sizeof bits);
}

static uint64_t read_number(struct reader *reader, size_t size)
{
    if (reader->left < size) {
        reader->is_good = 0;
        return 0;
    }
    uint64_t value = load(reader->data, size);
    reader->data += size;
    reader->left -= size;
    return value;
}

static float read_float(struct reader *reader, float least)
{
    uint32_t bits = (uint32_t)read_number(reader, sizeof bits);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (!(value >= least && value <= LIMIT)) /* nor NaN */
        reader->is_good = 0;
    return value;
}

static uint64_t taught(const struct model *model, size_t token, size_t classes)
{
    uint64_t bits = 0;
    for (size_t class = 0; class < classes; class++)
        bits |= (uint64_t)(model->squares[token][class] > 0) << class;
    return bits;
}

size_t model_dump(const struct model *model, size_t classes, uint8_t *out, size_t capacity)
{
    struct writer writer = {out, 0, capacity};
    size_t rows = 0;
    for (size_t token = 0; token < TOKENS; token++)
        rows += taught(model, token, classes) != 0;
    write_number(&writer, rows, 4);
    for (size_t token = 0; token < TOKENS; token++) {
        uint64_t bits = taught(model, token, classes);
        if (!bits)
            continue;
        write_number(&writer, token, 2);
        write_number(&writer, bits, 8);
        for (size_t class = 0; class < classes; class++)
            if (bits >> class & 1) {
                write_float(&writer, model->weights[token][class]);
                write_float(&writer, model->squares[token][class]);
            }
    }
    write_number(&writer, model->labelled, 4);
    for (size_t i = 0; i < LABELS; i++) {
        const struct label *label = &model->labels[i];
        if (!label->total)
            continue;
        write_number(&writer, label->template, 4);
        write_number(&writer, label->total, 4);
        write_number(&writer, label->count, 4);
        write_number(&writer, label->class, 1);
    }
    return writer.size;
}

static void load_rows(struct model *model, struct reader *reader, size_t classes)
{
    uint64_t rows = read_number(reader, 4);
    for (uint64_t row = 0, least = 0; row < rows && reader->is_good; row++) {
        uint64_t token = read_number(reader, 2), bits = read_number(reader, 8);
        if (token < least || token >= TOKENS || !bits || (classes < 64 && bits >> classes)) {
            reader->is_good = 0;
            return;
        }
        least = token + 1;
        for (size_t class = 0; class < classes; class++)
            if (bits >> class & 1) {
                model->weights[token][class] = read_float(reader, -LIMIT);
                model->squares[token][class] = read_float(reader, 0);
            }
    }
}

static void load_labels(struct model *model, struct reader *reader, size_t classes)
{
    uint64_t labels = read_number(reader, 4);
    if (labels > MODEL_LABELS || reader->left != labels * LABEL_BYTES)
        reader->is_good = 0;
    for (; labels && reader->is_good; labels--) {
        struct label label = {.template = (uint32_t)read_number(reader, 4)};
        label.total = (uint32_t)read_number(reader, 4);
        label.count = (uint32_t)read_number(reader, 4);
        label.class = (uint32_t)read_number(reader, 1);
        struct label *at = find_label(model->labels, label.template);
        if (!label.total || label.total > COUNT_MAX || label.count > label.total || label.class >= classes || at->total)
            reader->is_good = 0;
        else
            *at = label, model->labelled++;
    }
}

struct model *model_load(const uint8_t *data, size_t size, size_t classes)
{
    struct model *model = model_new();
    struct reader reader = {data, size, 1};
    if (!model)
        return NULL;
    load_rows(model, &reader, classes);
    load_labels(model, &reader, classes);
    if (!reader.is_good) {
        model_free(model);
        return NULL;
    }
    return model;
}
