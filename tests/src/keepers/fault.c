/* Loaded into a keeper before everything else (LD_PRELOAD): lets the test that started it decide how the world behaves.
 * CARILLON_FAULT names a file of the form of `struct control`, mapped by both. Faults are counted on files below
 * CARILLON_FAULT_DIR whose path contains `part`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, RENAME = 3, UNLINK = 4, CREATE = 5 };
enum { KILL_BEFORE = 1, KILL_AFTER = 2, KILL_HALF = 3, FAIL_EIO = 4, SLOW = 5, PANIC = 6 };

struct control {
    int64_t clock_offset_s; /* added to the time of day */
    int64_t countdown;      /* the fault strikes when this many calls have been counted */
    int64_t struck;         /* how often it did */
    int64_t call;           /* which calls are counted */
    int64_t how;
    char part[64];
};

static volatile struct control *control;
static char directory[4096];
/* The next look at the clock fails in this thread, for which Rust knows nothing but to panic. */
static __thread int clock_fails;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CARILLON_FAULT"), *dir = getenv("CARILLON_FAULT_DIR");
    if (!path || !dir) return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED) return;
    snprintf(directory, sizeof directory, "%s", dir);
    control = map;
}

#define NEXT(name)                                              \
    ({                                                          \
        static __typeof__(&name) next;                          \
        if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
        next;                                                   \
    })

static int counts(const char *path) {
    return strncmp(path, directory, strlen(directory)) == 0 && strstr(path, (const char *)control->part);
}

static int is_armed(int call) { return control && control->how && control->call == call; }

/* 0, or what is to happen to this call. */
static int strikes(void) {
    int64_t left = __atomic_sub_fetch(&control->countdown, 1, __ATOMIC_SEQ_CST);
    /* A disk that fails goes on failing. */
    int strike = left == 0 || (left < 0 && control->how == FAIL_EIO) || (left < 0 && control->how == SLOW);
    if (!strike) return 0;
    __atomic_add_fetch(&control->struck, 1, __ATOMIC_SEQ_CST);
    if (control->how == KILL_BEFORE) kill(getpid(), SIGKILL), pause();
    if (control->how == SLOW) usleep(300000);
    return (int)control->how;
}

static int on_file(int call, int fd) {
    if (!is_armed(call)) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return counts(path) ? strikes() : 0;
}

static int on_path(int call, const char *path) { return is_armed(call) && counts(path) ? strikes() : 0; }

static void after(int how) {
    if (how == KILL_AFTER) kill(getpid(), SIGKILL), pause();
}

ssize_t write(int fd, const void *data, size_t size) {
    int how = on_file(WRITE, fd);
    if (how == FAIL_EIO) return errno = EIO, -1;
    if (how == KILL_HALF) size = size / 2;
    ssize_t n = NEXT(write)(fd, data, size);
    if (how == KILL_HALF) after(KILL_AFTER);
    after(how);
    return n;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    int how = on_file(WRITE, fd);
    if (how == FAIL_EIO) return errno = EIO, -1;
    if (how == KILL_HALF && count > 0) {
        NEXT(write)(fd, parts[0].iov_base, parts[0].iov_len / 2);
        after(KILL_AFTER);
    }
    ssize_t n = NEXT(writev)(fd, parts, count);
    after(how);
    return n;
}

static int sync_with(int (*real)(int), int fd) {
    int how = on_file(SYNC, fd);
    if (how == FAIL_EIO) return errno = EIO, -1;
    int n = real(fd);
    after(how);
    return n;
}
int fsync(int fd) { return sync_with(NEXT(fsync), fd); }
int fdatasync(int fd) { return sync_with(NEXT(fdatasync), fd); }

int rename(const char *from, const char *to) {
    int how = on_path(RENAME, to);
    int n = NEXT(rename)(from, to);
    after(how);
    return n;
}

int unlink(const char *path) {
    int how = on_path(UNLINK, path);
    int n = NEXT(unlink)(path);
    after(how);
    return n;
}

int open64(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    int how = flags & O_CREAT ? on_path(CREATE, path) : 0;
    int fd = NEXT(open64)(path, flags, mode);
    if (how == PANIC) clock_fails = 1;
    after(how);
    return fd;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    if (clock_fails && clock == CLOCK_MONOTONIC) {
        clock_fails = 0;
        return errno = EINVAL, -1;
    }
    int n = NEXT(clock_gettime)(clock, time);
    if (n == 0 && control && clock == CLOCK_REALTIME) time->tv_sec += control->clock_offset_s;
    return n;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    int n = NEXT(gettimeofday)(time, zone);
    if (n == 0 && control) time->tv_sec += control->clock_offset_s;
    return n;
}
