/* System rows: what the kernel does for a program. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

/* System calls that do next to nothing. */
uint64_t syscalls(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 300000; i++)
        sum += syscall(SYS_getppid) > 0;
    return sum;
}

/* Page faults: the first touch of anonymous memory, 1 MiB at a time, and its return. */
uint64_t faults(void)
{
    uint64_t touched = 0;
    for (int i = 0; i < 60; i++) {
        const size_t size = 1 << 20;
        char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            die("mmap");
        madvise(memory, size, MADV_NOHUGEPAGE);
        for (size_t at = 0; at < size; at += 4096) {
            memory[at] = 1;
            touched++;
        }
        munmap(memory, size);
    }
    return touched;
}

static void wait_for(pid_t child)
{
    int status;
    if (waitpid(child, &status, 0) != child || status)
        die("a child failed");
}

/* Forks: a child that ends at once, and its parent waiting for it. */
uint64_t forks(void)
{
    uint64_t done = 0;
    for (int i = 0; i < 400; i++) {
        pid_t child = fork();
        if (child < 0)
            die("fork");
        if (child == 0)
            _exit(0);
        wait_for(child);
        done++;
    }
    return done;
}

/* Pipes: one process writes and reads, 512 bytes at a time. */
uint64_t pipes(void)
{
    char buffer[512] = {1};
    uint64_t sum = 0;
    int ends[2];
    if (pipe(ends))
        die("pipe");
    for (int i = 0; i < 80000; i++) {
        buffer[i & 511]++;
        if (write(ends[1], buffer, sizeof buffer) != sizeof buffer)
            die("write");
        if (read(ends[0], buffer, sizeof buffer) != sizeof buffer)
            die("read");
        sum += buffer[i * 7 & 511];
    }
    close(ends[0]);
    close(ends[1]);
    return sum;
}

/* Everything of this process, and of its children, on the CPU where it is now; `before` is what was allowed. */
static void pin(cpu_set_t *before)
{
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    if (sched_getaffinity(0, sizeof *before, before) || sched_setaffinity(0, sizeof here, &here))
        die("affinity");
}

/* Context switches: a byte goes to and fro between two processes on one CPU. */
uint64_t switches(void)
{
    int there[2], back[2];
    char byte = 0;
    uint64_t turns = 0;
    cpu_set_t before;
    pin(&before);
    if (pipe(there) || pipe(back))
        die("pipe");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    for (int i = 0; i < 6000; i++) {
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            die("switch");
        turns++;
    }
    close(there[1]);
    close(back[0]);
    wait_for(child);
    sched_setaffinity(0, sizeof before, &before);
    return turns;
}
