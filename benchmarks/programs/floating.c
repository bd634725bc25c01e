/* Floating point and SIMD rows, but AVX2, which is compiled for another CPU. */
#include <emmintrin.h>
#include <math.h>
#include <string.h>

#include "bench.h"

/* SSE2 double: four bodies under gravity (after the Computer Language Benchmarks Game's n-body). */
struct body {
    double x, y, z, vx, vy, vz, mass;
};

uint64_t sse2_double(void)
{
    struct body bodies[4] = {
        {0, 0, 0, 0, 0, 0, 39.47},
        {4.84, -1.16, -0.10, 0.606, 2.81, -0.02, 0.037},
        {8.34, 4.12, -0.4, -1.01, 1.82, 0.008, 0.011},
        {12.89, -15.11, -0.22, 1.08, 0.868, -0.01, 0.0017},
    };
    for (int step = 0; step < 250000; step++) {
        for (int i = 0; i < 4; i++)
            for (int j = i + 1; j < 4; j++) {
                struct body *p = &bodies[i], *q = &bodies[j];
                double dx = p->x - q->x, dy = p->y - q->y, dz = p->z - q->z;
                double square = dx * dx + dy * dy + dz * dz;
                double pull = 0.01 / (square * __builtin_sqrt(square));
                p->vx -= dx * q->mass * pull;
                p->vy -= dy * q->mass * pull;
                p->vz -= dz * q->mass * pull;
                q->vx += dx * p->mass * pull;
                q->vy += dy * p->mass * pull;
                q->vz += dz * p->mass * pull;
            }
        for (int i = 0; i < 4; i++) {
            bodies[i].x += 0.01 * bodies[i].vx;
            bodies[i].y += 0.01 * bodies[i].vy;
            bodies[i].z += 0.01 * bodies[i].vz;
        }
    }
    return fnv(FNV_START, bodies, sizeof bodies);
}

/* x87: a Mandelbrot set and a polynomial in 80-bit floating point. */
uint64_t x87(void)
{
    uint64_t inside = 0;
    for (int row = 0; row < 100; row++)
        for (int column = 0; column < 100; column++) {
            long double cx = column * 0.03L - 2.0L, cy = row * 0.02L - 1.0L, x = 0, y = 0;
            int n = 0;
            for (; n < 200 && x * x + y * y < 4.0L; n++) {
                long double t = x * x - y * y + cx;
                y = 2.0L * x * y + cy;
                x = t;
            }
            inside += n;
        }
    long double sum = 0;
    for (int i = 0; i < 1000000; i++) {
        long double t = i * 1e-6L;
        sum += ((t * 0.25L - 0.5L) * t + 1.0L) / (t + 1.0L);
    }
    double rounded = (double)sum;
    return fnv(inside, &rounded, sizeof rounded);
}

#define PIXELS 16384
static uint8_t one[PIXELS] __attribute__((aligned(16))), two[PIXELS] __attribute__((aligned(16))),
    out[PIXELS] __attribute__((aligned(16)));

/* SSE2 integer: blend, filter and compare rows of pixels, as a video codec does. */
uint64_t sse2_integer(void)
{
    uint64_t state = 88172645463325252u;
    for (int i = 0; i < PIXELS; i++) {
        one[i] = next_random(&state);
        two[i] = state >> 32;
    }
    __m128i zero = _mm_setzero_si128(), total = zero;
    for (int n = 0; n < 2000; n++) {
        __m128i weight = _mm_set1_epi16(n & 127), rest = _mm_set1_epi16(128 - (n & 127));
        for (int i = 0; i < PIXELS; i += 16) {
            __m128i p = _mm_load_si128((__m128i *)&one[i]), q = _mm_load_si128((__m128i *)&two[i]);
            __m128i low = _mm_add_epi16(_mm_mullo_epi16(_mm_unpacklo_epi8(p, zero), weight),
                                        _mm_mullo_epi16(_mm_unpacklo_epi8(q, zero), rest));
            __m128i high = _mm_add_epi16(_mm_mullo_epi16(_mm_unpackhi_epi8(p, zero), weight),
                                         _mm_mullo_epi16(_mm_unpackhi_epi8(q, zero), rest));
            __m128i mixed = _mm_packus_epi16(_mm_srli_epi16(low, 7), _mm_srli_epi16(high, 7));
            total = _mm_add_epi64(total, _mm_sad_epu8(mixed, p));
            total = _mm_add_epi32(total, _mm_madd_epi16(low, _mm_shuffle_epi32(high, 0x1b)));
            mixed = _mm_max_epu8(mixed, _mm_avg_epu8(p, q));
            _mm_store_si128((__m128i *)&out[i], _mm_and_si128(mixed, _mm_cmpeq_epi8(p, mixed)));
        }
    }
    uint64_t sums[2];
    memcpy(sums, &total, 16);
    return fnv(sums[0] ^ sums[1], out, sizeof out);
}
