/* Disturb the writes of a process below one folder: LD_PRELOAD this library, then call fault_arm.
 *
 * It stands between a program and the C library, so that it also sees writers outside Python (safetensors in Rust,
 * FAISS and Arrow in C++). Every open for writing, write, sync, rename, mkdir, unlink and truncate of a path below the
 * folder is an event. Events are counted in memory that children share, and each is a line of the log.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, ENOSPC_FROM, EIO_ONCE };
enum { OTHER, GROWS }; /* a full disk refuses only what grows */

static char root[PATH_MAX];
static size_t root_length;
static long at;
static int kind, log_fd = -1, armed;
static long *count;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static void raw_write(int fd, const char *text, size_t size) { syscall(SYS_write, fd, text, size); }

/* Events from now on are those below `folder`; the fault of `how` comes at event `when`. */
void fault_arm(const char *folder, long when, int how, const char *log)
{
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    at = when;
    kind = how;
    if (!count) count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    *count = 0;
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = 1;
}

static void die(void)
{
    kill(0, SIGKILL); /* the whole group: workers too */
    for (;;) pause();
}

static int below(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static const char *of_fd(int fd, char *buffer)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, buffer, PATH_MAX - 1);
    buffer[size < 0 ? 0 : size] = 0;
    return buffer;
}

static const char *of_path(int dir, const char *path, char *buffer)
{
    if (!path || path[0] == '/') return path ? path : "";
    char folder[PATH_MAX];
    if (dir == AT_FDCWD) {
        if (!getcwd(folder, sizeof folder)) folder[0] = 0;
    } else {
        of_fd(dir, folder);
    }
    if (strlen(folder) + strlen(path) + 2 > PATH_MAX) return "";
    strcpy(buffer, folder);
    strcat(buffer, "/");
    strcat(buffer, path);
    return buffer;
}

/* 0: go on; an errno: fail with it; -1: do half of the work, then die */
static int event(const char *name, const char *path, int grows)
{
    if (!armed || !below(path)) return 0;
    long number = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    char line[PATH_MAX + 64];
    int hit = (kind == ENOSPC_FROM ? number >= at && grows == GROWS : number == at) && kind != COUNT;
    int size = snprintf(line, sizeof line, "%s%s %d %s\n", hit ? "!" : "", name, grows, path + root_length);
    raw_write(log_fd, line, (size_t)size);
    if (!hit) return 0;
    if (kind == KILL) die();
    if (kind == TORN) return -1;
    return kind == ENOSPC_FROM ? ENOSPC : EIO;
}

static int fails(int fault)
{
    if (fault < 0) die();
    if (fault > 0) errno = fault;
    return fault != 0;
}

#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define OPEN(function, parameters, dir, call) \
    int function parameters \
    { \
        mode_t mode = 0; \
        va_list rest; \
        va_start(rest, flags); \
        if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(rest, mode_t); \
        va_end(rest); \
        char buffer[PATH_MAX]; \
        if (armed && (flags & WRITES) && \
            fails(event("open", of_path(dir, path, buffer), flags & O_CREAT ? GROWS : OTHER))) \
            return -1; \
        return call; \
    }
static int real_open(int dir, const char *path, int flags, mode_t mode)
{
    return (int)syscall(SYS_openat, dir, path, flags, mode);
}
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, real_open(AT_FDCWD, path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, real_open(AT_FDCWD, path, flags, mode))
OPEN(openat, (int dir, const char *path, int flags, ...), dir, real_open(dir, path, flags, mode))
OPEN(openat64, (int dir, const char *path, int flags, ...), dir, real_open(dir, path, flags, mode))
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPEN(function) \
    FILE *function(const char *path, const char *mode) \
    { \
        REAL(FILE *, #function, const char *, const char *); \
        char buffer[PATH_MAX]; \
        if (armed && strpbrk(mode, "wa+") && fails(event("open", of_path(AT_FDCWD, path, buffer), GROWS))) \
            return NULL; \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!armed) return real(fd, data, size);
    char buffer[PATH_MAX];
    int fault = event("write", of_fd(fd, buffer), GROWS);
    if (fault < 0) {
        raw_write(fd, data, size / 2);
        die();
    }
    return fails(fault) ? -1 : real(fd, data, size);
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *file)
{
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *);
    if (!armed) return real(data, size, number, file);
    char buffer[PATH_MAX];
    int fault = event("write", of_fd(fileno(file), buffer), GROWS);
    if (fault < 0) {
        real(data, 1, size * number / 2, file);
        fflush(file);
        die();
    }
    return fails(fault) ? 0 : real(data, size, number, file);
}

int fclose(FILE *file)
{
    REAL(int, "fclose", FILE *);
    if (!armed) return real(file);
    int fd = fileno(file), flags = fd < 0 ? 0 : fcntl(fd, F_GETFL);
    char buffer[PATH_MAX];
    int fault = fd >= 0 && (flags & O_ACCMODE) != O_RDONLY ? event("close", of_fd(fd, buffer), GROWS) : 0;
    if (fault < 0) die();
    int result = real(file);
    return fails(fault) ? EOF : result;
}

#define ON_FD(type, function, name, grows, parameters, types, ...) \
    type function parameters \
    { \
        REAL(type, #function, types); \
        char buffer[PATH_MAX]; \
        return armed && fails(event(name, of_fd(fd, buffer), grows)) ? -1 : real(__VA_ARGS__); \
    }
#define TYPES(...) __VA_ARGS__
ON_FD(ssize_t, pwrite, "write", GROWS, (int fd, const void *data, size_t size, off_t where),
      TYPES(int, const void *, size_t, off_t), fd, data, size, where)
ON_FD(ssize_t, pwrite64, "write", GROWS, (int fd, const void *data, size_t size, off64_t where),
      TYPES(int, const void *, size_t, off64_t), fd, data, size, where)
ON_FD(ssize_t, writev, "write", GROWS, (int fd, const struct iovec *parts, int number),
      TYPES(int, const struct iovec *, int), fd, parts, number)
ON_FD(ssize_t, sendfile, "write", GROWS, (int fd, int from, off_t *offset, size_t size),
      TYPES(int, int, off_t *, size_t), fd, from, offset, size)
ON_FD(ssize_t, sendfile64, "write", GROWS, (int fd, int from, off64_t *offset, size_t size),
      TYPES(int, int, off64_t *, size_t), fd, from, offset, size)
ON_FD(int, fsync, "sync", OTHER, (int fd), TYPES(int), fd)
ON_FD(int, fdatasync, "sync", OTHER, (int fd), TYPES(int), fd)
ON_FD(int, ftruncate, "truncate", GROWS, (int fd, off_t size), TYPES(int, off_t), fd, size)
ON_FD(int, ftruncate64, "truncate", GROWS, (int fd, off64_t size), TYPES(int, off64_t), fd, size)
ON_FD(int, posix_fallocate, "truncate", GROWS, (int fd, off_t from, off_t size), TYPES(int, off_t, off_t), fd, from, size)

#define ON_PATH(function, name, grows, dir, path, parameters, types, ...) \
    int function parameters \
    { \
        REAL(int, #function, types); \
        char buffer[PATH_MAX]; \
        return armed && fails(event(name, of_path(dir, path, buffer), grows)) ? -1 : real(__VA_ARGS__); \
    }
ON_PATH(rename, "rename", OTHER, AT_FDCWD, new, (const char *old, const char *new), TYPES(const char *, const char *),
        old, new)
ON_PATH(renameat, "rename", OTHER, to, new, (int from, const char *old, int to, const char *new),
        TYPES(int, const char *, int, const char *), from, old, to, new)
ON_PATH(renameat2, "rename", OTHER, to, new, (int from, const char *old, int to, const char *new, unsigned int flags),
        TYPES(int, const char *, int, const char *, unsigned int), from, old, to, new, flags)
ON_PATH(link, "link", GROWS, AT_FDCWD, new, (const char *old, const char *new), TYPES(const char *, const char *), old,
        new)
ON_PATH(linkat, "link", GROWS, to, new, (int from, const char *old, int to, const char *new, int flags),
        TYPES(int, const char *, int, const char *, int), from, old, to, new, flags)
ON_PATH(symlink, "link", GROWS, AT_FDCWD, new, (const char *old, const char *new), TYPES(const char *, const char *),
        old, new)
ON_PATH(mkdir, "mkdir", GROWS, AT_FDCWD, path, (const char *path, mode_t mode), TYPES(const char *, mode_t), path, mode)
ON_PATH(mkdirat, "mkdir", GROWS, dir, path, (int dir, const char *path, mode_t mode),
        TYPES(int, const char *, mode_t), dir, path, mode)
ON_PATH(rmdir, "unlink", OTHER, AT_FDCWD, path, (const char *path), TYPES(const char *), path)
ON_PATH(unlink, "unlink", OTHER, AT_FDCWD, path, (const char *path), TYPES(const char *), path)
ON_PATH(unlinkat, "unlink", OTHER, dir, path, (int dir, const char *path, int flags), TYPES(int, const char *, int),
        dir, path, flags)
ON_PATH(remove, "unlink", OTHER, AT_FDCWD, path, (const char *path), TYPES(const char *), path)
ON_PATH(truncate, "truncate", GROWS, AT_FDCWD, path, (const char *path, off_t size), TYPES(const char *, off_t), path,
        size)
