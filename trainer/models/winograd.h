/* The arithmetic of winograd.c for one scalar type and one instruction set.

   It is included once for each pair, with these macros defined: SCALAR (float or double), INDEX (the
   signed integer of the same size), VECTOR (bytes of a register), WIDE (registers in a row of a
   block of the matrix product), TARGET (the compiler's attribute for the instruction set) and
   NAME(x), a name for that pair. */

#define vec NAME(vec)
#define loose NAME(loose)
#define mask NAME(mask)
typedef SCALAR vec __attribute__((vector_size(VECTOR)));
typedef SCALAR loose __attribute__((vector_size(VECTOR), aligned(sizeof(SCALAR)), may_alias));
typedef INDEX mask __attribute__((vector_size(VECTOR)));
#define bytes NAME(bytes)
typedef unsigned char bytes __attribute__((vector_size(VECTOR / sizeof(SCALAR)), aligned(1), may_alias));

enum { NAME(LANES) = VECTOR / sizeof(SCALAR) };
#define LANES NAME(LANES)
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE vec NAME(load)(const SCALAR *p) { return *(const loose *)p; }
INLINE void NAME(store)(SCALAR *p, vec v) { *(loose *)p = v; }
INLINE vec NAME(choose)(mask m, vec a, vec b) { return (vec)(((mask)a & m) | ((mask)b & ~m)); }
/* ReLU that propagates NaN. */
INLINE vec NAME(relu)(vec v) { return NAME(choose)(v < 0, (vec){0}, v); }
#define load NAME(load)
#define store NAME(store)
#define choose NAME(choose)

/* c[rows][vectors] (+)= a[rows][depth] b[depth][vectors]; a's strides are (am, ak). */
#define PRODUCT(name, ROWS, VECTORS)                                                              \
    INLINE void NAME(name)(int depth, const SCALAR *a, int am, int ak, const SCALAR *b, int bk,     \
                           SCALAR *c, int cm, int add) {                                           \
        vec sum[ROWS][VECTORS];                                                                    \
        UNROLL for (int m = 0; m < ROWS; m++)                                                      \
            UNROLL for (int v = 0; v < VECTORS; v++)                                               \
                sum[m][v] = add ? load(c + m * cm + v * LANES) : (vec){0};                         \
        for (int k = 0; k < depth; k++) {                                                          \
            vec row[VECTORS];                                                                      \
            UNROLL for (int v = 0; v < VECTORS; v++) row[v] = load(b + k * bk + v * LANES);        \
            UNROLL for (int m = 0; m < ROWS; m++)                                                  \
                UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] += a[m * am + k * ak] * row[v]; \
        }                                                                                          \
        UNROLL for (int m = 0; m < ROWS; m++)                                                      \
            UNROLL for (int v = 0; v < VECTORS; v++) store(c + m * cm + v * LANES, sum[m][v]);     \
    }
PRODUCT(product6, 6, WIDE)
PRODUCT(product4, 4, WIDE)
PRODUCT(narrow, 6, 2)
#undef PRODUCT

typedef struct {
    SCALAR hidden[SIDE1 * SIDE1 * C1]; /* the first convolution's output */
    SCALAR d_hidden[SIDE1 * SIDE1 * C1];
    SCALAR v[16][STRIP][C1];
    SCALAR m[16][STRIP][C2];
    SCALAR d_v[16][STRIP][C1];
} NAME(scratch);

/* hidden[i][j][c] = relu(bias[c] + sum x[i + p][j + q] kernel[p][q][c]) */
INLINE void NAME(first)(const SCALAR *x, const SCALAR *kernel, const SCALAR *bias, SCALAR *hidden) {
    for (int c = 0; c < C1; c += LANES) {
        vec k[9], b = load(bias + c);
        UNROLL for (int t = 0; t < 9; t++) k[t] = load(kernel + t * C1 + c);
        for (int i = 0; i < SIDE1; i++)
            for (int j = 0; j < SIDE1; j++) {
                vec sum = b;
                UNROLL for (int t = 0; t < 9; t++) sum += x[(i + t / 3) * SIDE + j + t % 3] * k[t];
                store(hidden + (i * SIDE1 + j) * C1 + c, NAME(relu)(sum));
            }
    }
}

/* v = B' d B for each tile d of 4 by 4 inputs; neighbouring tiles start 2 apart. */
INLINE void NAME(transform_input)(const SCALAR *hidden, int start, SCALAR v[16][STRIP][C1]) {
    for (int t = 0; t < STRIP; t++) {
        const SCALAR *tile = hidden + (2 * ((start + t) / TILES) * SIDE1 + 2 * ((start + t) % TILES)) * C1;
        for (int c = 0; c < C1; c += LANES) {
            vec e[4][4];
            UNROLL for (int j = 0; j < 4; j++) {
                vec d[4];
                UNROLL for (int i = 0; i < 4; i++) d[i] = load(tile + (i * SIDE1 + j) * C1 + c);
                e[0][j] = d[0] - d[2];
                e[1][j] = d[1] + d[2];
                e[2][j] = d[2] - d[1];
                e[3][j] = d[1] - d[3];
            }
            UNROLL for (int i = 0; i < 4; i++) {
                store(&v[4 * i + 0][t][c], e[i][0] - e[i][2]);
                store(&v[4 * i + 1][t][c], e[i][1] + e[i][2]);
                store(&v[4 * i + 2][t][c], e[i][2] - e[i][1]);
                store(&v[4 * i + 3][t][c], e[i][1] - e[i][3]);
            }
        }
    }
}

/* A' m A, the 2 by 2 outputs of the convolution in each tile; then max pooling, bias, ReLU, dropout. */
INLINE void NAME(transform_output)(SCALAR m[16][STRIP][C2], const SCALAR *bias, SCALAR scale, INDEX drop,
                                   const unsigned char *random, SCALAR *out, unsigned char *code) {
    for (int t = 0; t < STRIP; t++)
        for (int c = 0; c < C2; c += LANES) {
            vec e[2][4];
            UNROLL for (int j = 0; j < 4; j++) {
                vec m1 = load(&m[4 + j][t][c]), m2 = load(&m[8 + j][t][c]);
                e[0][j] = load(&m[j][t][c]) + m1 + m2;
                e[1][j] = m1 - m2 - load(&m[12 + j][t][c]);
            }
            vec y0 = e[0][0] + e[0][1] + e[0][2], y1 = e[0][1] - e[0][2] - e[0][3];
            vec y2 = e[1][0] + e[1][1] + e[1][2], y3 = e[1][1] - e[1][2] - e[1][3];
            mask right0 = y0 < y1, right1 = y2 < y3;
            vec top = choose(right0, y1, y0), bottom = choose(right1, y3, y2);
            mask below = top < bottom;
            mask where = (below & (2 - right1)) | (~below & -right0);
            vec p = choose(below, bottom, top) + load(bias + c);
            mask lost = p <= 0;
            p = NAME(relu)(p);
            if (drop) {
                mask dropped = __builtin_convertvector(*(const bytes *)(random + t * C2 + c), mask) < drop;
                lost |= dropped;
                p = choose(dropped, (vec){0}, p * scale);
            }
            store(out + t * C2 + c, p);
            *(bytes *)(code + t * C2 + c) = __builtin_convertvector((lost & NOWHERE) | (~lost & where), bytes);
        }
}

/* The gradient of m, A dy A', where dy has at most one element of a tile that is not zero. */
INLINE void NAME(transform_gradient)(const SCALAR *gradient, const unsigned char *code, SCALAR scale,
                                     SCALAR m[16][STRIP][C2], SCALAR *d_bias) {
    for (int c = 0; c < C2; c += LANES) {
        vec sum = load(d_bias + c);
        for (int t = 0; t < STRIP; t++) {
            vec g = load(gradient + t * C2 + c) * scale;
            mask where = __builtin_convertvector(*(const bytes *)(code + t * C2 + c), mask);
            vec dy[4];
            UNROLL for (int k = 0; k < 4; k++) dy[k] = choose(where == k, g, (vec){0});
            sum += (dy[0] + dy[1]) + (dy[2] + dy[3]);
            vec e[4][2];
            UNROLL for (int j = 0; j < 2; j++) {
                e[0][j] = dy[j];
                e[1][j] = dy[j] + dy[2 + j];
                e[2][j] = dy[j] - dy[2 + j];
                e[3][j] = -dy[2 + j];
            }
            UNROLL for (int i = 0; i < 4; i++) {
                store(&m[4 * i + 0][t][c], e[i][0]);
                store(&m[4 * i + 1][t][c], e[i][0] + e[i][1]);
                store(&m[4 * i + 2][t][c], e[i][0] - e[i][1]);
                store(&m[4 * i + 3][t][c], -e[i][1]);
            }
        }
        store(d_bias + c, sum);
    }
}

/* d_hidden += B d_v B' */
INLINE void NAME(add_input_gradient)(SCALAR v[16][STRIP][C1], int start, SCALAR *d_hidden) {
    for (int t = 0; t < STRIP; t++) {
        SCALAR *tile = d_hidden + (2 * ((start + t) / TILES) * SIDE1 + 2 * ((start + t) % TILES)) * C1;
        for (int c = 0; c < C1; c += LANES) {
            vec e[4][4];
            UNROLL for (int j = 0; j < 4; j++) {
                vec v0 = load(&v[j][t][c]), v1 = load(&v[4 + j][t][c]);
                vec v2 = load(&v[8 + j][t][c]), v3 = load(&v[12 + j][t][c]);
                e[0][j] = v0;
                e[1][j] = v1 - v2 + v3;
                e[2][j] = v1 + v2 - v0;
                e[3][j] = -v3;
            }
            UNROLL for (int i = 0; i < 4; i++) {
                SCALAR *row = tile + i * SIDE1 * C1 + c;
                store(row, load(row) + e[i][0]);
                store(row + C1, load(row + C1) + (e[i][1] - e[i][2] + e[i][3]));
                store(row + 2 * C1, load(row + 2 * C1) + (e[i][1] + e[i][2] - e[i][0]));
                store(row + 3 * C1, load(row + 3 * C1) - e[i][3]);
            }
        }
    }
}

INLINE void NAME(first_gradient)(const SCALAR *x, const SCALAR *hidden, const SCALAR *d_hidden,
                                 SCALAR *d_kernel, SCALAR *d_bias) {
    for (int c = 0; c < C1; c += LANES) {
        vec k[9], b = load(d_bias + c);
        UNROLL for (int t = 0; t < 9; t++) k[t] = load(d_kernel + t * C1 + c);
        for (int i = 0; i < SIDE1; i++)
            for (int j = 0; j < SIDE1; j++) {
                const int place = (i * SIDE1 + j) * C1 + c;
                vec g = choose(load(hidden + place) > 0, load(d_hidden + place), (vec){0});
                b += g;
                UNROLL for (int t = 0; t < 9; t++) k[t] += x[(i + t / 3) * SIDE + j + t % 3] * g;
            }
        store(d_bias + c, b);
        UNROLL for (int t = 0; t < 9; t++) store(d_kernel + t * C1 + c, k[t]);
    }
}

static TARGET void NAME(forward)(const Work *work, void *memory, int64_t image) {
    NAME(scratch) *s = memory;
    const SCALAR *u = work->u;
    NAME(first)((const SCALAR *)work->x + image * SIDE * SIDE, work->kernel1, work->bias1, s->hidden);
    for (int start = 0; start < TILES * TILES; start += STRIP) {
        NAME(transform_input)(s->hidden, start, s->v);
        for (int k = 0; k < 16; k++)
            for (int t = 0; t < STRIP; t += 6)
                for (int c = 0; c < C2; c += WIDE * LANES)
                    NAME(product6)(C1, &s->v[k][t][0], C1, 1, u + k * C1 * C2 + c, C2, &s->m[k][t][c], C2, 0);
        const int64_t place = (image * TILES * TILES + start) * C2;
        NAME(transform_output)(s->m, work->bias2, work->scale, work->drop,
                               work->random ? work->random + place : NULL, (SCALAR *)work->out + place, work->code + place);
    }
}

static TARGET void NAME(backward)(const Work *work, void *memory, int64_t image, void *sums) {
    NAME(scratch) *s = memory;
    const SCALAR *x = (const SCALAR *)work->x + image * SIDE * SIDE;
    SCALAR *d_u = sums, *d_bias2 = d_u + U, *d_kernel1 = d_bias2 + C2, *d_bias1 = d_kernel1 + 9 * C1;
    const SCALAR *ut = work->u_transposed;
    NAME(first)(x, work->kernel1, work->bias1, s->hidden);
    memset(s->d_hidden, 0, sizeof s->d_hidden);
    for (int start = 0; start < TILES * TILES; start += STRIP) {
        const int64_t place = (image * TILES * TILES + start) * C2;
        NAME(transform_input)(s->hidden, start, s->v);
        NAME(transform_gradient)((const SCALAR *)work->gradient + place, work->code + place,
                                 work->scale, s->m, d_bias2);
        for (int k = 0; k < 16; k++) {
            for (int c1 = 0; c1 < C1; c1 += 4)
                for (int c2 = 0; c2 < C2; c2 += WIDE * LANES)
                    NAME(product4)(STRIP, &s->v[k][0][c1], 1, C1, &s->m[k][0][c2], C2,
                                   d_u + (k * C1 + c1) * C2 + c2, C2, 1);
            for (int t = 0; t < STRIP; t += 6)
                for (int c = 0; c < C1; c += 2 * LANES)
                    NAME(narrow)(C2, &s->m[k][t][0], C2, 1, ut + k * C1 * C2 + c, C1, &s->d_v[k][t][c], C1, 0);
        }
        NAME(add_input_gradient)(s->d_v, start, s->d_hidden);
    }
    NAME(first_gradient)(x, s->hidden, s->d_hidden, d_kernel1, d_bias1);
}

/* u = G k G' for each pair of channels, and its transpose. */
static TARGET void NAME(prepare)(const Work *work) {
    const SCALAR *kernel = work->kernel2;
    SCALAR *u = work->u, *transposed = work->u_transposed;
    for (int c1 = 0; c1 < C1; c1++)
        for (int c2 = 0; c2 < C2; c2++) {
            SCALAR e[4][3], f[4][4];
            for (int j = 0; j < 3; j++) {
                const SCALAR k0 = kernel[(j * C1 + c1) * C2 + c2];
                const SCALAR k1 = kernel[((3 + j) * C1 + c1) * C2 + c2];
                const SCALAR k2 = kernel[((6 + j) * C1 + c1) * C2 + c2];
                e[0][j] = k0;
                e[1][j] = (k0 + k1 + k2) / 2;
                e[2][j] = (k0 - k1 + k2) / 2;
                e[3][j] = k2;
            }
            for (int i = 0; i < 4; i++) {
                f[i][0] = e[i][0];
                f[i][1] = (e[i][0] + e[i][1] + e[i][2]) / 2;
                f[i][2] = (e[i][0] - e[i][1] + e[i][2]) / 2;
                f[i][3] = e[i][2];
                for (int j = 0; j < 4; j++) {
                    u[((4 * i + j) * C1 + c1) * C2 + c2] = f[i][j];
                    transposed[((4 * i + j) * C2 + c2) * C1 + c1] = f[i][j];
                }
            }
        }
}

/* Adds the sums of the groups; the gradient of the second kernel is G' du G. */
static TARGET void NAME(finish)(const Work *work, int64_t groups, void *kernel1, void *bias1,
                                void *kernel2, void *bias2) {
    SCALAR *sums = work->sums, *kernel = kernel2;
    for (int64_t group = 1; group < groups; group++)
        for (int i = 0; i < SUMS; i++) sums[i] += sums[group * SUMS + i];
    for (int c = 0; c < C1 * C2; c++) {
        SCALAR e[3][4];
        for (int j = 0; j < 4; j++) {
            const SCALAR u1 = sums[(4 + j) * C1 * C2 + c] / 2, u2 = sums[(8 + j) * C1 * C2 + c] / 2;
            e[0][j] = sums[j * C1 * C2 + c] + u1 + u2;
            e[1][j] = u1 - u2;
            e[2][j] = u1 + u2 + sums[(12 + j) * C1 * C2 + c];
        }
        for (int i = 0; i < 3; i++) {
            const SCALAR u1 = e[i][1] / 2, u2 = e[i][2] / 2;
            kernel[(3 * i) * C1 * C2 + c] = e[i][0] + u1 + u2;
            kernel[(3 * i + 1) * C1 * C2 + c] = u1 - u2;
            kernel[(3 * i + 2) * C1 * C2 + c] = u1 + u2 + e[i][3];
        }
    }
    memcpy(bias2, sums + U, C2 * sizeof(SCALAR));
    memcpy(kernel1, sums + U + C2, 9 * C1 * sizeof(SCALAR));
    memcpy(bias1, sums + U + C2 + 9 * C1, C1 * sizeof(SCALAR));
}

static const Kernels NAME(kernels) = {
    sizeof(SCALAR),  sizeof(NAME(scratch)), NAME(prepare),
    NAME(forward), NAME(backward),        NAME(finish),
};

#undef vec
#undef loose
#undef mask
#undef bytes
#undef LANES
#undef INLINE
#undef load
#undef store
#undef choose
#undef SCALAR
#undef VECTOR
#undef WIDE
#undef TARGET
#undef NAME
#undef INDEX
