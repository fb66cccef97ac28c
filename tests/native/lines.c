/* Runs line_ends over cases from stdin, under the sanitizers of tests/test_native.py.
 *
 * A case is four size_t (engine, start, size, capacity) and then `size` bytes. Block and ends are allocated to the
 * byte, so that one byte read or written too far is seen. Answers one line a case: the offsets, separated by spaces.
 */

#include <stdio.h>
#include <stdlib.h>

#include "native.h"

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
        free(ends);
        free(block);
    }
    return 0;
}
