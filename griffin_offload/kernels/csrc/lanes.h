/* Vectors of float32 and of 32-bit numbers, eight of AVX2 or, where WIDE is 1, sixteen of AVX-512, by the same names:
 * for files that are included once for each. */
#undef TARGET
#undef V_LANES
#undef V_F
#undef V_I
#undef V_M
#undef V_OP
#undef V_NAME
#undef v_pick
#undef v_pick_i
#undef v_less
#undef v_at_least
#undef v_and
#undef v_or
#undef v_bits
#undef v_floats
#undef v_store_i
#undef v_any

#if WIDE
#define TARGET AVX512
#define V_LANES 16
#define V_F __m512
#define V_I __m512i
#define V_M __mmask16
#define V_OP(name) _mm512_##name
#define V_NAME(name) name##_16
#define v_pick(mask, yes, no) _mm512_mask_blend_ps(mask, no, yes)
#define v_pick_i(mask, yes, no) _mm512_mask_blend_epi32(mask, no, yes)
#define v_less(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define v_at_least(a, b) _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ)
#define v_and(a, b) _mm512_and_si512(a, b)
#define v_or(a, b) _mm512_or_si512(a, b)
#define v_bits(a) _mm512_castps_si512(a)
#define v_floats(a) _mm512_castsi512_ps(a)
#define v_store_i(to, a) _mm512_storeu_si512(to, a)
#define v_any(mask) (mask)
#else
#define TARGET AVX2
#define V_LANES 8
#define V_F __m256
#define V_I __m256i
#define V_M __m256
#define V_OP(name) _mm256_##name
#define V_NAME(name) name##_8
#define v_pick(mask, yes, no) _mm256_blendv_ps(no, yes, mask)
#define v_pick_i(mask, yes, no) _mm256_blendv_epi8(no, yes, _mm256_castps_si256(mask))
#define v_less(a, b) _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define v_at_least(a, b) _mm256_cmp_ps(a, b, _CMP_GE_OQ)
#define v_and(a, b) _mm256_and_si256(a, b)
#define v_or(a, b) _mm256_or_si256(a, b)
#define v_bits(a) _mm256_castps_si256(a)
#define v_floats(a) _mm256_castsi256_ps(a)
#define v_store_i(to, a) _mm256_storeu_si256((__m256i *)(to), a)
#define v_any(mask) _mm256_movemask_ps(mask)
#endif
