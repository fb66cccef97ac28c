/* Paths and files looked at again and again: what is new? */

#define _GNU_SOURCE /* preadv2, st_mtim */
#include <errno.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

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

int file_in_memory(int fd)
{
    struct statfs found;
    return !fstatfs(fd, &found) && (found.f_type == TMPFS_MAGIC || found.f_type == RAMFS_MAGIC);
}

/* 1: all of it was in memory. */
static int read_at_once(int fd, uint64_t at, uint8_t *to, size_t size)
{
    struct iovec piece = {to, size};
    ssize_t got = size ? preadv2(fd, &piece, 1, (off_t)at, RWF_NOWAIT) : 0;
    if (got < 0 && errno == EOPNOTSUPP && file_in_memory(fd))
        got = pread(fd, to, size, (off_t)at);
    return got == (ssize_t)size;
}

int read_news(int fd, uint64_t at, struct news *news)
{
    struct stat found;
    if (fstat(fd, &found) || found.st_size < 0)
        return 0;
    news->size = (uint64_t)found.st_size;
    news->written = (double)found.st_mtim.tv_sec + 1e-9 * (double)found.st_mtim.tv_nsec;
    news->got = news->size > at ? news->size - at : 0;
    news->head_size = news->size < news->head_room ? news->size : news->head_room;
    return news->got <= news->room && read_at_once(fd, at, news->data, news->got) &&
           read_at_once(fd, 0, news->head, news->head_size);
}
