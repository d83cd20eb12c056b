/* The operating system's surface. Where its headers are missing (Android, cross-compiled without the NDK) the few
 * functions are declared here; they use no structure, so there is nothing to get wrong but these lines. All of them are
 * in bionic since Android 5 (arm64). */
#ifndef SPARSEC_PLATFORM_H
#define SPARSEC_PLATFORM_H

#include <stddef.h>
#include <stdint.h>

#if defined(__wasm__) /* no files and no threads: whoever loads the code brings the weights */
#define SPARSEC_NO_FILES
#include <stdlib.h>
#include <string.h>
#elif defined(__ANDROID__) && !__has_include(<pthread.h>)
typedef long pthread_t;
int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *), void *argument);
int pthread_join(pthread_t thread, void **result);
long syscall(long number, ...);
unsigned long getauxval(unsigned long type);
void *malloc(size_t bytes);
void free(void *memory);
void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memset(void *to, int value, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes);
size_t strlen(const char *text);
int strncmp(const char *a, const char *b, size_t bytes);
int open(const char *path, int flags, ...);
int close(int file);
long lseek(int file, long offset, int whence);
void *mmap(void *address, size_t bytes, int protection, int flags, int file, long offset);
int munmap(void *address, size_t bytes);
#define O_RDONLY 0
#define O_CLOEXEC 02000000
#define SEEK_END 2
#define PROT_READ 1
#define MAP_PRIVATE 2
#define MAP_FAILED ((void *)-1)
#if defined(__aarch64__)
#define SYS_futex 98
#elif defined(__x86_64__)
#define SYS_futex 202
#else
#error "no futex number for this architecture"
#endif
#else
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif
#endif

#endif
