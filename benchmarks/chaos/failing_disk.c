/* A disk that fails: loaded before the C library, it has one call, or every call from one on, fail below a folder.
 * Where the error's number is below 0, the process gets that signal at the call instead.
 *
 * Calls that are counted: those that write, flush, make, rename, lengthen or shorten a file. Removing always works.
 * The disk may be slow in place of failing, and the machine's clock may jump.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char root[PATH_MAX];
static int first = -1, error = 0, once = 0, seen = 0, pause_us = 0;
static long begin = -1, jump = 0, looks = 0;

void disk_fails(const char *folder, int call, int number, int only_once)
{
    seen = 0, first = call, error = number, once = only_once;
    strncpy(root, folder, sizeof root - 1);
}

void disk_waits(int microseconds) { pause_us = microseconds; }

int disk_calls(void) { return seen; }

/* Begin at a second of the clock, and jump by some seconds at each look. */
void clock_jumps(long second, long by) { begin = second, jump = by; }

static int fails(const char *path)
{
    if (!root[0] || strncmp(path, root, strlen(root)))
        return 0;
    int call = seen++;
    if (pause_us)
        usleep(pause_us);
    if (first < 0 || (once ? call != first : call < first))
        return 0;
    if (error < 0) {
        kill(getpid(), -error);
        return 0;
    }
    errno = error;
    return 1;
}

static int fails_at(int fd)
{
    char link[64], path[PATH_MAX];
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails(path);
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size)
{
    return fails_at(fd) ? -1 : REAL(ssize_t, write, int, const void *, size_t)(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return fails_at(fd) ? -1 : REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return fails_at(fd) ? -1 : REAL(ssize_t, writev, int, const struct iovec *, int)(fd, parts, count);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file)
{
    return fails_at(fileno(file)) ? 0 : REAL(size_t, fwrite, const void *, size_t, size_t, FILE *)(data, size, count, file);
}

int fsync(int fd) { return fails_at(fd) ? -1 : REAL(int, fsync, int)(fd); }

int ftruncate64(int fd, off64_t size) { return fails_at(fd) ? -1 : REAL(int, ftruncate64, int, off64_t)(fd, size); }

int rename(const char *from, const char *to)
{
    return fails(to) ? -1 : REAL(int, rename, const char *, const char *)(from, to);
}

int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(int, mkdir, const char *, mode_t)(path, mode); }

#define OPEN(name)                                                             \
    int name(const char *path, int flags, ...)                                 \
    {                                                                          \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                          \
        if (flags & O_CREAT && fails(path))                                    \
            return -1;                                                         \
        return REAL(int, name, const char *, int, ...)(path, flags, mode);     \
    }

OPEN(open64)
OPEN(open)

int clock_gettime(clockid_t clock, struct timespec *now)
{
    if (clock != CLOCK_REALTIME || begin < 0)
        return REAL(int, clock_gettime, clockid_t, struct timespec *)(clock, now);
    now->tv_sec = begin + jump * looks++, now->tv_nsec = 0;
    if (now->tv_sec < 0)
        now->tv_sec = 0;
    return 0;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec precise;
    int answer = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return answer;
}

time_t time(time_t *now)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    return now ? *now = precise.tv_sec : precise.tv_sec;
}
