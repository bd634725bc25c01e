/* Integer rows: what compiled programs spend their time on. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

/* Arithmetic in registers: xoshiro256** (Blackman and Vigna 2018) into sums of 128 bits, minima and signs. */
uint64_t alu(void)
{
    uint64_t a = 1, b = 2, c = 3, d = 4, least = ~0ull, negative = 0;
    unsigned __int128 sum = 0;
    for (uint64_t i = 0; i < 12000000; i++) {
        uint64_t x = b * 5, t = b << 17;
        x = (x << 7 | x >> 57) * 9;
        c ^= a;
        d ^= b;
        b ^= c;
        a ^= d;
        c ^= t;
        d = d << 45 | d >> 19;
        sum += (unsigned __int128)x << (i & 31);
        least = x < least ? x : least;
        negative += (int64_t)x < 0;
    }
    return (uint64_t)sum ^ (uint64_t)(sum >> 64) ^ least ^ negative;
}

/* Calls and returns: Fibonacci as nobody should. The attributes keep the compiler from unrolling the recursion. */
__attribute__((noinline, noclone, optimize("no-optimize-sibling-calls", "no-inline"))) static uint64_t fibonacci(uint64_t n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

uint64_t calls(void)
{
    return fibonacci(33);
}

#define COPY_SIZE (256 << 10)
static uint64_t from[COPY_SIZE / 8], to[COPY_SIZE / 8];

/* Memory copy, both ways that lmbench has: by the C library, sizes from 32 bytes to 32 KiB, and by hand in words. */
__attribute__((optimize("no-tree-loop-distribute-patterns", "no-tree-vectorize"))) uint64_t copy(void)
{
    uint64_t state = 88172645463325252u, sum = 0;
    for (size_t i = 0; i < COPY_SIZE / 8; i++)
        from[i] = next_random(&state);
    memset(to, 0, sizeof to);
    for (int i = 0; i < 60000; i++) {
        size_t size = (size_t)32 << (next_random(&state) & 7) << (state >> 8 & 3);
        size_t at = (state >> 16) % (COPY_SIZE - (32 << 10));
        memcpy((char *)to + at, (char *)from + (COPY_SIZE - (32 << 10) - at), size);
        sum += to[at / 8];
    }
    for (int n = 0; n < 1200; n++) {
        for (size_t i = 0; i < COPY_SIZE / 8; i++)
            to[i] = from[i];
        sum += to[n];
        from[n] ^= sum;
    }
    return sum;
}

/* Pointer chase: a random cycle (Sattolo 1986) through 4 MiB, a cache line a step. */
#define NODES 65536
struct node {
    struct node *next;
    uint64_t value, rest[6];
};
static struct node nodes[NODES];

uint64_t chase(void)
{
    uint64_t state = 88172645463325252u, sum = 0;
    static uint32_t order[NODES];
    for (uint32_t i = 0; i < NODES; i++)
        order[i] = i;
    for (uint32_t i = NODES - 1; i > 0; i--) {
        uint32_t j = next_random(&state) % i, t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (uint32_t i = 0; i < NODES; i++) {
        nodes[order[i]].next = &nodes[order[(i + 1) % NODES]];
        nodes[i].value = next_random(&state);
    }
    const struct node *p = nodes;
    for (int i = 0; i < 2000000; i++) {
        sum += p->value;
        p = p->next;
    }
    return sum;
}

#define SORTED 300000
static int64_t numbers[SORTED];

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The C library's sort. */
uint64_t sort(void)
{
    uint64_t state = 88172645463325252u;
    for (int i = 0; i < SORTED; i++)
        numbers[i] = next_random(&state);
    qsort(numbers, SORTED, sizeof *numbers, compare);
    return fnv(FNV_START, numbers, 8 * 1000) ^ numbers[SORTED / 2];
}

#define CELLS 8192
static uint64_t cells[CELLS];

/* Read-modify-write: add, xor and increment with a memory destination, in order and scattered. */
uint64_t rmw(void)
{
    memset(cells, 0, sizeof cells);
    for (uint64_t n = 0; n < 5000; n++) {
        for (uint64_t i = 0; i < CELLS; i += 4) {
            __asm__ volatile("addq %1, %0" : "+m"(cells[i]) : "r"(n) : "cc");
            __asm__ volatile("xorq %1, %0" : "+m"(cells[i + 1]) : "r"(i) : "cc");
            __asm__ volatile("incl %0" : "+m"(cells[i * 5 & (CELLS - 1)])::"cc");
        }
    }
    return fnv(FNV_START, cells, sizeof cells);
}

static uint8_t bytes[4 << 20];

/* CRC-32 (ISO 3309) by table, a byte a step. */
uint64_t crc(void)
{
    uint32_t table[256], c = ~0u;
    uint64_t state = 88172645463325252u;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int k = 0; k < 8; k++)
            table[i] = table[i] & 1 ? 0xEDB88320u ^ table[i] >> 1 : table[i] >> 1;
    }
    for (size_t i = 0; i < sizeof bytes; i += 8) {
        uint64_t word = next_random(&state);
        memcpy(bytes + i, &word, 8);
    }
    for (int n = 0; n < 5; n++)
        for (size_t i = 0; i < sizeof bytes; i++)
            c = table[(c ^ bytes[i]) & 255] ^ c >> 8;
    return ~c;
}

#define ORDER 200
static int a[ORDER][ORDER], b[ORDER][ORDER], product[ORDER][ORDER];

/* The product of two matrices of integers, row by column. */
uint64_t matrix(void)
{
    uint64_t sum = 0;
    for (int n = 0; n < 10; n++) {
        for (int i = 0; i < ORDER * ORDER; i++) {
            (&a[0][0])[i] = i + n;
            (&b[0][0])[i] = i ^ 5;
        }
        for (int i = 0; i < ORDER; i++)
            for (int j = 0; j < ORDER; j++) {
                int s = 0;
                for (int k = 0; k < ORDER; k++)
                    s += a[i][k] * b[k][j];
                product[i][j] = s;
            }
        sum += fnv(FNV_START, product[n], sizeof product[n]);
    }
    return sum;
}

static uint8_t composite[2000000];

/* Eratosthenes up to two million, three times. */
uint64_t sieve(void)
{
    uint64_t primes = 0;
    for (int n = 0; n < 3; n++) {
        memset(composite, 0, sizeof composite);
        for (size_t i = 2; i < sizeof composite; i++) {
            if (composite[i])
                continue;
            primes += i;
            for (size_t j = 2 * i; j < sizeof composite; j += i)
                composite[j] = 1;
        }
    }
    return primes;
}
