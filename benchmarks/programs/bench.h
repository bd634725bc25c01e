/* The benchmark's programs: each row is a function that does a fixed amount of work and returns a check of its result. */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

struct row {
    const char *name;
    uint64_t (*work)(void);
};

uint64_t alu(void), calls(void), copy(void), chase(void), sort(void), rmw(void), crc(void), matrix(void), sieve(void);
uint64_t run_sha256sum(void), run_gzip(void), run_shell(void), run_python3(void), run_openssl(void);
uint64_t sse2_double(void), avx2(void), x87(void), sse2_integer(void);
uint64_t syscalls(void), faults(void), forks(void), pipes(void), switches(void);

/* A step of xorshift64 (Marsaglia 2003): numbers that are the same everywhere. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

/* FNV-1a over bytes; start with FNV_START. */
#define FNV_START 0xcbf29ce484222325u
static inline uint64_t fnv(uint64_t hash, const void *data, size_t size)
{
    const uint8_t *p = data;
    while (size--)
        hash = (hash ^ *p++) * 0x100000001b3u;
    return hash;
}

void die(const char *what);

/* Where the packages are unpacked: "" in the guest, a directory on the host. */
extern const char *root;

#endif
