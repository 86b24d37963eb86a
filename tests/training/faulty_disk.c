// A disk that fails when it is told to, for LD_PRELOAD: operations on files below one folder are counted, and one of
// them, or all from there on, fail with an errno and without effect. All from some operation on is what a kill leaves
// on the disk. `faulty_disk.py` is the way to it.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_FILES 4096

static char folder[4096];            // what is watched; empty: nothing
static char failed[8192];            // the operation that failed first
static char watched[MOST_FILES];     // open files below the folder
static volatile int operations, first, last, number;

void disk_watch(const char *path, int from, int to, int error) {
  operations = 0, first = from, last = to, number = error, failed[0] = 0;
  snprintf(folder, sizeof folder, "%s", path);
}

int disk_operations(void) { return operations; }

const char *disk_failed(void) { return failed; }

static int is_watched(int file) { return file >= 0 && file < MOST_FILES && watched[file]; }

static int is_below(int directory, const char *path) {
  if (!folder[0] || !path) return 0;
  return path[0] == '/' ? !strncmp(path, folder, strlen(folder)) : is_watched(directory);
}

static int fails(int concerns, const char *name, const char *path) {
  if (!concerns || !folder[0]) return 0;
  int operation = __sync_add_and_fetch(&operations, 1);
  if (operation < first || operation > last) return 0;
  if (operation == first) snprintf(failed, sizeof failed, "%s %s", name, path ? path : "");
  errno = number;
  return 1;
}

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

// The next function of this name, found once.
#define NEXT(type, name, ...)                            \
  static type (*next)(__VA_ARGS__);                      \
  if (!next) next = (type (*)(__VA_ARGS__))real(#name);

static int opened(int file, int concerns) {
  if (file >= 0 && file < MOST_FILES) watched[file] = concerns;
  return file;
}

#define OPENAT(name)                                                            \
  int name(int directory, const char *path, int flags, ...) {                   \
    NEXT(int, name, int, const char *, int, ...)                                \
    va_list list;                                                               \
    va_start(list, flags);                                                      \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;     \
    va_end(list);                                                               \
    int concerns = is_below(directory, path);                                   \
    if (fails(concerns, "open", path)) return -1;                               \
    return opened(next(directory, path, flags, mode), concerns);                \
  }
OPENAT(openat)
OPENAT(openat64)

#define OPEN(name)                                                              \
  int name(const char *path, int flags, ...) {                                  \
    NEXT(int, name, const char *, int, ...)                                     \
    va_list list;                                                               \
    va_start(list, flags);                                                      \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;     \
    va_end(list);                                                               \
    int concerns = is_below(-1, path);                                          \
    if (fails(concerns, "open", path)) return -1;                               \
    return opened(next(path, flags, mode), concerns);                           \
  }
OPEN(open)
OPEN(open64)

int close(int file) {
  NEXT(int, close, int)
  int concerns = is_watched(file);
  opened(file, 0);
  int result = next(file);  // closed all the same, as Linux does
  return fails(concerns, "close", 0) ? -1 : result;
}

// Functions of a path, of a directory and a path, and of an open file.
#define OF_PATH(type, bad, name, parameters, arguments)             \
  type name parameters {                                            \
    static type(*next) parameters;                                  \
    if (!next) next = (type(*) parameters)real(#name);              \
    if (fails(is_below(-1, path), #name, path)) return bad;         \
    return next arguments;                                          \
  }
OF_PATH(int, -1, stat, (const char *path, struct stat *s), (path, s))
OF_PATH(int, -1, stat64, (const char *path, struct stat64 *s), (path, s))
OF_PATH(int, -1, lstat, (const char *path, struct stat *s), (path, s))
OF_PATH(int, -1, lstat64, (const char *path, struct stat64 *s), (path, s))
OF_PATH(int, -1, access, (const char *path, int mode), (path, mode))
OF_PATH(int, -1, mkdir, (const char *path, mode_t mode), (path, mode))
OF_PATH(int, -1, rmdir, (const char *path), (path))
OF_PATH(int, -1, unlink, (const char *path), (path))
OF_PATH(int, -1, chmod, (const char *path, mode_t mode), (path, mode))
OF_PATH(int, -1, rename, (const char *path, const char *to), (path, to))
OF_PATH(DIR *, NULL, opendir, (const char *path), (path))

#define OF_DIRECTORY(name, parameters, arguments)                   \
  int name parameters {                                             \
    static int(*next) parameters;                                   \
    if (!next) next = (int (*) parameters)real(#name);              \
    if (fails(is_below(directory, path), #name, path)) return -1;   \
    return next arguments;                                          \
  }
OF_DIRECTORY(fstatat, (int directory, const char *path, struct stat *s, int flags), (directory, path, s, flags))
OF_DIRECTORY(fstatat64, (int directory, const char *path, struct stat64 *s, int flags), (directory, path, s, flags))
OF_DIRECTORY(mkdirat, (int directory, const char *path, mode_t mode), (directory, path, mode))
OF_DIRECTORY(unlinkat, (int directory, const char *path, int flags), (directory, path, flags))
OF_DIRECTORY(renameat, (int directory, const char *path, int to, const char *name), (directory, path, to, name))

#define OF_FILE(type, name, parameters, arguments)                  \
  type name parameters {                                            \
    static type(*next) parameters;                                  \
    if (!next) next = (type(*) parameters)real(#name);              \
    if (fails(is_watched(file), #name, 0)) return -1;               \
    return next arguments;                                          \
  }
OF_FILE(int, fstat, (int file, struct stat *s), (file, s))
OF_FILE(int, fstat64, (int file, struct stat64 *s), (file, s))
OF_FILE(int, fsync, (int file), (file))
OF_FILE(int, fdatasync, (int file), (file))
OF_FILE(int, flock, (int file, int operation), (file, operation))
OF_FILE(int, ftruncate, (int file, off_t length), (file, length))
OF_FILE(int, ftruncate64, (int file, off64_t length), (file, length))
OF_FILE(int, fchmod, (int file, mode_t mode), (file, mode))
OF_FILE(ssize_t, read, (int file, void *buffer, size_t size), (file, buffer, size))
OF_FILE(ssize_t, write, (int file, const void *buffer, size_t size), (file, buffer, size))
OF_FILE(ssize_t, pread, (int file, void *buffer, size_t size, off_t at), (file, buffer, size, at))
OF_FILE(ssize_t, pwrite, (int file, const void *buffer, size_t size, off_t at), (file, buffer, size, at))
OF_FILE(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count))
