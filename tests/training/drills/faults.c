/* Faults of the file system for tests, laid over libc by LD_PRELOAD:  cc -shared -fPIC -o faults.so faults.c -ldl
 *
 * Every call that changes something below a path containing `match` is an event (a write, a new file, a rename ...).
 * The event number `at` and, for a full disk, all that follow do not happen as they should:
 *   KILL  the process is killed there, in the middle of the write
 *   FULL  the disk has no space: half of a write, then ENOSPC
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL, FULL };
static int mode = OFF;
static long at = 0, events = 0;
static char match[4096];

void faults_arm(int new_mode, const char *new_match, long new_at) {
  strncpy(match, new_match, sizeof match - 1);
  at = new_at;
  events = 0;
  mode = new_mode;
}

long faults_events(void) { return events; }

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

/* Counts an event at `path`; whether it fails. needs_space: on a full disk, deleting and renaming still work. */
static int fails(const char *path, int needs_space) {
  if (!match[0] || !strstr(path, match)) return 0;
  long event = __sync_add_and_fetch(&events, 1);
  if (mode == OFF || event < at) return 0;
  return mode == KILL ? event == at : needs_space;
}

static int fails_below(int directory, const char *path, int needs_space) {
  char link[64], whole[8192];
  if (path[0] == '/') return fails(path, needs_space);
  if (directory == AT_FDCWD) strcpy(link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, whole, 4096);
  if (length < 0) return 0;
  snprintf(whole + length, sizeof whole - length, "/%s", path);
  return fails(whole, needs_space);
}

static int fails_open(int file, int needs_space) {
  char link[64], path[4097];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path, needs_space);
}

static int no_space(void) {
  if (mode == KILL) kill(getpid(), SIGKILL);
  errno = ENOSPC;
  return -1;
}

ssize_t write(int file, const void *data, size_t size) {
  if (fails_open(file, 1)) {
    if (size > 1) {
      ssize_t half = REAL(write)(file, data, size / 2);
      if (mode == FULL) return half;
    }
    return no_space();
  }
  return REAL(write)(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  return fails_open(file, 1) ? no_space() : REAL(writev)(file, parts, count);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
  return fails_open(file, 1) ? no_space() : REAL(pwrite64)(file, data, size, offset);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
  return fails_open(file, 1) ? no_space() : REAL(pwrite)(file, data, size, offset);
}

int fsync(int file) { return fails_open(file, 0) ? no_space() : REAL(fsync)(file); }

int ftruncate64(int file, off64_t size) { return fails_open(file, 1) ? no_space() : REAL(ftruncate64)(file, size); }

int ftruncate(int file, off_t size) { return fails_open(file, 1) ? no_space() : REAL(ftruncate)(file, size); }

#define OPEN(name, before, directory)                                                \
  {                                                                                  \
    mode_t permissions = 0;                                                          \
    if (flags & O_CREAT) {                                                           \
      va_list more;                                                                  \
      va_start(more, flags);                                                         \
      permissions = va_arg(more, mode_t);                                            \
      va_end(more);                                                                  \
      if (fails_below(directory, path, access(path, F_OK) != 0)) return no_space();  \
    }                                                                                \
    return REAL(name) before;                                                        \
  }
int open(const char *path, int flags, ...) OPEN(open, (path, flags, permissions), AT_FDCWD)
int open64(const char *path, int flags, ...) OPEN(open64, (path, flags, permissions), AT_FDCWD)
int openat(int directory, const char *path, int flags, ...)
    OPEN(openat, (directory, path, flags, permissions), directory)
int openat64(int directory, const char *path, int flags, ...)
    OPEN(openat64, (directory, path, flags, permissions), directory)

int mkdir(const char *path, mode_t permissions) {
  return fails_below(AT_FDCWD, path, 1) ? no_space() : REAL(mkdir)(path, permissions);
}

int rename(const char *old, const char *new) {
  return fails_below(AT_FDCWD, new, 0) ? no_space() : REAL(rename)(old, new);
}

int renameat(int from, const char *old, int to, const char *new) {
  return fails_below(to, new, 0) ? no_space() : REAL(renameat)(from, old, to, new);
}

int unlink(const char *path) { return fails_below(AT_FDCWD, path, 0) ? no_space() : REAL(unlink)(path); }

int rmdir(const char *path) { return fails_below(AT_FDCWD, path, 0) ? no_space() : REAL(rmdir)(path); }

int unlinkat(int directory, const char *path, int flags) {
  return fails_below(directory, path, 0) ? no_space() : REAL(unlinkat)(directory, path, flags);
}
