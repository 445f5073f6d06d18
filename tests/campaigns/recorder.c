/* Records what a process does to the files under a folder, in the order in which it does it, for tests/campaigns/powerloss.py.
 *
 *     cc -shared -fPIC -O2 -o recorder.so recorder.c -ldl -lpthread
 *     RECORDER_ROOT=/tmp/out RECORDER_LOG=/tmp/log LD_PRELOAD=./recorder.so command
 *
 * A record is its head, two paths and the bytes written. Writes into mapped memory and the flushes of C's own FILE are not seen, and
 * calls past the C library only in part: whoever reads the records compares what they lead to with what lies on the disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct head {
    uint32_t kind, first, second, unused;
    uint64_t offset, length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *root;
static size_t root_length;
static int log_file = -1;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("RECORDER_LOG");
    root = getenv("RECORDER_ROOT");
    if (!path || !root) return;
    root_length = strlen(root);
    log_file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

/* The next definition of a function: the system's own. */
#define REAL(result, name, ...)                             \
    static result (*real)(__VA_ARGS__);                     \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

static int ours(const char *path) {
    return log_file >= 0 && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void record(char kind, const char *first, const char *second, uint64_t offset, const void *data, uint64_t length) {
    struct head head = {kind, strlen(first), strlen(second), 0, offset, length};
    struct iovec parts[] = {
        {&head, sizeof head}, {(void *)first, head.first}, {(void *)second, head.second}, {(void *)data, data ? length : 0}};
    if (!data) head.length = 0;
    if (syscall(SYS_writev, log_file, parts, 4) < 0) abort();
}

/* The name that an open file has now; 0 if it is none of ours. */
static int name_of(int file, char *name) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, name, PATH_MAX - 1);
    if (length < 0) return 0;
    name[length] = 0;
    return ours(name);
}

/* The absolute name of a path that need not be there, its folder's links followed. */
static int name_at(int folder, const char *path, char *name) {
    char whole[2 * PATH_MAX], parent[PATH_MAX];
    if (log_file < 0) return 0;
    if (path[0] == '/') snprintf(whole, sizeof whole, "%s", path);
    else if (folder == AT_FDCWD) {
        if (!getcwd(parent, sizeof parent)) return 0;
        snprintf(whole, sizeof whole, "%s/%s", parent, path);
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, parent, sizeof parent - 1);
        if (length < 0) return 0;
        parent[length] = 0;
        snprintf(whole, sizeof whole, "%s/%s", parent, path);
    }
    for (size_t end = strlen(whole); end > 1 && whole[end - 1] == '/'; end--) whole[end - 1] = 0;
    char *last = strrchr(whole, '/');
    *last = 0;
    if (!realpath(*whole ? whole : "/", parent)) return 0;
    snprintf(name, PATH_MAX, "%s/%s", parent, last + 1);
    return ours(name);
}

static int is_there(int folder, const char *path) {
    struct stat found;
    int kept = errno, there = !fstatat(folder, path, &found, 0);
    errno = kept;
    return there;
}

/* Files whose making was seen, by number, and the names that they had. Some libraries (Rust's rustix) call the system past the C
 * library: what they made is recorded, as one write, when something else is first done to it, and what they renamed as well. */
static struct {
    ino_t number;
    char *name;
} seen[1 << 16];
static int seen_count;

static void note(const char *name) {
    struct stat found;
    if (seen_count == sizeof seen / sizeof *seen || stat(name, &found)) return;
    seen[seen_count].number = found.st_ino;
    seen[seen_count++].name = strdup(name);
}

static void make_known(const char *name) {
    struct stat found;
    if (stat(name, &found) || !S_ISREG(found.st_mode)) return;
    for (int i = seen_count - 1; i >= 0; i--)
        if (seen[i].number == found.st_ino) {
            if (strcmp(seen[i].name, name) && access(seen[i].name, F_OK)) {
                record('R', seen[i].name, name, 0, NULL, 0);
                seen[i].name = strdup(name);
            }
            return;
        }
    int file = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC);
    char *data = malloc(found.st_size + 1);
    ssize_t size = pread(file, data, found.st_size, 0);
    syscall(SYS_close, file);
    record('C', name, "", 0, NULL, 0);
    if (size > 0) record('W', name, "", 0, data, size);
    free(data);
    note(name);
}

static void opened(int file, int flags, int there) {
    char name[PATH_MAX];
    int kept = errno;
    if (file >= 0 && (flags & (O_CREAT | O_TRUNC)) && name_of(file, name)) {
        if (!there) {
            record('C', name, "", 0, NULL, 0);
            note(name);
        }
        else if (flags & O_TRUNC) record('T', name, "", 0, NULL, 0);
    }
    errno = kept;
}

#define OPEN(name, folder, real_call, ...)                                      \
    int name(__VA_ARGS__, int flags, ...) {                                     \
        mode_t mode = 0;                                                        \
        if (flags & (O_CREAT | O_TMPFILE)) {                                    \
            va_list rest;                                                       \
            va_start(rest, flags);                                              \
            mode = va_arg(rest, mode_t);                                        \
            va_end(rest);                                                       \
        }                                                                       \
        pthread_mutex_lock(&lock);                                              \
        int there = (flags & O_CREAT) ? is_there(folder, path) : 1;             \
        int file = real_call;                                                   \
        opened(file, flags, there);                                             \
        pthread_mutex_unlock(&lock);                                            \
        return file;                                                            \
    }
#define SYSTEM_OPEN(folder) syscall(SYS_openat, folder, path, flags, mode)
OPEN(open, AT_FDCWD, SYSTEM_OPEN(AT_FDCWD), const char *path)
OPEN(open64, AT_FDCWD, SYSTEM_OPEN(AT_FDCWD), const char *path)
OPEN(openat, folder, SYSTEM_OPEN(folder), int folder, const char *path)
OPEN(openat64, folder, SYSTEM_OPEN(folder), int folder, const char *path)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPEN(name)                                                             \
    FILE *name(const char *path, const char *mode) {                            \
        REAL(FILE *, name, const char *, const char *);                         \
        pthread_mutex_lock(&lock);                                              \
        int there = is_there(AT_FDCWD, path);                                   \
        FILE *file = real(path, mode);                                          \
        if (file && mode[0] != 'r')                                             \
            opened(fileno(file), O_CREAT | (mode[0] == 'w' ? O_TRUNC : 0), there); \
        pthread_mutex_unlock(&lock);                                            \
        return file;                                                            \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* Where the next write of an open file goes. */
static off_t position_of(int file) {
    struct stat found;
    int flags = fcntl(file, F_GETFL);
    if (flags >= 0 && (flags & O_APPEND) && !fstat(file, &found)) return found.st_size;
    return lseek(file, 0, SEEK_CUR);
}

static ssize_t written(int file, const struct iovec *parts, int count, off_t at, int has_position) {
    char name[PATH_MAX];
    int kept = errno;
    pthread_mutex_lock(&lock);
    int tracked = log_file >= 0 && name_of(file, name);
    if (tracked && !has_position) at = position_of(file);
    errno = kept;
    ssize_t done = has_position ? syscall(SYS_pwritev, file, parts, count, at, 0) : syscall(SYS_writev, file, parts, count);
    kept = errno;
    if (tracked && done > 0) {
        char *all = malloc(done), *end = all;
        for (int i = 0; i < count && end < all + done; i++) {
            size_t size = parts[i].iov_len, left = all + done - end;
            memcpy(end, parts[i].iov_base, size < left ? size : left);
            end += size < left ? size : left;
        }
        record('W', name, "", at, all, done);
        free(all);
    }
    pthread_mutex_unlock(&lock);
    errno = kept;
    return done;
}

ssize_t write(int file, const void *data, size_t size) {
    struct iovec part = {(void *)data, size};
    return written(file, &part, 1, 0, 0);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    struct iovec part = {(void *)data, size};
    return written(file, &part, 1, at, 1);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) { return pwrite(file, data, size, at); }
ssize_t writev(int file, const struct iovec *parts, int count) { return written(file, parts, count, 0, 0); }
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) { return written(file, parts, count, at, 1); }
ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t at) { return written(file, parts, count, at, 1); }

/* Copies within the system: done by hand, so that the bytes are seen. */
static ssize_t copied(int from, off_t *at, int to, off_t *to_at, size_t size) {
    size_t most = size < (1 << 20) ? size : (1 << 20);
    char *data = malloc(most);
    ssize_t got = at ? pread(from, data, most, *at) : read(from, data, most);
    ssize_t done = got <= 0 ? got : to_at ? pwrite(to, data, got, *to_at) : write(to, data, got);
    if (done > 0 && at) *at += done;
    if (done > 0 && to_at) *to_at += done;
    free(data);
    return done;
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) { return copied(from, at, to, NULL, size); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) { return copied(from, at, to, NULL, size); }
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t size, unsigned flags) {
    return copied(from, at, to, to_at, size);
}

#define RECORDED(kind, name, arguments, call, naming, first, second, offset)    \
    int name arguments {                                                        \
        char one[PATH_MAX] = "", two[PATH_MAX] = "";                            \
        pthread_mutex_lock(&lock);                                              \
        int tracked = naming;                                                   \
        if (tracked && (kind == 'S' || kind == 'T' || kind == 'R')) make_known(one); \
        int result = call, kept = errno;                                        \
        if (!result && tracked) record(kind, first, second, offset, NULL, 0);   \
        pthread_mutex_unlock(&lock);                                            \
        errno = kept;                                                           \
        return result;                                                          \
    }
#define OF_FILE (log_file >= 0 && name_of(file, one))
#define HERE(path) name_at(AT_FDCWD, path, one)
/* Both, whether the first is one of ours or not. */
#define BOTH(a, from, b, to) (name_at(a, from, one) | name_at(b, to, two))

RECORDED('S', fsync, (int file), syscall(SYS_fsync, file), OF_FILE, one, two, 0)
RECORDED('S', fdatasync, (int file), syscall(SYS_fdatasync, file), OF_FILE, one, two, 0)
RECORDED('T', ftruncate, (int file, off_t size), syscall(SYS_ftruncate, file, size), OF_FILE, one, two, size)
RECORDED('T', ftruncate64, (int file, off64_t size), syscall(SYS_ftruncate, file, size), OF_FILE, one, two, size)
RECORDED('T', truncate, (const char *path, off_t size), syscall(SYS_truncate, path, size), HERE(path), one, two, size)
RECORDED('T', truncate64, (const char *path, off64_t size), syscall(SYS_truncate, path, size), HERE(path), one, two, size)
RECORDED('U', unlink, (const char *path), syscall(SYS_unlinkat, AT_FDCWD, path, 0), HERE(path), one, two, 0)
RECORDED('U', rmdir, (const char *path), syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR), HERE(path), one, two, 0)
RECORDED('U', unlinkat, (int at, const char *path, int flags), syscall(SYS_unlinkat, at, path, flags), name_at(at, path, one),
         one, two, 0)
RECORDED('M', mkdir, (const char *path, mode_t mode), syscall(SYS_mkdirat, AT_FDCWD, path, mode), HERE(path), one, two, 0)
RECORDED('M', mkdirat, (int at, const char *path, mode_t mode), syscall(SYS_mkdirat, at, path, mode), name_at(at, path, one),
         one, two, 0)
RECORDED('R', rename, (const char *from, const char *to), syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0),
         BOTH(AT_FDCWD, from, AT_FDCWD, to), one, two, 0)
RECORDED('R', renameat, (int a, const char *from, int b, const char *to), syscall(SYS_renameat2, a, from, b, to, 0),
         BOTH(a, from, b, to), one, two, 0)
RECORDED('R', renameat2, (int a, const char *from, int b, const char *to, unsigned flags),
         syscall(SYS_renameat2, a, from, b, to, flags), BOTH(a, from, b, to), one, two, flags)
RECORDED('L', link, (const char *from, const char *to), syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0),
         BOTH(AT_FDCWD, from, AT_FDCWD, to), one, two, 0)
RECORDED('L', symlink, (const char *from, const char *to), syscall(SYS_symlinkat, from, AT_FDCWD, to),
         name_at(AT_FDCWD, to, two), one, two, 0)
