/* bench ROW COUNT: do the row's work COUNT times and print of each, as soon as it is done,
 *     BENCH row number elapsed-ns cpu-ns clock-ns check
 * Between two of them it waits for a line on its standard input, so that whoever measures from outside knows where one
 * ends and the next begins. The same program runs in both guests and on the host. Its work directory is the current one; BENCH_ROOT says where
 * Debian's programs are. Ends with status 3 where the CPU lacks what the row needs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

static const struct row rows[] = {
    {"alu", alu}, {"calls", calls}, {"copy", copy}, {"chase", chase}, {"sort", sort}, {"rmw", rmw}, {"crc", crc},
    {"matrix", matrix}, {"sieve", sieve}, {"sha256sum", run_sha256sum}, {"gzip", run_gzip}, {"shell", run_shell},
    {"python3", run_python3},
    {"sse2-double", sse2_double}, {"avx2", avx2}, {"x87", x87}, {"sse2-integer", sse2_integer},
    {"openssl", run_openssl},
    {"syscalls", syscalls}, {"faults", faults}, {"forks", forks}, {"pipes", pipes}, {"switches", switches},
};

const char *root = "";

void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

/* CPU time of this process and the children that have ended. */
static uint64_t cpu(void)
{
    static const int whose[] = {RUSAGE_SELF, RUSAGE_CHILDREN};
    uint64_t sum = 0;
    for (int i = 0; i < 2; i++) {
        struct rusage use;
        getrusage(whose[i], &use);
        sum += (uint64_t)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000000u;
        sum += use.ru_utime.tv_usec + use.ru_stime.tv_usec;
    }
    return sum * 1000;
}

static void wait_for_line(void)
{
    for (char c = 0; c != '\n' && read(0, &c, 1) == 1;)
        ;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: bench ROW COUNT\n");
        return 2;
    }
    if (getenv("BENCH_ROOT"))
        root = getenv("BENCH_ROOT");
    if (!strcmp(argv[1], "avx2") && !__builtin_cpu_supports("avx2"))
        return 3;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (strcmp(argv[1], rows[i].name))
            continue;
        for (int n = 0, count = atoi(argv[2]); n < count; n++) {
            uint64_t used = cpu(), start = now();
            uint64_t check = rows[i].work();
            uint64_t elapsed = now() - start;
            used = cpu() - used;
            printf("BENCH %s %d %lu %lu %lu %016lx\n", argv[1], n, elapsed, used, now(), check);
            fflush(stdout);
            if (n + 1 < count)
                wait_for_line();
        }
        return 0;
    }
    fprintf(stderr, "bench: no row %s\n", argv[1]);
    return 2;
}
