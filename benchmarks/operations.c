/* Calls back before every operation that changes a file or folder below one place: for benchmarks/operations.py.

   cc -shared -fPIC -O1 -o operations.so operations.c -ldl; then LD_PRELOAD=operations.so python ...
   The callback returns 0, or the errno with which the operation fails instead of being done. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int (*callback)(const char *name, const char *path);
static char place[4096];
static __thread int inside;

void watch_operations(int (*called)(const char *, const char *), const char *below) {
    snprintf(place, sizeof place, "%s", below);
    callback = called;
}

static int failing(const char *name, const char *path) {
    int code;
    if (!callback || inside || strncmp(path, place, strlen(place))) return 0;
    inside = 1;
    code = callback(name, path);
    inside = 0;
    if (code) errno = code;
    return code;
}

static int failing_at(const char *name, int folder, const char *path) {
    char link[64], full[8192];
    ssize_t length;
    if (!callback || inside) return 0;
    if (path && (path[0] == '/' || folder == AT_FDCWD)) return failing(name, path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, full, 4096);
    if (length < 0) return 0;
    snprintf(full + length, sizeof full - length, "%s%s", path ? "/" : "", path ? path : "");
    return failing(name, full);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, parameters, arguments, check) \
    type name parameters { return check ? -1 : REAL(name) arguments; }

WRAP(ssize_t, write, (int f, const void *b, size_t n), (f, b, n), failing_at("write", f, 0))
WRAP(ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o), failing_at("write", f, 0))
WRAP(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), failing_at("write", f, 0))
WRAP(ssize_t, writev, (int f, const struct iovec *v, int n), (f, v, n), failing_at("write", f, 0))
WRAP(ssize_t, sendfile, (int f, int g, off_t *o, size_t n), (f, g, o, n), failing_at("write", f, 0))
WRAP(ssize_t, sendfile64, (int f, int g, off64_t *o, size_t n), (f, g, o, n), failing_at("write", f, 0))
WRAP(ssize_t, copy_file_range, (int f, off64_t *o, int g, off64_t *p, size_t n, unsigned w), (f, o, g, p, n, w),
     failing_at("write", g, 0))
WRAP(int, ftruncate, (int f, off_t n), (f, n), failing_at("truncate", f, 0))
WRAP(int, ftruncate64, (int f, off64_t n), (f, n), failing_at("truncate", f, 0))
WRAP(int, fsync, (int f), (f), failing_at("fsync", f, 0))
WRAP(int, fdatasync, (int f), (f), failing_at("fsync", f, 0))
WRAP(int, mkdir, (const char *p, mode_t m), (p, m), failing("mkdir", p))
WRAP(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), failing_at("mkdir", d, p))
WRAP(int, rename, (const char *p, const char *q), (p, q), failing("rename", p))
WRAP(int, renameat, (int d, const char *p, int e, const char *q), (d, p, e, q), failing_at("rename", d, p))
WRAP(int, unlink, (const char *p), (p), failing("remove", p))
WRAP(int, unlinkat, (int d, const char *p, int w), (d, p, w), failing_at("remove", d, p))
WRAP(int, rmdir, (const char *p), (p), failing("remove", p))

#define WRITES(flags) (((flags)&O_ACCMODE) != O_RDONLY || (flags)&O_CREAT)
#define OPEN(name, parameters, arguments, folder)                       \
    int name parameters {                                               \
        va_list list;                                                   \
        mode_t mode;                                                    \
        va_start(list, flags);                                          \
        mode = va_arg(list, mode_t);                                    \
        va_end(list);                                                   \
        if (WRITES(flags) && failing_at("open", folder, p)) return -1;  \
        return REAL(name) arguments;                                    \
    }
OPEN(open, (const char *p, int flags, ...), (p, flags, mode), AT_FDCWD)
OPEN(open64, (const char *p, int flags, ...), (p, flags, mode), AT_FDCWD)
OPEN(openat, (int d, const char *p, int flags, ...), (d, p, flags, mode), d)
OPEN(openat64, (int d, const char *p, int flags, ...), (d, p, flags, mode), d)
