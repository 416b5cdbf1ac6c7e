// What a block of the transformer computes between its products, row by row. See rows.py for what each kernel computes.
//
// A row is a token. REAL is the arithmetic's dtype outside of these kernels; inside, all is FP32.
// EPS is a macro of rows.py.
typedef unsigned int u32;

#ifdef BF16
typedef unsigned short REAL;
__device__ __forceinline__ float4 load4(const REAL* x) {
    const uint2 w = *(const uint2*)x;
    return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u),
                       __uint_as_float(w.y << 16), __uint_as_float(w.y & 0xffff0000u));
}
__device__ __forceinline__ u32 rounded(float x) {  // to the nearest, ties to even; NaN stays NaN
    const u32 bits = __float_as_uint(x);
    return x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}
__device__ __forceinline__ void store4(REAL* x, float4 v) {
    *(uint2*)x = make_uint2(rounded(v.x) | (rounded(v.y) << 16), rounded(v.z) | (rounded(v.w) << 16));
}
#else
typedef float REAL;
__device__ __forceinline__ float4 load4(const REAL* x) { return *(const float4*)x; }
__device__ __forceinline__ void store4(REAL* x, float4 v) { *(float4*)x = v; }
#endif

#define EACH4(EXPRESSION) make_float4(EXPRESSION(x), EXPRESSION(y), EXPRESSION(z), EXPRESSION(w))

// Where numbers come from: `x`, or INT8 products that still need their scales, the bias and what a LoRA adds.
// weight_scales null: x. bias and added may be null.
#define SOURCE_PARAMETERS \
    const void* __restrict__ x, const float* __restrict__ token_scales, const float* __restrict__ weight_scales, \
    const REAL* __restrict__ bias, const REAL* __restrict__ added
#define SOURCE x, token_scales, weight_scales, bias, added

__device__ __forceinline__ float4 read4(SOURCE_PARAMETERS, int row, int channel, int width) {
    const size_t at = (size_t)row * width + channel;
    if (!weight_scales) return load4((const REAL*)x + at);
    const int4 product = *(const int4*)((const int*)x + at);
    const float4 scale = *(const float4*)(weight_scales + channel);
    const float token = token_scales[row];
    float4 b = bias ? load4(bias + channel) : make_float4(0.f, 0.f, 0.f, 0.f);
    if (added) {
        const float4 more = load4(added + at);
        b = make_float4(b.x + more.x, b.y + more.y, b.z + more.z, b.w + more.w);
    }
#define FINISH(c) fmaf((float)product.c * token, scale.c, b.c)
    return EACH4(FINISH);
#undef FINISH
}

// Rotate blocks of 64 channels by Sylvester's matrix. 16 lanes hold a block, four channels each.
__device__ __forceinline__ float4 rotate(float4 v) {
    const int lane = threadIdx.x & 31;
    const float a = v.x + v.y, b = v.x - v.y, c = v.z + v.w, d = v.z - v.w;
    v = make_float4(a + c, b + d, a - c, b - d);
#pragma unroll
    for (int o = 1; o < 16; o <<= 1) {
        const float sign = (lane & o) ? -1.f : 1.f;
        v.x = fmaf(v.x, sign, __shfl_xor_sync(~0u, v.x, o));
        v.y = fmaf(v.y, sign, __shfl_xor_sync(~0u, v.y, o));
        v.z = fmaf(v.z, sign, __shfl_xor_sync(~0u, v.z, o));
        v.w = fmaf(v.w, sign, __shfl_xor_sync(~0u, v.w, o));
    }
    return make_float4(v.x * .125f, v.y * .125f, v.z * .125f, v.w * .125f);
}

// The mean of numbers and the sum of their squared distances from it, which can be joined without loss
// (https://en.wikipedia.org/wiki/Algorithms_for_calculating_variance#Parallel_algorithm).
struct Spread { float count, mean, squares; };

__device__ __forceinline__ Spread joined(Spread a, Spread b) {
    const float count = a.count + b.count, distance = b.mean - a.mean;
    if (!(count > 0.f)) return a;
    const float share = b.count / count;
    return {count, fmaf(distance, share, a.mean), a.squares + b.squares + distance * distance * a.count * share};
}

// Both reductions are over the block, and may be called once in a kernel. Every thread gets the result.
__device__ __forceinline__ Spread over_block(Spread s) {
    __shared__ Spread warps[32];
#pragma unroll
    for (int o = 16; o; o >>= 1)
        s = joined(s, {__shfl_xor_sync(~0u, s.count, o), __shfl_xor_sync(~0u, s.mean, o), __shfl_xor_sync(~0u, s.squares, o)});
    if (!(threadIdx.x & 31)) warps[threadIdx.x >> 5] = s;
    __syncthreads();
    s = warps[0];
    for (int i = 1; i < blockDim.x >> 5; i++) s = joined(s, warps[i]);
    return s;
}
__device__ __forceinline__ int largest_over_block(int v) {
    __shared__ int warps[32];
#pragma unroll
    for (int o = 16; o; o >>= 1) v = max(v, __shfl_xor_sync(~0u, v, o));
    if (!(threadIdx.x & 31)) warps[threadIdx.x >> 5] = v;
    __syncthreads();
    v = warps[0];
    for (int i = 1; i < blockDim.x >> 5; i++) v = max(v, warps[i]);
    return v;
}

// The tanh form: 0.5 * x * (1 + tanh(u)) is x / (1 + exp(-2 u)).
__device__ __forceinline__ float gelu(float x) {
    return __fdividef(x, 1.f + __expf(-1.5957691216057308f * fmaf(0.044715f * x * x, x, x)));
}

#define VECTORS 6  // of four channels, for each thread

// Grid (rows). Rotates and quantises a row; before that, norms and modulates it (shift not null) or applies GELU
// (activate). tokens: INT8, or null. plain: REAL before the rotation, or null. Rows from `targets` on use a modulation
// `reference_step` numbers further.
extern "C" __global__ void quantize_rows(
    SOURCE_PARAMETERS, const REAL* __restrict__ shift, const REAL* __restrict__ scale, int targets, int reference_step,
    int activate, REAL* __restrict__ plain, u32* __restrict__ tokens, float* __restrict__ scales, int width
) {
    const int row = blockIdx.x, step = blockDim.x * 4, first = threadIdx.x * 4;
    float4 v[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int channel = first + i * step;
        v[i] = channel < width ? read4(SOURCE, row, channel, width) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    if (shift) {
        Spread spread = {0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (first + i * step >= width) continue;
            spread.count += 4.f;
            spread.mean += (v[i].x + v[i].y) + (v[i].z + v[i].w);
        }
        spread.mean /= fmaxf(spread.count, 1.f);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (first + i * step >= width) continue;
            const float a = v[i].x - spread.mean, b = v[i].y - spread.mean, c = v[i].z - spread.mean, d = v[i].w - spread.mean;
            spread.squares += (a * a + b * b) + (c * c + d * d);
        }
        spread = over_block(spread);
        const float mean = spread.mean, inverse = rsqrtf(spread.squares / width + EPS);
        const int reference = row < targets ? 0 : reference_step;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const int channel = first + i * step;
            if (channel >= width) continue;
            const float4 a = load4(shift + reference + channel), b = load4(scale + reference + channel);
#define MODULATE(c) fmaf((v[i].c - mean) * inverse, 1.f + b.c, a.c)
            v[i] = EACH4(MODULATE);
#undef MODULATE
        }
    }
    int bits = 0;  // of the largest magnitude: as integers, infinity is larger than all numbers, and NaN than infinity
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int channel = first + i * step;
        if (activate) v[i] = make_float4(gelu(v[i].x), gelu(v[i].y), gelu(v[i].z), gelu(v[i].w));
        if (plain && channel < width) store4(plain + (size_t)row * width + channel, v[i]);
        if (!tokens) continue;
        v[i] = rotate(v[i]);
#define MAGNITUDE(c) (__float_as_int(v[i].c) & 0x7fffffff)
        bits = max(bits, max(max(MAGNITUDE(x), MAGNITUDE(y)), max(MAGNITUDE(z), MAGNITUDE(w))));
#undef MAGNITUDE
    }
    if (!tokens) return;
    const float limit = __int_as_float(largest_over_block(bits));
    if (!threadIdx.x) scales[row] = limit / 127.f;
    const float inverse = limit > 0.f ? 127.f / limit : 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const int channel = first + i * step;
        // The low byte of 1.5 * 2^23 plus a small number is that number, rounded.
#define BYTE(c) __float_as_uint(fmaf(v[i].c, inverse, 12582912.f))
        const u32 ab = __byte_perm(BYTE(x), BYTE(y), 0x0040), cd = __byte_perm(BYTE(z), BYTE(w), 0x0040);
#undef BYTE
        if (channel < width) tokens[((size_t)row * width + channel) >> 2] = __byte_perm(ab, cd, 0x5410);
    }
}

// Grid (rows), a warp for each head of 128 channels. Norms each head (weight not null) and rotates its pairs of
// channels (rotations: cosine and sine for each pair, or null).
extern "C" __global__ void finish_heads(
    SOURCE_PARAMETERS, const REAL* __restrict__ weight, const float4* __restrict__ rotations, REAL* __restrict__ out
) {
    const int row = blockIdx.x, width = blockDim.x * 4, lane = threadIdx.x & 31;
    float4 v = read4(SOURCE, row, threadIdx.x * 4, width);
    if (weight) {
        float squares = (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
#pragma unroll
        for (int o = 16; o; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
        const float inverse = rsqrtf(squares / 128.f + EPS);
        const float4 w = load4(weight + lane * 4);
        v = make_float4(v.x * inverse * w.x, v.y * inverse * w.y, v.z * inverse * w.z, v.w * inverse * w.w);
    }
    if (rotations) {
        const float4 r = rotations[row * 32 + lane];
        v = make_float4(v.x * r.x - v.y * r.y, v.x * r.y + v.y * r.x, v.z * r.z - v.w * r.w, v.z * r.w + v.w * r.z);
    }
    store4(out + (size_t)row * width + threadIdx.x * 4, v);
}

// Grid (rows). out = source, or residual + gate * source where they are not null.
extern "C" __global__ void finish_rows(
    SOURCE_PARAMETERS, const REAL* __restrict__ residual, const REAL* __restrict__ gate, int targets, int reference_step,
    REAL* __restrict__ out, int width
) {
    const int row = blockIdx.x, reference = row < targets ? 0 : reference_step;
    for (int channel = threadIdx.x * 4; channel < width; channel += blockDim.x * 4) {
        const size_t at = (size_t)row * width + channel;
        float4 y = read4(SOURCE, row, channel, width);
        if (residual) {
            const float4 g = load4(gate + reference + channel), r = load4(residual + at);
#define ADD(c) fmaf(g.c, y.c, r.c)
            y = EACH4(ADD);
#undef ADD
        }
        store4(out + at, y);
    }
}

// Grid (rows). An INT8 row times its scale, then rotated if `rotates`: the row of the unrotated matrix.
extern "C" __global__ void upcast_rows(
    const char4* __restrict__ weight, const float* __restrict__ scales, REAL* __restrict__ out, int width, int rotates
) {
    const float scale = scales[blockIdx.x];
    const int padded = (width + blockDim.x * 4 - 1) / (blockDim.x * 4) * (blockDim.x * 4);  // whole warps rotate
    for (int channel = threadIdx.x * 4; channel < padded; channel += blockDim.x * 4) {
        const size_t at = (size_t)blockIdx.x * width + channel;
        const char4 w = channel < width ? weight[at >> 2] : make_char4(0, 0, 0, 0);
        float4 v = make_float4(w.x * scale, w.y * scale, w.z * scale, w.w * scale);
        if (rotates) v = rotate(v);
        if (channel < width) store4(out + at, v);
    }
}
