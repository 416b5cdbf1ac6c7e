// Attention with INT8 products by DP4A, for compute capability 6.1 and later. See attention.py for what it computes.
//
// A block of 128 threads computes 64 queries of one head. It goes through the keys in tiles of 128, and keeps a running
// maximum and sum for each query (https://arxiv.org/abs/2205.14135). Queries and probabilities are unsigned bytes,
// keys and values are signed ones. Two blocks fit on a multiprocessor: 48 KiB of shared memory and 255 registers each.
//
// Packed operands. An int holds four channels of a token, or four keys of a channel.
//   queries  [head][tile][32 ints][64 tokens]    tokens in groups of 4, the group's number xor (int & 3)
//   keys     [head][tile][0][32 ints][128 tokens]
//   values   [head][tile][1][32 ints][128 channels]
typedef unsigned int u32;

#define SIZE 128                      // channels of a head
#define QUERIES 64                    // of a tile
#define KEYS 128                      // of a tile
#define THREADS 128
#define PLANE 1024                    // int4s of a tile's keys, or values
#define INFINITY __int_as_float(0x7f800000)

// Sums start at the bits of 1.5 * 2^23: after adding small integers, the bits are that float plus the integer.
#define MAGIC_BITS 0x4B400000
#define MAGIC 12582912.0f
#define MAGIC_31 3221225472.0f        // 1.5 * 2^31, whose unit in the last place is 256
#define LOG2_255 7.994353436858858f

__device__ __forceinline__ int dp4a(int unsigned_bytes, int signed_bytes, int sum) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(unsigned_bytes), "r"(signed_bytes), "r"(sum));
    return d;
}
__device__ __forceinline__ int sum_of_bytes(u32 signed_bytes) {
    int d;
    asm("dp4a.s32.u32 %0, %1, %2, 0;" : "=r"(d) : "r"(signed_bytes), "r"(0x01010101));
    return d;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four numbers from 0 to 255, rounded, as the bytes of an int. Uses additions only: conversions run at a quarter rate.
__device__ __forceinline__ int pack_unsigned(float p0, float p1, float p2, float p3) {
    float high = __fmaf_rn(p1, 256.f, MAGIC_31), low = p0 + (high - (MAGIC_31 - MAGIC));
    float high2 = __fmaf_rn(p3, 256.f, MAGIC_31), low2 = p2 + (high2 - (MAGIC_31 - MAGIC));
    return __byte_perm(__float_as_uint(low), __float_as_uint(low2), 0x5410);
}
// Four numbers from -127 to 127, rounded, as the bytes of an int.
__device__ __forceinline__ u32 pack_signed(float a, float b, float c, float d) {
    u32 ab = __byte_perm(__float_as_uint(a + MAGIC), __float_as_uint(b + MAGIC), 0x0040);
    u32 cd = __byte_perm(__float_as_uint(c + MAGIC), __float_as_uint(d + MAGIC), 0x0040);
    return __byte_perm(ab, cd, 0x5410);
}

// Operands of one step of 4 bytes in depth: 8 rows of A and 8 columns of B for each thread.
struct Fragment { int4 a0, a1, b0, b1; };

__device__ __forceinline__ void multiply(int (&sums)[8][8], const Fragment& f, bool first) {
    const int a[8] = {f.a0.x, f.a0.y, f.a0.z, f.a0.w, f.a1.x, f.a1.y, f.a1.z, f.a1.w};
    const int b[8] = {f.b0.x, f.b0.y, f.b0.z, f.b0.w, f.b1.x, f.b1.y, f.b1.z, f.b1.w};
#pragma unroll
    for (int n = 0; n < 64; n++) {  // back and forth over the rows: neighbours share an operand, which registers keep
        const int j = n >> 3, i = (j & 1) ? 7 - (n & 7) : n & 7;
        sums[i][j] = dp4a(a[i], b[j], first ? MAGIC_BITS : sums[i][j]);
    }
}

// sums = MAGIC_BITS + A (64 rows, 128 bytes) times B (128 columns, 128 bytes). Meanwhile the next B, 16 KiB, comes from
// global memory. a, b, next: where they are in shared memory, in bytes.
__device__ __forceinline__ void multiply_tile(
    int (&sums)[8][8], char* shared, int a, int b, int next, const int4* __restrict__ source, int thread
) {
    const int column = thread & 15, row = thread >> 4;
    Fragment f[2];
    int at_a[4] = {a + row * 16, a + (row ^ 1) * 16, a + (row ^ 2) * 16, a + (row ^ 3) * 16};
    int at_b = b + column * 16;
    next += thread * 16;
    source += thread;
    auto load = [&](Fragment& into, int u, int ahead) {
        const char* from_a = shared + at_a[u] + ahead * 1024 + u * 256;
        const char* from_b = shared + at_b + ahead * 2048 + u * 512;
        into.a0 = *(const int4*)from_a;
        into.a1 = *(const int4*)(from_a + 128);
        into.b0 = *(const int4*)from_b;
        into.b1 = *(const int4*)(from_b + 256);
    };
    auto advance = [&] {
        at_a[0] += 1024; at_a[1] += 1024; at_a[2] += 1024; at_a[3] += 1024;
        at_b += 2048;
        next += 2048;
    };
    load(f[0], 0, 0);
    int4 fetched = __ldg(source);
#pragma unroll
    for (int u = 0; u < 4; u++) {  // the first steps also start the sums
        if (u < 3) load(f[(u + 1) & 1], u + 1, 0);
        else load(f[0], 0, 1);
        multiply(sums, f[u & 1], u == 0);
    }
    *(int4*)(shared + next) = fetched;
    fetched = __ldg(source + THREADS);
    advance();
    source += 2 * THREADS;
#pragma unroll 1
    for (int k = 1; k < 8; k++) {
#pragma unroll
        for (int u = 0; u < 4; u++) {
            if (u < 3) load(f[(u + 1) & 1], u + 1, 0);
            else if (k < 7) load(f[0], 0, 1);
            multiply(sums, f[u & 1], false);
            if (u == 1) {
                *(int4*)(shared + next) = fetched;
                if (k < 7) fetched = __ldg(source);
            }
        }
        advance();
        source += THREADS;
    }
}

// Grid (query tiles, heads). out (tokens, heads, SIZE).
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(
    const int4* __restrict__ queries, const float* __restrict__ query_scales, const int4* __restrict__ keys_values,
    const float4* __restrict__ key_scales, const float4* __restrict__ key_offsets, const float* __restrict__ value_scales,
    const float* __restrict__ value_means, float* __restrict__ out, int tokens, int query_tiles, int key_tiles
) {
    __shared__ int4 shared[3072];  // queries 8 KiB, probabilities 8 KiB, two B tiles of 16 KiB
    const int thread = threadIdx.x, column = thread & 15, row = thread >> 4;
    const int tile = blockIdx.x, head = blockIdx.y;
    const int4* source = keys_values + (size_t)head * key_tiles * 2 * PLANE;
    const float4* scales = key_scales + (size_t)head * key_tiles * 32 + column;
    const float4* offsets = key_offsets + (size_t)head * key_tiles * 32 + column;
    const float* own_scales = query_scales + ((size_t)head * query_tiles + tile) * QUERIES + row * 4;
    {
        const int4* q = queries + ((size_t)head * query_tiles + tile) * (PLANE / 2);
#pragma unroll
        for (int i = 0; i < 4; i++) shared[i * THREADS + thread] = q[i * THREADS + thread];
#pragma unroll
        for (int i = 0; i < 8; i++) shared[PLANE + i * THREADS + thread] = source[i * THREADS + thread];
    }
    float sum[8][8], total[8], keep[8], weight[8], maximum = -1e30f;
    // Between the two products a lane works for one query: number column >> 1 of its 8 rows.
    const float lane_scale = own_scales[(column >> 3) * 32 + ((column >> 1) & 3)];
    int product[8][8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        total[i] = keep[i] = weight[i] = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) { sum[i][j] = 0.f; product[i][j] = MAGIC_BITS; }
    }
    __syncthreads();
    int current = 16384;  // where B is in shared memory; the other one is at 49152 - current
    const int last = key_tiles * 2 - 1;
    for (int phase = 0; phase <= last; phase++) {  // queries times keys, then probabilities times values, in turns
        const bool scoring = !(phase & 1);
        source += PLANE;
        multiply_tile(product, (char*)shared, scoring ? 0 : 8192, current, 49152 - current,
                      phase < last ? source : keys_values, thread);
        if (scoring) {
            const float4 s0 = __ldg(scales), s1 = __ldg(scales + 16), o0 = __ldg(offsets), o1 = __ldg(offsets + 16);
            scales += 32;
            offsets += 32;
            const float4 q0 = __ldg((const float4*)own_scales), q1 = __ldg((const float4*)(own_scales + 32));
            const float key_scale[8] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
            const float key_offset[8] = {o0.x, o0.y, o0.z, o0.w, o1.x, o1.y, o1.z, o1.w};
            const float query_scale[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
            float largest[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float v = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float x = __fmaf_rn(__int_as_float(product[i][j]), key_scale[j], key_offset[j]);
                    product[i][j] = __float_as_int(x);
                    v = j ? fmaxf(v, x) : x;
                }
                largest[i] = v;
            }
            // Each query's maximum over its 16 lanes. The rows that a lane holds are halved each time.
            float four[4], two[2], one;
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float mine = (column & 8) ? largest[r + 4] : largest[r], other = (column & 8) ? largest[r] : largest[r + 4];
                four[r] = fmaxf(mine, __shfl_xor_sync(~0u, other, 8));
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float mine = (column & 4) ? four[r + 2] : four[r], other = (column & 4) ? four[r] : four[r + 2];
                two[r] = fmaxf(mine, __shfl_xor_sync(~0u, other, 4));
            }
            {
                const float mine = (column & 2) ? two[1] : two[0], other = (column & 2) ? two[0] : two[1];
                one = fmaxf(mine, __shfl_xor_sync(~0u, other, 2));
            }
            one = fmaxf(one, __shfl_xor_sync(~0u, one, 1)) * lane_scale;
            // Probabilities are scaled by the tile's maximum, so that a key far above all others costs no accuracy.
            const float higher = fmaxf(maximum, one), lane_keep = exp2_fast(maximum - higher);
            // A little less than the maximum, by more than its rounding: no probability may exceed 255.
            const float top = one == -INFINITY ? 0.f : one, lane_offset = LOG2_255 - fmaf(fabsf(top), 2.4e-7f, top);
            const float lane_weight = exp2_fast(one - higher);
            maximum = higher;
            float offset[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int lane = (thread & 16) + 2 * i;
                offset[i] = __shfl_sync(~0u, lane_offset, lane);
                keep[i] = __shfl_sync(~0u, lane_keep, lane);
                weight[i] = __shfl_sync(~0u, lane_weight, lane);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int w0[4], w1[4];
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const int i = half * 4 + r;
                    float p[8];
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        p[j] = exp2_fast(__fmaf_rn(__int_as_float(product[i][j]), query_scale[i], offset[i]));
                    w0[r] = pack_unsigned(p[0], p[1], p[2], p[3]);
                    w1[r] = pack_unsigned(p[4], p[5], p[6], p[7]);
                    const float added = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
                    total[i] = __fmaf_rn(total[i], keep[i], added * weight[i]);
                }
                const int place = 512 + column * 16 + (row ^ (column & 3)) + 8 * half;
                shared[place] = make_int4(w0[0], w0[1], w0[2], w0[3]);
                shared[place + 256] = make_int4(w1[0], w1[1], w1[2], w1[3]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float minus = -MAGIC * weight[i];
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sum[i][j] = __fmaf_rn(sum[i][j], keep[i], __fmaf_rn(__int_as_float(product[i][j]), weight[i], minus));
            }
        }
        current = 49152 - current;
        __syncthreads();
    }
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes <<= 1)
#pragma unroll
        for (int i = 0; i < 8; i++) total[i] += __shfl_xor_sync(~0u, total[i], lanes);
    const float4* scale = (const float4*)(value_scales + head * SIZE) + column;
    const float4* mean = (const float4*)(value_means + head * SIZE) + column;
    const float4 v0 = __ldg(scale), v1 = __ldg(scale + 16), c0 = __ldg(mean), c1 = __ldg(mean + 16);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int token = tile * QUERIES + (i >> 2) * 32 + row * 4 + (i & 3);
        if (token < tokens) {
            const float r = 1.f / total[i];
            float4* o = (float4*)(out + ((size_t)token * gridDim.y + head) * SIZE) + column;
            o[0] = make_float4(sum[i][0] * r * v0.x + c0.x, sum[i][1] * r * v0.y + c0.y,
                               sum[i][2] * r * v0.z + c0.z, sum[i][3] * r * v0.w + c0.w);
            o[16] = make_float4(sum[i][4] * r * v1.x + c1.x, sum[i][5] * r * v1.y + c1.y,
                                sum[i][6] * r * v1.z + c1.z, sum[i][7] * r * v1.w + c1.w);
        }
    }
}

// ---- Packing. Sources are FP32; head_step and token_step count numbers. mask: a byte for each key, or null. ----

// Sum, minimum and maximum of each channel over a part of the keys. Grid (parts, heads, 2 for keys and values).
// found (2, heads, parts, 3, SIZE).
extern "C" __global__ void __launch_bounds__(SIZE) measure_parts(
    const float* __restrict__ keys, const float* __restrict__ values, const unsigned char* __restrict__ mask,
    float* __restrict__ found, int tokens, int key_head_step, int key_token_step, int value_head_step, int value_token_step
) {
    const long long head_step = blockIdx.z ? value_head_step : key_head_step;
    const long long token_step = blockIdx.z ? value_token_step : key_token_step;
    const float* x = (blockIdx.z ? values : keys) + blockIdx.y * head_step + threadIdx.x;
    const int parts = gridDim.x, each = (tokens + parts - 1) / parts;
    const int first = blockIdx.x * each, end = min(tokens, first + each);
    float sum = 0.f, lowest = INFINITY, highest = -INFINITY;
#pragma unroll 8
    for (int i = first; i < end; i++) {
        if (mask && !mask[i]) continue;
        const float v = x[i * token_step];
        sum += v;  // NaN and infinity stay in it
        lowest = fminf(lowest, v);
        highest = fmaxf(highest, v);
    }
    float* w = found + (((size_t)blockIdx.z * gridDim.y + blockIdx.y) * parts + blockIdx.x) * 3 * SIZE + threadIdx.x;
    w[0] = sum;
    w[SIZE] = lowest;
    w[2 * SIZE] = highest;
}

// Each channel's mean and scale from those parts. Grid (heads, 2). count: of the keys that the mask lets through, or null.
extern "C" __global__ void __launch_bounds__(SIZE) measure_all(
    const float* __restrict__ found, const int* __restrict__ count, float* __restrict__ means, float* __restrict__ scales,
    int parts, int tokens
) {
    const size_t channel = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * SIZE + threadIdx.x;
    const float* w = found + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * parts * 3 * SIZE + threadIdx.x;
    float sum = 0.f, lowest = INFINITY, highest = -INFINITY;
    for (int i = 0; i < parts; i++, w += 3 * SIZE) {
        sum += w[0];
        lowest = fminf(lowest, w[SIZE]);
        highest = fmaxf(highest, w[2 * SIZE]);
    }
    const float mean = sum / (count ? *count : tokens);
    means[channel] = mean;
    scales[channel] = fmaxf(fmaxf(highest - mean, mean - lowest), 1e-20f) * (1.f / 127.f);
}

// Rotate by Hadamard's matrix over the 128 channels that a warp holds, four a lane. Not normalised.
__device__ __forceinline__ float4 rotate(float4 v, int lane) {
    const float a = v.x + v.y, b = v.x - v.y, c = v.z + v.w, d = v.z - v.w;
    v = make_float4(a + c, b + d, a - c, b - d);
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const float sign = (lane & o) ? -1.f : 1.f;
        v.x = fmaf(v.x, sign, __shfl_xor_sync(~0u, v.x, o));
        v.y = fmaf(v.y, sign, __shfl_xor_sync(~0u, v.y, o));
        v.z = fmaf(v.z, sign, __shfl_xor_sync(~0u, v.z, o));
        v.w = fmaf(v.w, sign, __shfl_xor_sync(~0u, v.w, o));
    }
    return v;
}

// A token's rotated channels as bytes, and its scale: of a row with NaN or infinity it is NaN.
__device__ __forceinline__ u32 quantize(float4 v, int lane, float* scale) {
    v = rotate(v, lane);
    float limit = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    float poison = (v.x + v.y + v.z + v.w) * 0.f;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        limit = fmaxf(limit, __shfl_xor_sync(~0u, limit, o));
        poison += __shfl_xor_sync(~0u, poison, o);
    }
    limit = fmaxf(limit, 1e-12f);
    const float inverse = 127.f / limit;
    *scale = limit * (1.f / 127.f) + poison;
    return pack_signed(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
}

// Grid (query tiles, heads). factor: what scores are multiplied by.
extern "C" __global__ void __launch_bounds__(256) pack_queries(
    const float* __restrict__ source, u32* __restrict__ packed, float* __restrict__ scales,
    int tokens, int head_step, int token_step, float factor
) {
    __shared__ u32 ints[32][65];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y, first = blockIdx.x * QUERIES;
#pragma unroll 4
    for (int r = 0; r < 8; r++) {
        const int token = first + warp * 8 + r;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (token < tokens) v = ((const float4*)(source + (long long)head * head_step + (long long)token * token_step))[lane];
        float scale;
        ints[lane][warp * 8 + r] = quantize(v, lane, &scale) ^ 0x80808080u;  // plus 128: unsigned
        if (lane == 0) scales[(size_t)head * gridDim.x * QUERIES + token] = scale * factor;
    }
    __syncthreads();
    u32* y = packed + ((size_t)head * gridDim.x + blockIdx.x) * QUERIES * 32;
    for (int i = threadIdx.x; i < QUERIES * 32; i += 256) {
        const int k = i >> 6, token = i & 63;
        y[k * QUERIES + (token ^ ((k & 3) << 2))] = ints[k][token];
    }
}

// Grid (twice the key tiles, heads). offsets: what takes the queries' 128 and the sums' start away again; -infinity for
// keys that do not count.
extern "C" __global__ void __launch_bounds__(256) pack_keys(
    const float* __restrict__ source, const float* __restrict__ means, const unsigned char* __restrict__ mask,
    u32* __restrict__ packed, float* __restrict__ scales, float* __restrict__ offsets,
    int tokens, int head_step, int token_step
) {
    __shared__ u32 ints[32][65];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y, first = blockIdx.x * 64;
    const int tiles = gridDim.x >> 1;
    const float4 mean = ((const float4*)(means + head * SIZE))[lane];
#pragma unroll 4
    for (int r = 0; r < 8; r++) {
        const int token = first + warp * 8 + r;
        const bool counts = token < tokens && !(mask && !mask[token]);
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (counts) {
            v = ((const float4*)(source + (long long)head * head_step + (long long)token * token_step))[lane];
            v.x -= mean.x; v.y -= mean.y; v.z -= mean.z; v.w -= mean.w;
        }
        float scale;
        const u32 bytes = quantize(v, lane, &scale);
        int sum = sum_of_bytes(bytes);
#pragma unroll
        for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
        if (lane == 0) {
            const size_t place = (size_t)head * tiles * KEYS + token;
            scales[place] = counts ? scale : 0.f;
            offsets[place] = counts ? -(MAGIC + 128.f * (float)sum) * scale : -INFINITY;
        }
        ints[lane][warp * 8 + r] = bytes;
    }
    __syncthreads();
    u32* y = packed + ((size_t)head * tiles + (first >> 7)) * (2 * PLANE * 4) + (first & 64);
    for (int i = threadIdx.x; i < 2048; i += 256) y[(i >> 6) * KEYS + (i & 63)] = ints[i >> 6][i & 63];
}

// Grid (16 times the key tiles, heads): a block packs 8 keys.
extern "C" __global__ void __launch_bounds__(256) pack_values(
    const float* __restrict__ source, const float* __restrict__ means, const float* __restrict__ scales,
    const unsigned char* __restrict__ mask, u32* __restrict__ packed, int tokens, int head_step, int token_step
) {
    const int channel = threadIdx.x & 127, group = blockIdx.x * 2 + (threadIdx.x >> 7), head = blockIdx.y;
    const int tiles = gridDim.x >> 4;
    const float mean = means[head * SIZE + channel], inverse = 1.f / scales[head * SIZE + channel];
    float x[4];
#pragma unroll
    for (int b = 0; b < 4; b++) {
        const int token = group * 4 + b;
        const bool counts = token < tokens && !(mask && !mask[token]);
        x[b] = counts ? (source[(long long)head * head_step + (long long)token * token_step + channel] - mean) * inverse : 0.f;
    }
    u32* y = packed + ((size_t)head * tiles + (group >> 5)) * (2 * PLANE * 4) + PLANE * 4 + (group & 31) * SIZE + channel;
    y[0] = pack_signed(x[0], x[1], x[2], x[3]);
}
