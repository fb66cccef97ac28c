/*
 * Start a program. The child shares our memory until its exec, so it runs only what is here: system calls on what was
 * made before. Signals are blocked meanwhile, as a handler of ours would write to that memory.
 */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ABOVE_STANDARD = 3, NAMES_SIZE = 4096 };

/* What the kernel lists of a folder; glibc has no header for it. */
struct entry { uint64_t inode; int64_t next; uint16_t size; uint8_t type; char name[]; };

_Noreturn static void fail(struct spawn_fault *fault, int stage)
{
    fault->number = errno;
    fault->stage = stage;
    _exit(127);
}

/* Every signal as a new process has it: also those that we ignore, and the two that glibc keeps to itself. */
static void reset_signals(void)
{
    const uint64_t fresh[8] = {0}; /* a struct sigaction of the kernel, SIG_DFL, whatever the order of its fields */
    for (int number = 1; number <= 64; number++)
        syscall(SYS_rt_sigaction, number, fresh, NULL, sizeof(uint64_t));
}

/* -1: at its end. A number that another of the three will take must be out of the way first. */
static int out_of_the_way(int fd)
{
    if (fd < 0)
        fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    return fd >= 0 && fd < ABOVE_STANDARD ? fcntl(fd, F_DUPFD_CLOEXEC, ABOVE_STANDARD) : fd;
}

static int take_standard(const struct spawn *spawn)
{
    int given[ABOVE_STANDARD] = {spawn->in, spawn->out, spawn->err};
    for (int fd = 0; fd < ABOVE_STANDARD; fd++)
        given[fd] = out_of_the_way(given[fd]);
    for (int fd = 0; fd < ABOVE_STANDARD; fd++)
        if (given[fd] < 0 || dup2(given[fd], fd) < 0)
            return -1;
    return 0;
}

/*
 * Only what it is given gets through exec, also of what somebody opened for children of his own. By their names:
 * close_range can only do it from Linux 5.11 on.
 */
static int keep_only(const struct spawn *spawn)
{
    _Alignas(struct entry) char names[NAMES_SIZE];
    int folder = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0)
        return -1;
    long size;
    while ((size = syscall(SYS_getdents64, folder, names, sizeof names)) > 0)
        for (long at = 0; at < size; at += ((const struct entry *)(const void *)(names + at))->size) {
            const char *name = ((const struct entry *)(const void *)(names + at))->name;
            int fd = 0;
            for (; *name >= '0' && *name <= '9'; name++)
                fd = 10 * fd + *name - '0';
            if (fd >= ABOVE_STANDARD)
                fcntl(fd, F_SETFD, FD_CLOEXEC);
        }
    if (size < 0)
        return -1;
    for (int i = 0; i < spawn->kept_count; i++)
        if (fcntl(spawn->kept[i], F_SETFD, 0) < 0)
            return -1;
    return 0;
}

static int enter_cwd(const struct spawn *spawn)
{
    if (spawn->makes_cwd) {
        if (mkdir(spawn->cwd, 0700) < 0)
            return -1;
        if (spawn->is_other_user && chown(spawn->cwd, spawn->uid, spawn->gid) < 0)
            return -1;
    }
    return chdir(spawn->cwd);
}

/* The calls of the kernel: those of glibc would tell all threads of this process to do the same. */
static int become_user(const struct spawn *spawn)
{
#ifdef SYS_setgroups32
    const long groups = SYS_setgroups32, gid = SYS_setresgid32, uid = SYS_setresuid32;
#else
    const long groups = SYS_setgroups, gid = SYS_setresgid, uid = SYS_setresuid;
#endif
    if (syscall(groups, (size_t)spawn->group_count, spawn->groups) < 0)
        return -1;
    if (syscall(gid, spawn->gid, spawn->gid, spawn->gid) < 0)
        return -1;
    return (int)syscall(uid, spawn->uid, spawn->uid, spawn->uid);
}

static int limit(const struct spawn *spawn)
{
    for (int i = 0; i < spawn->ceiling_count; i++) {
        const struct ceiling *ceiling = &spawn->ceilings[i];
        struct rlimit pair = {(rlim_t)ceiling->soft, (rlim_t)ceiling->hard};
        if (setrlimit(ceiling->which, &pair) < 0)
            return -1;
    }
    return 0;
}

/* Two wishes: a service may not be allowed to set them. */
static void be_lesser(const struct spawn *spawn)
{
    if (spawn->oom_score_adj) {
        int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
        if (fd >= 0) {
            ssize_t ignored = write(fd, spawn->oom_score_adj, strlen(spawn->oom_score_adj));
            (void)ignored;
            close(fd);
        }
    }
    if (spawn->nice) {
        int ignored = nice(spawn->nice);
        (void)ignored;
    }
}

__attribute__((noinline)) _Noreturn static void become(const struct spawn *spawn, struct spawn_fault *fault)
{
    int found = 0;
    setsid();
    reset_signals();
    if (take_standard(spawn) < 0)
        fail(fault, SPAWN_DESCRIPTORS);
    if (enter_cwd(spawn) < 0)
        fail(fault, SPAWN_CWD);
    if (spawn->procs >= 0 && write(spawn->procs, "0", 1) < 0)
        fail(fault, SPAWN_CGROUP);
    be_lesser(spawn);
    if (spawn->cpus && sched_setaffinity(0, spawn->cpus_size, (const cpu_set_t *)(const void *)spawn->cpus) < 0)
        fail(fault, SPAWN_AFFINITY);
    if (spawn->is_other_user && become_user(spawn) < 0)
        fail(fault, SPAWN_USER);
    if (keep_only(spawn) < 0)
        fail(fault, SPAWN_DESCRIPTORS);
    if (limit(spawn) < 0)
        fail(fault, SPAWN_LIMITS);
    sigset_t none;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
    for (char *const *path = spawn->paths; *path; path++) {
        execve(*path, spawn->argv, spawn->env);
        if (errno != ENOENT && errno != ENOTDIR && !found)
            found = errno; /* it is there, but cannot be run: that tells more than that it is not in the last folder */
    }
    errno = found ? found : errno;
    fail(fault, SPAWN_EXEC);
}

/* With memory of its own, but we wait as for the other: another user's process shall not have ours for a moment. */
static pid_t fork_and_wait(void)
{
    return (pid_t)syscall(SYS_clone, (unsigned long)(CLONE_VFORK | SIGCHLD), 0UL, 0UL, 0UL, 0UL);
}

int spawn_program(const struct spawn *spawn, struct spawn_fault *fault)
{
    sigset_t all, before;
    struct spawn_fault *told = mmap(NULL, sizeof *told, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (told == MAP_FAILED) {
        *fault = (struct spawn_fault){SPAWN_FORK, errno};
        return -1;
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t pid = spawn->is_other_user ? fork_and_wait() : vfork();
    if (pid == 0)
        become(spawn, told);
    if (pid < 0)
        *told = (struct spawn_fault){SPAWN_FORK, errno};
    else if (told->number)
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    *fault = *told;
    munmap(told, sizeof *told);
    return fault->number ? -1 : (int)pid;
}
