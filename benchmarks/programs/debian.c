/* Rows that are Debian's own programs, started by us; the check is a hash of what they print. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

#define DATA_SIZE (4 << 20)

/* The file "data": words of a small language, which compress about as text does. */
static void make_data(void)
{
    struct stat there;
    if (!stat("data", &there) && there.st_size == DATA_SIZE)
        return;
    char *text = malloc(DATA_SIZE);
    uint64_t state = 88172645463325252u;
    for (size_t at = 0; at < DATA_SIZE;) {
        uint64_t word = next_random(&state) % 5000 * ((state >> 40) % 7 + 1) % 5000;
        for (uint64_t seed = word * 2654435761u + 12345, n = 2 + word % 9; n && at < DATA_SIZE; n--) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            text[at++] = "etaoinshrdlucmfwypvbgkjqxz"[(seed >> 33) % 26 * ((seed >> 50) % 26) / 26];
        }
        if (at < DATA_SIZE)
            text[at++] = word % 11 ? ' ' : '\n';
    }
    int file = open("data", O_CREAT | O_TRUNC | O_WRONLY, 0600);
    if (file < 0 || write(file, text, DATA_SIZE) != DATA_SIZE || close(file))
        die("data");
    free(text);
}

/* Start a program under `root`, statically linked or through the packages' own loader, and hash its output. */
static uint64_t program(int dynamic, const char *const words[])
{
    static char loader[512], libraries[512], path[512];
    const char *argv[32];
    int count = 0, ends[2], status;
    make_data();
    snprintf(path, sizeof path, "%s%s", root, words[0]);
    if (dynamic) {
        snprintf(loader, sizeof loader, "%s/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", root);
        snprintf(libraries, sizeof libraries, "%s/usr/lib/x86_64-linux-gnu", root);
        argv[count++] = loader;
        argv[count++] = "--library-path";
        argv[count++] = libraries;
    }
    argv[count++] = path;
    for (int i = 1; words[i]; i++)
        argv[count++] = words[i];
    argv[count] = NULL;
    if (pipe(ends))
        die("pipe");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        dup2(ends[1], 1);
        close(ends[0]);
        close(ends[1]);
        execv(argv[0], (char *const *)argv);
        die(argv[0]);
    }
    close(ends[1]);
    static char buffer[65536];
    uint64_t hash = FNV_START;
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;)
        hash = fnv(hash, buffer, n);
    close(ends[0]);
    if (waitpid(child, &status, 0) != child || status)
        die(words[0]);
    return hash;
}

#define PROGRAM(dynamic, ...) program(dynamic, (const char *const[]){__VA_ARGS__, NULL})

uint64_t run_sha256sum(void)
{
    return PROGRAM(1, "/usr/bin/sha256sum", "data", "data", "data", "data", "data", "data");
}

uint64_t run_gzip(void)
{
    return PROGRAM(1, "/usr/bin/gzip", "-c", "-n", "data");
}

uint64_t run_shell(void)
{
    char script[512];
    snprintf(script, sizeof script, "%s/bench/loop.sh", root);
    return PROGRAM(0, "/bin/busybox", "sh", script);
}

uint64_t run_python3(void)
{
    char script[512], home[512];
    snprintf(script, sizeof script, "%s/bench/work.py", root);
    snprintf(home, sizeof home, "%s/usr", root);
    setenv("PYTHONHOME", home, 1);
    setenv("PYTHONHASHSEED", "0", 1);
    return PROGRAM(1, "/usr/bin/python3.11", "-s", "-S", script);
}

/* Two ciphers to files, and a hash of the three. */
uint64_t run_openssl(void)
{
#define KEY "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
#define IV "000102030405060708090a0b0c0d0e0f"
    setenv("OPENSSL_CONF", "/dev/null", 1);
    uint64_t check = 0;
    check ^= PROGRAM(1, "/usr/bin/openssl", "enc", "-aes-256-ctr", "-K", KEY, "-iv", IV, "-in", "data", "-out", "aes");
    check ^= PROGRAM(1, "/usr/bin/openssl", "enc", "-chacha20", "-K", KEY, "-iv", IV, "-in", "data", "-out", "chacha");
    check ^= PROGRAM(1, "/usr/bin/openssl", "dgst", "-sha512", "data", "aes", "chacha");
    return check;
}
