/* System calls that fail for some files, for tests: to be preloaded into a process and its children.

   $CBACKUP_FAULTS names a file, looked at by each call, with a line for each fault:

       CALLS ERRNO SKIP EVERY PATTERN

   of the CALLS (joined by commas: read pread write pwrite fsync syncfs rename link readdir) on paths that match PATTERN (as in
   fnmatch, with which * matches / too) the first SKIP of a process are well, then each EVERY-th one fails. What fails is
   written down in the file of that name with ".log" behind it, a line each. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#define LINES 8

static int faults = -1, told = -1;      /* open from the start: later there may be another root directory */
static long counts[LINES];
static char opened[1024][256];          /* under which names descriptors were opened, for when there is no /proc */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int high(const char *path, int flags)
{
    int low = syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0600), moved;
    if (low < 0)
        return -1;
    moved = fcntl(low, F_DUPFD_CLOEXEC, 500);
    syscall(SYS_close, low);
    return moved;
}

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("CBACKUP_FAULTS");
    char log[PATH_MAX];
    int before = errno;
    if (path) {
        snprintf(log, sizeof log, "%s.log", path);
        faults = high(path, O_RDONLY);
        told = high(log, O_WRONLY | O_CREAT | O_APPEND);
    }
    errno = before;
}

static void path_of(int descriptor, char *path)
{
    char link[64];
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) {
        snprintf(path, PATH_MAX, "%s", descriptor >= 0 && descriptor < 1024 ? opened[descriptor] : "");
        return;
    }
    path[length] = 0;
}

static int named_in(const char *calls, const char *call)
{
    size_t length = strlen(call);
    for (; calls; calls = strchr(calls, ',') ? strchr(calls, ',') + 1 : NULL)
        if (!strncmp(calls, call, length) && (!calls[length] || calls[length] == ','))
            return 1;
    return 0;
}

/* The error with which this call is to fail, or 0. */
static int failure(const char *call, const char *path)
{
    char text[2048], calls[128], pattern[1024], line[PATH_MAX + 64], *at, *next;
    int number = 0, error;
    long skip, every, count;
    ssize_t length = faults < 0 ? 0 : syscall(SYS_pread64, faults, text, sizeof text - 1, (off_t)0);
    if (length <= 0)
        return 0;
    text[length] = 0;
    for (at = text; at && number < LINES; at = next, number++) {
        next = strchr(at, '\n');
        if (next)
            *next++ = 0;
        if (sscanf(at, "%127s %d %ld %ld %1023[^\n]", calls, &error, &skip, &every, pattern) != 5)
            continue;
        if (!named_in(calls, call) || fnmatch(pattern, path, 0))
            continue;
        count = __sync_fetch_and_add(&counts[number], 1);
        if (count < skip || (count - skip) % every)
            continue;
        length = snprintf(line, sizeof line, "%s %s\n", call, path);
        if (told >= 0)
            syscall(SYS_write, told, line, (size_t)length);
        return error;
    }
    return 0;
}

static int file_fails(const char *call, int descriptor)
{
    char path[PATH_MAX];
    int before = errno, error;
    if (faults < 0 || descriptor == faults)
        return 0;
    path_of(descriptor, path);
    error = failure(call, path);
    errno = error ? error : before;
    return error != 0;
}

static int name_fails(const char *call, int directory, const char *name)
{
    char path[PATH_MAX], above[PATH_MAX];
    int before = errno, error;
    if (faults < 0)
        return 0;
    above[0] = 0;
    if (name[0] != '/' && directory != AT_FDCWD)
        path_of(directory, above);
    snprintf(path, sizeof path, "%.2000s%s%.2000s", above, name[0] != '/' && directory != AT_FDCWD ? "/" : "", name);
    error = failure(call, path);
    errno = error ? error : before;
    return error != 0;
}

static int note_opened(int found, int directory, const char *path)
{
    const char *above = path[0] != '/' && directory >= 0 && directory < 1024 ? opened[directory] : "";
    char whole[512];
    if (found >= 0 && found < 1024) {
        snprintf(whole, sizeof whole, "%.250s%s%.250s", above, above[0] ? "/" : "", path);
        snprintf(opened[found], sizeof opened[found], "%.255s", whole);
    }
    return found;
}

#define MODE(flags) \
    mode_t mode; \
    __builtin_va_list list; \
    __builtin_va_start(list, flags); \
    mode = __builtin_va_arg(list, int); \
    __builtin_va_end(list)

#define OPENS(open, openat, fortified, fortifiedat) \
    int open(const char *path, int flags, ...) \
    { MODE(flags); return note_opened(REAL(open)(path, flags, mode), AT_FDCWD, path); } \
    int openat(int directory, const char *path, int flags, ...) \
    { MODE(flags); return note_opened(REAL(openat)(directory, path, flags, mode), directory, path); } \
    int fortified(const char *path, int flags) { return open(path, flags, 0); } \
    int fortifiedat(int directory, const char *path, int flags) { return openat(directory, path, flags, 0); }
OPENS(open, openat, __open_2, __openat_2)
OPENS(open64, openat64, __open64_2, __openat64_2)

#define FILE_CALL(type, name, call, parameters, ...) \
    type name parameters { return file_fails(call, descriptor) ? -1 : REAL(name)(__VA_ARGS__); }

FILE_CALL(ssize_t, read, "read", (int descriptor, void *data, size_t size), descriptor, data, size)
FILE_CALL(ssize_t, pread, "pread", (int descriptor, void *data, size_t size, off_t at), descriptor, data, size, at)
FILE_CALL(ssize_t, pread64, "pread", (int descriptor, void *data, size_t size, off64_t at), descriptor, data, size, at)
FILE_CALL(ssize_t, write, "write", (int descriptor, const void *data, size_t size), descriptor, data, size)
FILE_CALL(ssize_t, pwrite, "pwrite", (int descriptor, const void *data, size_t size, off_t at), descriptor, data, size, at)
FILE_CALL(ssize_t, pwrite64, "pwrite", (int descriptor, const void *data, size_t size, off64_t at), descriptor, data, size, at)
FILE_CALL(int, fsync, "fsync", (int descriptor), descriptor)
FILE_CALL(int, fdatasync, "fsync", (int descriptor), descriptor)
FILE_CALL(int, syncfs, "syncfs", (int descriptor), descriptor)

int rename(const char *old, const char *new)
{
    return name_fails("rename", AT_FDCWD, new) ? -1 : REAL(rename)(old, new);
}

int renameat(int from, const char *old, int to, const char *new)
{
    return name_fails("rename", to, new) ? -1 : REAL(renameat)(from, old, to, new);
}

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    return name_fails("link", to, new) ? -1 : REAL(linkat)(from, old, to, new, flags);
}

struct dirent *readdir(DIR *directory)
{
    return file_fails("readdir", dirfd(directory)) ? NULL : REAL(readdir)(directory);
}

struct dirent64 *readdir64(DIR *directory)
{
    return file_fails("readdir", dirfd(directory)) ? NULL : REAL(readdir64)(directory);
}
