/* Threads that get in each other's way by everything that processors share, and notice when something goes wrong:

       stress THREADS SECONDS

   Each thread does random jobs; every now and then all meet at a barrier, where exact sums are checked. The last line is
   "DONE ..." with how often each job was done; before that, any line that begins with "WRONG" or "STUCK" is a finding.
   SIGTERM ends it earlier. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { MOST = 64, PAGE = 4096, JOBS_BETWEEN_BARRIERS = 24, PATIENCE = 240, ADDS = 60, PINGS = 16 };

struct worker {
    unsigned index;
    pid_t tid;
    uint64_t random;
    uint64_t added;            /* to each of the sums */
    uint64_t split;            /* to the sum on two pages */
    const char *volatile doing;
};

static struct worker workers[MOST];
static unsigned threads, cpus;
static volatile time_t end;
static atomic_ulong epochs;
static _Atomic int over;

static void say(const char *kind, const char *format, va_list arguments)
{
    char line[300];
    int n = snprintf(line, sizeof line, "%s ", kind);
    n += vsnprintf(line + n, sizeof line - n - 1, format, arguments);
    line[n++] = '\n';
    if (write(1, line, n) != n)
        _exit(4);
}

__attribute__((noreturn, format(printf, 1, 2))) static void wrong(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say("WRONG", format, arguments);
    _exit(1);
}

static void need(int good, const char *what)
{
    if (!good)
        wrong("%s: %s", what, strerror(errno));
}

static uint64_t next(struct worker *me)
{
    uint64_t x = me->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return me->random = x;
}

static struct worker *another(struct worker *me)
{
    return &workers[(me->index + 1 + next(me) % (threads > 1 ? threads - 1 : 1)) % threads];
}

static void *map(size_t size, int protection)
{
    void *p = mmap(0, size, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(p != MAP_FAILED, "mmap");
    return p;
}

/* Futexes: a lock of three states (Drepper, "Futexes are tricky", mutex 2), words that two threads hand to and fro, and
   the barrier. */

static long futex(_Atomic int *word, int operation, int value)
{
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, 0, 0, 0);
}

struct lock {
    _Atomic int word;
    uint64_t inside;           /* changed by its holder only, in two halves */
    uint64_t also;
} __attribute__((aligned(64)));

static struct lock locks[3];

static void take(struct lock *lock)
{
    int seen = 0;
    if (atomic_compare_exchange_strong(&lock->word, &seen, 1))
        return;
    if (seen != 2)
        seen = atomic_exchange(&lock->word, 2);
    while (seen) {
        futex(&lock->word, FUTEX_WAIT, 2);
        seen = atomic_exchange(&lock->word, 2);
    }
}

static void give(struct lock *lock)
{
    if (atomic_fetch_sub(&lock->word, 1) != 1) {
        atomic_store(&lock->word, 0);
        futex(&lock->word, FUTEX_WAKE, 1);
    }
}

static void job_futex(struct worker *me)
{
    for (int i = 0; i < 8; i++) {
        struct lock *lock = &locks[next(me) % 3];
        take(lock);
        if (lock->inside != lock->also)
            wrong("two threads are inside a lock: %lu %lu", lock->inside, lock->also);
        lock->inside++;
        if (i == 0)
            sched_yield();
        lock->also++;
        give(lock);
    }
}

static _Atomic int balls[MOST];

static void ping_pong(struct worker *me)
{
    unsigned mine = me->index & 1;
    if ((me->index | 1) >= threads)
        return;
    _Atomic int *ball = &balls[me->index & ~1u];
    for (int i = 0; i < PINGS; i++) {
        int now;
        while (((now = atomic_load(ball)) & 1) != (int)mine)
            futex(ball, FUTEX_WAIT, now);
        atomic_store(ball, now + 1);
        futex(ball, FUTEX_WAKE, 1);
    }
}

static _Atomic int arrived, generation;

static void check_sums(void);

static void barrier(struct worker *me)
{
    int now = atomic_load(&generation);
    me->doing = "barrier";
    if (atomic_fetch_add(&arrived, 1) == (int)threads - 1) {
        check_sums();
        atomic_fetch_add(&epochs, 1);
        if (time(0) >= end)
            atomic_store(&over, 1);
        atomic_store(&arrived, 0);
        atomic_fetch_add(&generation, 1);
        futex(&generation, FUTEX_WAKE, MOST);
    } else
        while (atomic_load(&generation) == now)
            futex(&generation, FUTEX_WAIT, now);
}

/* Atomic instructions. Each of the sums is added to by another one. */

static struct {
    uint64_t add, xadd, cmpxchg, spin, padding[4];
    unsigned __int128 wide;
    _Atomic int bits;
} sums __attribute__((aligned(64)));

static uint8_t *code_page;     /* writable code, with a sum among it */
static uint64_t *two_pages;    /* a sum on two pages */

static void job_atomics(struct worker *me)
{
    uint64_t *beside = (uint64_t *)(code_page + 64);
    for (int i = 0; i < ADDS; i++) {
        __asm__ volatile("lock incq %0" : "+m"(sums.add) : : "memory", "cc");
        uint64_t one = 1;
        __asm__ volatile("lock xaddq %1, %0" : "+m"(sums.xadd), "+r"(one) : : "memory", "cc");
        uint64_t old = *(volatile uint64_t *)&sums.cmpxchg;
        while (!__atomic_compare_exchange_n(&sums.cmpxchg, &old, old + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            ;
        uint64_t low = 0, high = 0;
        uint8_t done;
        do {
            uint64_t new_low = low + 1, new_high = high + 3;
            __asm__ volatile("lock cmpxchg16b %0; sete %3"
                             : "+m"(sums.wide), "+a"(low), "+d"(high), "=q"(done)
                             : "b"(new_low), "c"(new_high) : "memory", "cc");
        } while (!done);
        if (high != 3 * low)
            wrong("cmpxchg16b read halves of two values: %lx %lx", low, high);
        uint8_t was;
        for (unsigned spins = 0;; spins++) {
            __asm__ volatile("lock btsl $5, %0; setc %1" : "+m"(sums.bits), "=q"(was) : : "memory", "cc");
            if (!was)
                break;
            __asm__ volatile("pause");
            if (spins % 1000 == 999)
                sched_yield();
        }
        sums.spin++;
        __asm__ volatile("lock btrl $5, %0" : "+m"(sums.bits) : : "memory", "cc");
        __asm__ volatile("lock incq %0" : "+m"(*beside) : : "memory", "cc");
        me->added++;
    }
    __asm__ volatile("lock incq %0" : "+m"(*two_pages) : : "memory", "cc"); /* dear on many hosts */
    me->split++;
}

static atomic_ulong sent, received;

static void check_sums(void)
{
    uint64_t added = 0, split = 0;
    for (unsigned i = 0; i < threads; i++) {
        added += workers[i].added;
        split += workers[i].split;
    }
    uint64_t beside = *(volatile uint64_t *)(code_page + 64);
    if (sums.add != added || sums.xadd != added || sums.cmpxchg != added || sums.spin != added || beside != added
        || (uint64_t)sums.wide != added || *two_pages != split)
        wrong("sums: add %lu xadd %lu cmpxchg %lu spin %lu beside code %lu 16 bytes %lu, not %lu; two pages %lu, not %lu",
              sums.add, sums.xadd, sums.cmpxchg, sums.spin, beside, (uint64_t)sums.wide, added, *two_pages, split);
    for (time_t begin = time(0); atomic_load(&received) != atomic_load(&sent); sched_yield())
        if (time(0) - begin > 60)
            wrong("%lu signals were sent, %lu came", atomic_load(&sent), atomic_load(&received));
}

/* Signals that are queued, each of which must come. */

static void on_signal(int number)
{
    (void)number;
    atomic_fetch_add(&received, 1);
}

static void on_end(int number)
{
    (void)number;
    end = 0;
}

static void job_signals(struct worker *me)
{
    for (int i = 0; i < 3; i++) {
        siginfo_t info = {.si_signo = SIGRTMIN + 1, .si_code = SI_QUEUE};
        atomic_fetch_add(&sent, 1);
        if (syscall(SYS_rt_tgsigqueueinfo, getpid(), another(me)->tid, SIGRTMIN + 1, &info)) {
            atomic_fetch_sub(&sent, 1);
            need(errno == EAGAIN, "rt_tgsigqueueinfo"); /* too many under way */
        }
    }
}

/* Page tables that others use: each thread has a page, whose first word says which state it is the page of. */

struct tried { uint64_t value, failed; };
struct tried try_load(const volatile uint64_t *), try_store(volatile uint64_t *);
extern char load_at[], store_at[], tried_in_vain[];
__asm__("try_load: xor %edx, %edx\nload_at: mov (%rdi), %rax\nret\n"
        "try_store: xor %edx, %edx\nstore_at: movl $1, (%rdi)\nret\n"
        "tried_in_vain: mov $1, %edx\nret");

static void on_fault(int number, siginfo_t *info, void *context)
{
    greg_t *rip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    if (*rip != (greg_t)load_at && *rip != (greg_t)store_at)
        wrong("signal %d at %llx, address %p", number, *rip, info->si_addr);
    *rip = (greg_t)tried_in_vain;
}

static struct shown {
    _Atomic uint64_t state;    /* odd while it changes; a multiple of 4 while it may be written to */
    volatile uint64_t *page;
} shown[MOST];

static void job_change_mapping(struct worker *me)
{
    struct shown *mine = &shown[me->index];
    volatile uint64_t *page = mine->page;
    uint64_t state = atomic_load(&mine->state);
    atomic_store(&mine->state, state + 1);
    switch (next(me) % 4) {
    case 0:
        need(mmap((void *)page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page,
             "mmap");
        break;
    case 1:
        need(mremap(map(PAGE, PROT_READ | PROT_WRITE), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page) == page, "mremap");
        break;
    case 2:
        need(!mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE), "mprotect");
        need(!madvise((void *)page, PAGE, MADV_DONTNEED), "madvise");
        break;
    default:
        need(!mprotect((void *)page, PAGE, PROT_NONE), "mprotect");
        if (!try_load(page).failed || !try_store(page).failed)
            wrong("a page without rights was reached");
        need(!mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE), "mprotect");
    }
    *page = state + 2;
    if ((state + 2) % 4)
        need(!mprotect((void *)page, PAGE, PROT_READ), "mprotect");
    atomic_store(&mine->state, state + 2);
}

static void job_look_at_mappings(struct worker *me)
{
    for (int i = 0; i < 12; i++) {
        struct shown *one = &shown[next(me) % threads];
        uint64_t before = atomic_load(&one->state);
        if (before & 1)
            continue;
        struct tried read = try_load(one->page);
        struct tried written = try_store(one->page + 8 + me->index);
        if (atomic_load(&one->state) != before)
            continue;
        if (read.failed || read.value != before)
            wrong("page in state %lu: read %lu, failed %lu", before, read.value, read.failed);
        if (written.failed != (before % 4 != 0))
            wrong("page in state %lu: storing failed %lu", before, written.failed);
    }
}

/* Code that changes: one's own by all three ways of writing it, and others' as debuggers and kernels do it. */

static void write_function(uint8_t *at, uint32_t value)
{
    at[0] = 0xb8; /* mov eax, value; ret */
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static uint32_t call(uint8_t *at)
{
    return ((uint32_t (*)(void))at)();
}

static uint8_t *own_code[MOST];

static void job_own_code(struct worker *me)
{
    uint8_t *code = own_code[me->index];
    uint32_t value = next(me);
    switch (next(me) % 3) {
    case 0: /* a compiler that never has code writable and executable */
        need(!mprotect(code, PAGE, PROT_READ | PROT_WRITE), "mprotect");
        for (int i = 0; i < 8; i++)
            write_function(code + 16 * i, value + i);
        need(!mprotect(code, PAGE, PROT_READ | PROT_EXEC), "mprotect");
        for (int i = 0; i < 8; i++)
            if (call(code + 16 * i) != value + i)
                wrong("new code on a page that was writable is not run");
        break;
    case 1: /* in place */
        need(!mprotect(code, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC), "mprotect");
        for (int i = 0; i < 6; i++) {
            write_function(code, value + i);
            if (call(code) != value + i)
                wrong("code that was overwritten is run");
        }
        break;
    default: /* on another frame */
        need(mmap(code, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == code,
             "mmap");
        write_function(code + 16, value);
        if (call(code + 16) != value)
            wrong("code on a page that is gone is run");
    }
}

static struct patched {
    uint8_t *code;
    _Atomic uint32_t version;
    _Atomic int busy;
} patched[8];

static void synchronize(void)
{
    need(!syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0), "membarrier");
}

static void on_trap(int number, siginfo_t *info, void *context)
{
    greg_t *rip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    (void)info;
    for (int i = 0; i < 8; i++)
        if (*rip == (greg_t)patched[i].code + 1) {
            --*rip; /* again, until the instruction is there */
            usleep(1000);
            return;
        }
    wrong("signal %d at %llx", number, *rip);
}

static void job_patch(struct worker *me)
{
    struct patched *one = &patched[next(me) % 8];
    if (atomic_exchange(&one->busy, 1))
        return;
    uint32_t version = atomic_load(&one->version) + 1;
    volatile uint8_t *at = one->code;
    at[0] = 0xcc;
    synchronize();
    for (int i = 0; i < 4; i++)
        at[1 + i] = version >> 8 * i;
    synchronize();
    at[0] = 0xb8;
    synchronize();
    atomic_store(&one->version, version);
    atomic_store(&one->busy, 0);
}

static void job_run_patched(struct worker *me)
{
    for (int i = 0; i < 40; i++) {
        struct patched *one = &patched[next(me) % 8];
        uint32_t before = atomic_load(&one->version);
        uint32_t got = call(one->code);
        uint32_t after = atomic_load(&one->version);
        if (got - before > after + 1 - before)
            wrong("patched code of version %u to %u gave %u", before, after + 1, got);
    }
}

/* A routine in fresh bytes is told of by a word; who reads the word serializes, and calls it (SDM 3, 9.1.3). */

static _Atomic uint64_t told;   /* where in the page, and what it returns */
static struct lock telling;
static uint8_t *fresh;

static void job_tell(struct worker *me)
{
    take(&telling);
    uint32_t value = next(me), at = ((atomic_load(&told) >> 32) + 16) % (4 * PAGE);
    write_function(fresh + at, value);
    atomic_store(&told, (uint64_t)at << 32 | value);
    give(&telling);
}

static void job_run_told(struct worker *me)
{
    (void)me;
    for (int i = 0; i < 8; i++) {
        uint64_t what = atomic_load(&told);
        uint32_t a = 0, b, c = 0, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
        uint32_t got = call(fresh + (what >> 32));
        uint64_t now = atomic_load(&told);
        if (got != (uint32_t)what && ((now >> 32) - (what >> 32)) % (4 * PAGE) < 3 * PAGE)
            wrong("the routine at %lx gave %x, not %x", what >> 32, got, (uint32_t)what);
    }
}

/* Processors: where a thread was put, and clocks that agree. */

static void job_migrate(struct worker *me)
{
    cpu_set_t set;
    unsigned cpu = next(me) % cpus, is, aux;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    need(!sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
    __asm__ volatile("rdtscp" : "=c"(aux) : : "rax", "rdx");
    need(!syscall(SYS_getcpu, &is, 0, 0), "getcpu");
    if (is != cpu || (aux & 0xfff) != cpu)
        wrong("put on processor %u, but is on %u, by RDTSCP %u", cpu, is, aux & 0xfff);
    for (unsigned i = 0; i < cpus; i++)
        CPU_SET(i, &set);
    need(!sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
}

static _Atomic uint64_t last_tsc, last_time;

static void advance(_Atomic uint64_t *last, uint64_t before, uint64_t now, const char *what)
{
    if (now < before)
        wrong("%s: %lu after another thread saw %lu", what, now, before);
    while (before < now && !atomic_compare_exchange_weak(last, &before, now))
        ;
}

static void job_clocks(struct worker *me)
{
    (void)me;
    for (int i = 0; i < 50; i++) {
        uint64_t before = atomic_load(&last_tsc);
        uint32_t low, high;
        __asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) : : "memory");
        advance(&last_tsc, before, (uint64_t)high << 32 | low, "TSC");
        struct timespec now;
        before = atomic_load(&last_time);
        clock_gettime(CLOCK_MONOTONIC, &now);
        advance(&last_time, before, now.tv_sec * 1000000000ul + now.tv_nsec, "CLOCK_MONOTONIC");
    }
}

/* What is a thread's own, and stays. */

static void job_registers(struct worker *me)
{
    uint64_t a = next(me), b = next(me), c, d;
    double x = me->index + 1.5, y;
    long done;
    for (int i = 0; i < 8; i++) {
        __asm__ volatile("movq %4, %%xmm3; movq %5, %%xmm13; fldl %6; mov $24, %%eax; syscall;"
                         "movq %%xmm3, %0; movq %%xmm13, %1; fstpl %2"
                         : "=&r"(c), "=&r"(d), "=m"(y), "=&a"(done)
                         : "r"(a), "r"(b), "m"(x) : "rcx", "r11", "xmm3", "xmm13", "st", "memory");
        if (c != a || d != b || y != x)
            wrong("vector registers changed: %lx %lx %g, not %lx %lx %g", c, d, y, a, b, x);
    }
}

static void job_memory(struct worker *me)
{
    enum { SIZE = 6 * PAGE };
    uint8_t *from = map(2 * SIZE, PROT_READ | PROT_WRITE), *to = from + SIZE;
    uint64_t *words = (uint64_t *)from;
    for (int i = 0; i < SIZE / 8; i++)
        words[i] = next(me);
    size_t at = next(me) % 64, n = SIZE - 64;
    void *destination = to;
    const void *source = from + at;
    __asm__ volatile("rep movsb" : "+D"(destination), "+S"(source), "+c"(n) : : "memory");
    if (memcmp(to, from + at, SIZE - 64))
        wrong("a copy differs");
    need(!munmap(from, 2 * SIZE), "munmap");
}

static void job_fork(struct worker *me)
{
    volatile uint64_t *page = map(PAGE, PROT_READ | PROT_WRITE);
    uint64_t value = page[7] = next(me);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (!child) {
        int same = page[7] == value;
        page[7] = ~value;
        _exit(same && page[7] == ~value ? 42 : 43);
    }
    page[8] = value + 1;
    int status;
    while (waitpid(child, &status, 0) < 0)
        need(errno == EINTR, "waitpid");
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 42 || page[7] != value || page[8] != value + 1)
        wrong("fork: status %x, memory %lx %lx, not %lx", status, page[7], page[8], value);
    need(!munmap((void *)page, PAGE), "munmap");
}

static const struct job {
    const char *name;
    void (*run)(struct worker *);
    unsigned share;
} jobs[] = {
    {"futex", job_futex, 3}, {"atomics", job_atomics, 3}, {"signals", job_signals, 3},
    {"change-mapping", job_change_mapping, 4}, {"look-at-mappings", job_look_at_mappings, 4},
    {"own-code", job_own_code, 4}, {"patch", job_patch, 2}, {"run-patched", job_run_patched, 4},
    {"tell", job_tell, 2}, {"run-told", job_run_told, 4}, {"migrate", job_migrate, 3}, {"clocks", job_clocks, 3},
    {"registers", job_registers, 3}, {"memory", job_memory, 2}, {"fork", job_fork, 1},
};
enum { JOBS = sizeof jobs / sizeof *jobs };
static atomic_ulong done[JOBS];

static const struct job *choose(struct worker *me)
{
    unsigned all = 0;
    for (int i = 0; i < JOBS; i++)
        all += jobs[i].share;
    unsigned chosen = next(me) % all, i = 0;
    while (chosen >= jobs[i].share)
        chosen -= jobs[i++].share;
    return &jobs[i];
}

static void *work(void *argument)
{
    struct worker *me = argument;
    me->tid = syscall(SYS_gettid);
    barrier(me);
    while (!atomic_load(&over)) {
        me->doing = "ping-pong";
        ping_pong(me);
        for (int i = 0; i < JOBS_BETWEEN_BARRIERS; i++) {
            const struct job *job = choose(me);
            me->doing = job->name;
            job->run(me);
            atomic_fetch_add(&done[job - jobs], 1);
        }
        barrier(me);
    }
    return 0;
}

static void prepare(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_RESTART};
    need(!sigaction(SIGSEGV, &action, 0), "sigaction");
    action.sa_sigaction = on_trap;
    need(!sigaction(SIGTRAP, &action, 0), "sigaction");
    struct sigaction ending = {.sa_handler = on_end, .sa_flags = SA_RESTART};
    need(!sigaction(SIGTERM, &ending, 0), "sigaction");
    struct sigaction counting = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    need(!sigaction(SIGRTMIN + 1, &counting, 0), "sigaction");
    need(!syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0), "membarrier");
    int all = PROT_READ | PROT_WRITE | PROT_EXEC;
    code_page = map(PAGE, all);
    write_function(code_page, 1);
    fresh = map(4 * PAGE, all);
    for (unsigned at = 0; at < 4 * PAGE; at += 16)
        write_function(fresh + at, 0);
    two_pages = (uint64_t *)((char *)map(2 * PAGE, PROT_READ | PROT_WRITE) + PAGE - 4);
    for (int i = 0; i < 8; i++)
        write_function(patched[i].code = (uint8_t *)map(PAGE, all) + 32 * i, 0);
    for (unsigned i = 0; i < threads; i++) {
        own_code[i] = map(PAGE, PROT_READ | PROT_WRITE);
        shown[i].page = map(3 * PAGE, PROT_READ | PROT_WRITE);
        shown[i].page += PAGE / 8;
        workers[i] = (struct worker){.index = i, .random = 0x9e3779b97f4a7c15 * (i + 1)};
    }
}

int main(int count, char **arguments)
{
    pthread_t handles[MOST];
    if (count != 3)
        return 2;
    threads = atoi(arguments[1]);
    cpus = sysconf(_SC_NPROCESSORS_ONLN);
    end = time(0) + atoi(arguments[2]);
    if (threads < 2 || threads > MOST)
        return 2;
    prepare();
    for (unsigned i = 0; i < threads; i++)
        need(!pthread_create(&handles[i], 0, work, &workers[i]), "pthread_create");
    unsigned long seen = 0;
    time_t since = time(0);
    while (!atomic_load(&over)) {
        usleep(200000);
        unsigned long now = atomic_load(&epochs);
        if (now != seen) {
            seen = now;
            since = time(0);
        } else if (time(0) - since > PATIENCE) {
            for (unsigned i = 0; i < threads; i++)
                printf("STUCK thread %u: %s\n", i, workers[i].doing);
            return 3;
        }
    }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(handles[i], 0);
    printf("DONE %lu epochs, %lu signals", atomic_load(&epochs), atomic_load(&received));
    for (int i = 0; i < JOBS; i++)
        printf(", %s %lu", jobs[i].name, atomic_load(&done[i]));
    printf("\n");
    return 0;
}
