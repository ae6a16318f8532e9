/* A square of 32-bit numbers, turned around. */
#ifndef GRIFFIN_OFFLOAD_SQUARE_H
#define GRIFFIN_OFFLOAD_SQUARE_H

#include "gemm_args.h"

/* The 16 rows of a square of 32-bit numbers become its columns. */
AVX512 INLINED void turn(__m512i *rows) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            rows[i + 2 * k] = _mm512_unpacklo_epi64(half[i + k], half[i + k + 2]);
            rows[i + 2 * k + 1] = _mm512_unpackhi_epi64(half[i + k], half[i + k + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 2; k++) {
            half[i + 8 * k] = _mm512_shuffle_i32x4(rows[i + 8 * k], rows[i + 8 * k + 4], 0x88);
            half[i + 8 * k + 4] = _mm512_shuffle_i32x4(rows[i + 8 * k], rows[i + 8 * k + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
    }
}

#endif
