/* Runs line_ends over cases from stdin, under the sanitizers of tests/test_native.py.
 *
 * A case is four size_t (engine, start, size, capacity) and then `size` bytes. Block and ends are allocated to the
 * byte, so that one byte read or written too far is seen. Answers one line a case: the offsets, separated by spaces.
 * Ends with 1 where line_start or line_end differ from what a loop finds.
 */

#include <stdio.h>
#include <stdlib.h>

#include "native.h"

/* For each position from `start` on. Returns 0 where one is wrong. */
static int knows_lines(int engine, const uint8_t *block, size_t start, size_t size)
{
    for (size_t at = start; at <= size; at++) {
        size_t first = at, end = at;
        while (first > start && block[first - 1] != '\n')
            first--;
        while (end < size && block[end] != '\n')
            end++;
        if (line_start(engine, block, start, at) != first || line_end(engine, block, at, size) != end) {
            fprintf(stderr, "engine %d: the line at %zu of %zu..%zu is %zu..%zu\n", engine, at, start, size, first, end);
            return 0;
        }
    }
    return 1;
}

int main(void)
{
    size_t head[4];
    while (fread(head, sizeof head, 1, stdin) == 1) {
        uint8_t *block = malloc(head[2]);
        size_t *ends = malloc(head[3] * sizeof *ends);
        if (fread(block, 1, head[2], stdin) != head[2])
            return 1;
        size_t found = line_ends((int)head[0], block, head[1], head[2], ends, head[3]);
        for (size_t i = 0; i < found; i++)
            printf("%zu ", ends[i]);
        putchar('\n');
        if (!knows_lines((int)head[0], block, head[1], head[2]))
            return 1;
        free(ends);
        free(block);
    }
    return 0;
}
