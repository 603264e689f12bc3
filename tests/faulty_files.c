/* Preloaded into a process: the call number `at` that changes a file below `root` fails, or ends the process.
 *
 * Everything that writes goes through the C library: Python, Arrow, safetensors. Nothing happens before
 * fault_arm(). Kinds: 0 count only, 1 killed before the call, 2 killed in it (half of a write is done, all of
 * the others), any other number is an errno.
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
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static char name[64];
static long at = -1, calls = 0;
static int kind = 0;

void fault_arm(const char *where, long number, int what) {
    strncpy(root, where, sizeof root - 1);
    at = number, kind = what, calls = 0;
}
long fault_calls(void) { return calls; }
const char *fault_name(void) { return name; }

static void die(void) { kill(getpid(), SIGKILL); }

static int below(const char *path) { return root[0] && path && strncmp(path, root, strlen(root)) == 0; }

static int ours(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* 0: go on, 1: fail, 2: do it, or half of it, and die. */
static int due(const char *what) {
    if (calls++ != at) return 0;
    strncpy(name, what, sizeof name - 1);
    if (kind == 1) die();
    if (kind > 2) errno = kind;
    return kind == 0 ? 0 : kind == 2 ? 2 : 1;
}

#define REAL(type, symbol, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, symbol);

#define CALL(mine, what, half, whole) \
    if (!(mine)) return whole; \
    switch (due(what)) { \
    case 1: return -1; \
    case 2: half; die(); \
    } \
    return whole;

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t)
    CALL(ours(fd), "write", (void)!real(fd, data, n / 2), real(fd, data, n))
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t to) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t)
    CALL(ours(fd), "pwrite", (void)!real(fd, data, n / 2, to), real(fd, data, n, to))
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t to) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)
    CALL(ours(fd), "pwrite", (void)!real(fd, data, n / 2, to), real(fd, data, n, to))
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int)
    CALL(ours(fd), "writev", (void)!real(fd, parts, n / 2), real(fd, parts, n))
}
ssize_t sendfile(int to, int from, off_t *start, size_t n) {
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t)
    CALL(ours(to), "sendfile", (void)!real(to, from, start, n / 2), real(to, from, start, n))
}
ssize_t sendfile64(int to, int from, off64_t *start, size_t n) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t)
    CALL(ours(to), "sendfile", (void)!real(to, from, start, n / 2), real(to, from, start, n))
}
int fsync(int fd) {
    REAL(int, "fsync", int)
    CALL(ours(fd), "fsync", (void)!real(fd), real(fd))
}
int fdatasync(int fd) {
    REAL(int, "fdatasync", int)
    CALL(ours(fd), "fdatasync", (void)!real(fd), real(fd))
}
int ftruncate(int fd, off_t n) {
    REAL(int, "ftruncate", int, off_t)
    CALL(ours(fd), "ftruncate", (void)!real(fd, n), real(fd, n))
}
int ftruncate64(int fd, off64_t n) {
    REAL(int, "ftruncate64", int, off64_t)
    CALL(ours(fd), "ftruncate", (void)!real(fd, n), real(fd, n))
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *)
    CALL(below(from) || below(to), "rename", (void)!real(from, to), real(from, to))
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *)
    CALL(below(path), "unlink", (void)!real(path), real(path))
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t)
    CALL(below(path), "mkdir", (void)!real(path, mode), real(path, mode))
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) {
    MODE REAL(int, "open", const char *, int, ...)
    CALL((flags & O_CREAT) && below(path), "open", (void)!real(path, flags, mode), real(path, flags, mode))
}
int open64(const char *path, int flags, ...) {
    MODE REAL(int, "open64", const char *, int, ...)
    CALL((flags & O_CREAT) && below(path), "open", (void)!real(path, flags, mode), real(path, flags, mode))
}
