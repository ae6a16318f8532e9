/* Bytes turned around. */
#ifndef GRIFFIN_OFFLOAD_TRANSPOSE_H
#define GRIFFIN_OFFLOAD_TRANSPOSE_H

#include "halves.h"

/* Two matrices of 16 x 16 bytes, side by side, transposed. */
AVX2 INLINED void transpose(__m256i rows[16]) {
    for (int stage = 0; stage < 4; stage++) { /* each one moves a bit of a byte's place from its row to its column */
        __m256i moved[16];
        for (int i = 0; i < 8; i++) {
            moved[2 * i] = _mm256_unpacklo_epi8(rows[i], rows[i + 8]);
            moved[2 * i + 1] = _mm256_unpackhi_epi8(rows[i], rows[i + 8]);
        }
        memcpy(rows, moved, sizeof moved);
    }
}

#endif
