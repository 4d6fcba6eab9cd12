/* LD_PRELOAD: calls that would write a checkpoint fail with the errno that stands in the file named by FAILING_DISK. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int failure(void) {
    const char *path = getenv("FAILING_DISK");
    FILE *file = path ? fopen(path, "r") : NULL;
    int number = 0;
    if (file) {
        if (fscanf(file, "%d", &number) != 1) number = 0;
        fclose(file);
    }
    return number;
}

static int is_checkpoint(const char *path) { return path && strstr(path, ".pt.") && strstr(path, ".tmp"); }

static int descriptor_fails(int descriptor) {
    char link[64], target[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    return is_checkpoint(target) ? failure() : 0;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    int number = size > 512 ? descriptor_fails(descriptor) : 0;
    if (number && number != EROFS) { errno = number; return -1; }
    return real(descriptor, data, size);
}

int open64(const char *path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    if (!real) real = dlsym(RTLD_NEXT, "open64");
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    if ((flags & O_CREAT) && is_checkpoint(path) && failure() == EROFS) { errno = EROFS; return -1; }
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    return open64(path, flags, mode);
}
