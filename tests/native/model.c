/* Runs the model over cases from stdin, under the sanitizers of tests/test_native.py.
 *
 * A case is four uint32_t (classes, class, template, size), then `size` bytes: a line to guess, all that came so far at
 * once too, and to learn. With template TEMPLATE_NONE - 1 the bytes are those of a model to load. All memory is
 * allocated to the byte. At the end what was learned is dumped and loaded. Answers the best class of each line.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { LINES = 64 };

int main(void)
{
    uint32_t head[4], classes = 1, starts[LINES + 1] = {0}, templates[LINES];
    size_t count = 0;
    struct model *model = model_new();
    uint8_t *block = malloc(1);
    while (fread(head, sizeof head, 1, stdin) == 1) {
        uint8_t *line = malloc(head[3]);
        if (fread(line, 1, head[3], stdin) != head[3])
            return 1;
        if (head[2] == TEMPLATE_NONE - 1) {
            struct model *loaded = model_load(line, head[3], head[0]);
            model_free(loaded);
            printf("%d\n", loaded != NULL);
            free(line);
            continue;
        }
        classes = head[0] > classes ? head[0] : classes;
        struct guess one = model_guess(model, line, head[3], head[2], classes);
        printf("%d\n", one.best);
        if (count == LINES)
            count = 0;
        block = realloc(block, starts[count] + head[3] + 1);
        memcpy(block + starts[count], line, head[3]);
        templates[count] = head[2];
        starts[count + 1] = starts[count] + head[3];
        count++;
        struct guess *guesses = malloc(count * sizeof *guesses);
        model_guess_all(model, block, starts, templates, count, classes, guesses);
        if (memcmp(&guesses[count - 1], &one, sizeof one))
            return 2;
        free(guesses);
        model_learn(model, line, head[3], head[2], classes, head[1]);
        model_join(model, head[2], head[2] / 2);
        free(line);
    }
    size_t size = model_dump(model, classes, NULL, 0);
    uint8_t *dump = malloc(size);
    model_dump(model, classes, dump, size);
    struct model *again = model_load(dump, size, classes);
    if (!again)
        return 3;
    model_free(again);
    model_free(model);
    free(dump);
    free(block);
    return 0;
}
