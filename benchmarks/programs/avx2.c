/* The AVX2 row: compiled with -mavx2, and entered only where the CPU has it. */
#include <immintrin.h>
#include <string.h>

#include "bench.h"

#define LENGTH 8192
static float x[LENGTH] __attribute__((aligned(32))), y[LENGTH] __attribute__((aligned(32)));
static int32_t n[LENGTH] __attribute__((aligned(32)));

/* Single-precision y = a*x + y and a dot product, then 32-bit integers: multiply, shuffle, compare, blend. */
uint64_t avx2(void)
{
    for (int i = 0; i < LENGTH; i++) {
        x[i] = i * 0.001f;
        y[i] = 1.0f - i * 0.0005f;
        n[i] = i * 2654435761u;
    }
    __m256 dot = _mm256_setzero_ps();
    __m256i sum = _mm256_setzero_si256();
    for (int round = 0; round < 3000; round++) {
        __m256 a = _mm256_set1_ps(round & 1 ? 0.5f : -0.5f);
        __m256i k = _mm256_set1_epi32(round * 2 + 1);
        for (int i = 0; i < LENGTH; i += 8) {
            __m256 vx = _mm256_load_ps(&x[i]), vy = _mm256_load_ps(&y[i]);
            vy = _mm256_add_ps(_mm256_mul_ps(a, vx), vy);
            _mm256_store_ps(&y[i], vy);
            dot = _mm256_add_ps(dot, _mm256_mul_ps(vx, vy));
            __m256i v = _mm256_mullo_epi32(_mm256_load_si256((__m256i *)&n[i]), k);
            v = _mm256_permute4x64_epi64(_mm256_shuffle_epi32(v, 0x1b), 0x4e);
            sum = _mm256_add_epi32(_mm256_blendv_epi8(sum, v, _mm256_cmpgt_epi32(v, sum)), k);
        }
    }
    float dots[8];
    uint32_t sums[8];
    memcpy(dots, &dot, sizeof dots);
    memcpy(sums, &sum, sizeof sums);
    _mm256_zeroupper();
    return fnv(fnv(fnv(FNV_START, y, sizeof y), dots, sizeof dots), sums, sizeof sums);
}
