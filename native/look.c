/* Many paths looked at again and again: of which is there something new? */

#define _POSIX_C_SOURCE 200809L /* st_mtim */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "native.h"

size_t look_again(struct look *const *looks, size_t count, uint32_t *changed)
{
    size_t news = 0;
    for (size_t i = 0; i < count; i++) {
        struct stat found;
        struct status seen = {0};
        looks[i]->asked = 1;
        int refused = stat(looks[i]->path, &found);
        looks[i]->asked = 0;
        if (refused) {
            seen.error = (uint64_t)errno;
        } else {
            seen.device = found.st_dev;
            seen.inode = found.st_ino;
            seen.mode = found.st_mode;
            seen.size = (uint64_t)found.st_size;
            seen.written_s = (uint64_t)found.st_mtim.tv_sec;
            seen.written_ns = (uint64_t)found.st_mtim.tv_nsec;
        }
        if (memcmp(&seen, &looks[i]->seen, sizeof seen)) {
            looks[i]->seen = seen;
            changed[news++] = (uint32_t)i;
        }
    }
    return news;
}
