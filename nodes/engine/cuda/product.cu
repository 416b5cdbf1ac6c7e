// INT8 matrix products by DP4A, for compute capability 6.1 and later: out (m, n) = a (m, k) times b (n, k) transposed.
//
// A block of 256 threads computes a tile of 128 x 128, 8 x 8 for each thread, in steps of 32 bytes in depth. The next
// step is fetched while the current one is multiplied. k is a multiple of 32, n of 4.
#define TILE 128
#define DEPTH 8                 // ints of a step
#define PITCH (TILE + 4)        // of a row of shared memory: stores of a warp fall into different banks

struct Fragment { int4 a0, a1, b0, b1; };

__device__ __forceinline__ void multiply(int (&sums)[8][8], const Fragment& f) {
    const int a[8] = {f.a0.x, f.a0.y, f.a0.z, f.a0.w, f.a1.x, f.a1.y, f.a1.z, f.a1.w};
    const int b[8] = {f.b0.x, f.b0.y, f.b0.z, f.b0.w, f.b1.x, f.b1.y, f.b1.z, f.b1.w};
#pragma unroll
    for (int n = 0; n < 64; n++) {  // back and forth over the rows: neighbours share an operand, which registers keep
        const int j = n >> 3, i = (j & 1) ? 7 - (n & 7) : n & 7;
        sums[i][j] = __dp4a(a[i], b[j], sums[i][j]);
    }
}

// Grid (tiles of n, tiles of m).
extern "C" __global__ void __launch_bounds__(256, 2) multiply_int8(
    const signed char* __restrict__ a, const signed char* __restrict__ b, int* __restrict__ out, int m, int n, int k
) {
    __shared__ int shared[2][2][DEPTH][PITCH];  // buffer, operand
    const int thread = threadIdx.x, column = thread & 15, row = thread >> 4;
    const int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    // Each thread fetches 16 bytes of a row of both operands. Rows past the end repeat the last one.
    const int own = thread >> 1, half = (thread & 1) * 4;
    const int4* from_a = (const int4*)(a + (size_t)min(first_row + own, m - 1) * k + half * 4);
    const int4* from_b = (const int4*)(b + (size_t)min(first_column + own, n - 1) * k + half * 4);
    auto keep = [&](int buffer, const int4& x, const int4& y) {
        int (*to_a)[PITCH] = shared[buffer][0], (*to_b)[PITCH] = shared[buffer][1];
        to_a[half][own] = x.x; to_a[half + 1][own] = x.y; to_a[half + 2][own] = x.z; to_a[half + 3][own] = x.w;
        to_b[half][own] = y.x; to_b[half + 1][own] = y.y; to_b[half + 2][own] = y.z; to_b[half + 3][own] = y.w;
    };
    auto load = [&](Fragment& f, int buffer, int depth) {
        const int* at_a = shared[buffer][0][depth] + row * 4;
        const int* at_b = shared[buffer][1][depth] + column * 4;
        f.a0 = *(const int4*)at_a;
        f.a1 = *(const int4*)(at_a + 64);
        f.b0 = *(const int4*)at_b;
        f.b1 = *(const int4*)(at_b + 64);
    };
    // They start at 1, which the store takes away again. So the compiler need not keep the four numbers of a store in
    // neighbouring registers, where half of the products would read two registers of one bank, a cycle more on Pascal.
    int sums[8][8];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] = 1;
    keep(0, __ldg(from_a), __ldg(from_b));
    __syncthreads();
    const int steps = k / (DEPTH * 4);
    for (int step = 0; step < steps; step++) {
        const int buffer = step & 1;
        const bool more = step + 1 < steps;
        int4 next_a, next_b;
        from_a += 2; from_b += 2;
        if (more) { next_a = __ldg(from_a); next_b = __ldg(from_b); }
        Fragment f[2];
        load(f[0], buffer, 0);
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth++) {
            if (depth + 1 < DEPTH) load(f[(depth + 1) & 1], buffer, depth + 1);
            multiply(sums, f[depth & 1]);
        }
        if (more) {
            keep(buffer ^ 1, next_a, next_b);
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int r = first_row + (i >> 2) * 64 + row * 4 + (i & 3);
        if (r >= m) continue;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int c = first_column + side * 64 + column * 4;
            const int* s = &sums[i][side * 4];
            if (c < n) *(int4*)(out + (size_t)r * n + c) = make_int4(s[0] - 1, s[1] - 1, s[2] - 1, s[3] - 1);
        }
    }
}
